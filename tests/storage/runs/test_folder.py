from __future__ import annotations

from pathlib import Path

import pytest
from resealing import resealed

from storage.errors import RunMismatchError, StoreDamagedError
from storage.files import uri
from storage.runs.folder import RunFolder
from storage.runs.listing import records_of

IDENTITY = {"method": "ddk", "seed": 1, "loss": {"gamma": 0.2, "tail": {"treatment": "bucket"}}, "stop": None}


@pytest.fixture
def run(place: str) -> RunFolder:
    return RunFolder(place, "first")


def test_where_things_lie() -> None:
    run = RunFolder("s3://bucket/data/", "first")
    assert run.url == "s3://bucket/data/runs/first"
    assert run.student_url == "s3://bucket/data/runs/first/student"
    assert run.report_url == "s3://bucket/data/runs/first/report"


def test_a_run_is_claimed_and_gone_on_with(run: RunFolder, place: str) -> None:
    assert run.config() is None
    run.claim(IDENTITY, {"a": 1})
    assert run.config() == {"a": 1}
    before = uri.read_bytes(f"{place}/runs/first/identity.json")
    RunFolder(place, "first").claim(dict(reversed(IDENTITY.items())), {"a": 2})
    assert run.config() == {"a": 2}
    assert uri.read_bytes(f"{place}/runs/first/identity.json") == before
    RunFolder(place, "second").claim({**IDENTITY, "seed": 2}, {})


def test_another_run_is_refused_with_the_fields_that_differ(run: RunFolder, place: str) -> None:
    run.claim(IDENTITY, {"a": 1})
    other = {**IDENTITY, "loss": {"gamma": 0.5, "tail": {"treatment": "bucket"}}}
    with pytest.raises(RunMismatchError) as error:
        run.claim(other, {"a": 2})
    assert str(error.value) == (
        f"run 'first' in {place}/runs/first was started with other settings (loss.gamma: 0.2 → 0.5); choose another "
        f"name (run: …) or remove that folder; `ddk train CONFIG --from first --run NAME` goes on from it with the new "
        f"settings"
    )
    assert run.config() == {"a": 1}
    missing = {name: value for name, value in IDENTITY.items() if name != "stop"}
    with pytest.raises(RunMismatchError, match=r"stop: None → \(absent\)"):
        run.claim(missing, {})
    with pytest.raises(RunMismatchError, match=r"loss.tail.treatment: 'bucket' → 'drop'; method: 'ddk' → 'kd'"):
        run.claim({**IDENTITY, "method": "kd", "loss": {"gamma": 0.2, "tail": {"treatment": "drop"}}}, {})


def test_what_json_does_not_tell_apart_is_the_same_run(run: RunFolder) -> None:
    run.claim({"betas": (0.9, 0.95)}, {"claimed": 1})
    before = uri.read_bytes(f"{run.url}/identity.json")
    for number, betas in enumerate([(0.9, 0.95), [0.9, 0.95]], start=2):
        run.claim({"betas": betas}, {"claimed": number})
        assert run.config() == {"claimed": number}
        assert uri.read_bytes(f"{run.url}/identity.json") == before


def test_an_unreadable_identity_is_named(run: RunFolder, place: str) -> None:
    uri.write_bytes(f"{place}/runs/first/identity.json", b"{")
    with pytest.raises(StoreDamagedError, match=r"identity\.json is not valid JSON"):
        run.claim(IDENTITY, {})


def test_metrics_come_in_the_order_of_the_steps(run: RunFolder) -> None:
    assert run.metrics() == []
    rows = [{"step": step + 1, "ce": 1 / (step + 1)} for step in range(120)]
    for first in (100, 0, 5, 50):
        last = {0: 5, 5: 50, 50: 100, 100: 120}[first]
        run.write_metrics(first, rows[first:last])
    assert run.metrics() == rows
    again = [{**row, "ce": 2.0} for row in rows[50:100]]
    run.write_metrics(50, again)  # an interval that is trained again after a kill
    assert run.metrics() == rows[:50] + again + rows[100:]


def test_intervals_are_found_and_read_one_by_one(run: RunFolder, place: str) -> None:
    assert run.measured_intervals() == []
    assert run.interval_metrics(5) == []
    for first in (100_000_000, 5, 0):
        run.write_metrics(first, [{"step": first + 1}])
    uri.write_bytes(f"{place}/runs/first/metrics/notes.txt", b"somebody's")
    assert run.measured_intervals() == [0, 5, 100_000_000]
    assert run.interval_metrics(5) == [{"step": 6}]


def test_lost_and_changed_metrics_are_named(run: RunFolder, place: str) -> None:
    run.claim(IDENTITY, {})
    for first in (0, 2, 4):
        run.write_metrics(first, [{"step": first + 1, "ce": 1.25}, {"step": first + 2, "ce": 1.5}])
    first, middle, last = (f"{place}/runs/first/metrics/step-0000000{step}.json" for step in (0, 2, 4))
    whole = uri.read_bytes(middle) or b""
    uri.write_bytes(middle, whole.replace(b"1.25", b"1.26"))
    with pytest.raises(StoreDamagedError, match=r"step-00000002\.json is no sound table \(its content is not what was"):
        run.metrics()
    uri.write_bytes(middle, uri.read_bytes(first) or b"")
    with pytest.raises(StoreDamagedError, match=r"it is that of the metrics from step 0 .*exchanged"):
        run.interval_metrics(2)
    uri.remove_file(middle)
    with pytest.raises(StoreDamagedError, match=r"step-00000002\.json is missing: it held the steps from 2 on"):
        run.metrics()
    uri.write_bytes(middle, whole)
    run.finish({"steps": 6})
    assert len(run.metrics()) == 6
    uri.remove_file(last)
    with pytest.raises(StoreDamagedError, match=r"step-00000004\.json is missing"):
        run.metrics()


def test_what_belongs_to_another_run_is_refused(run: RunFolder, place: str) -> None:
    other = RunFolder(place, "second")
    for one, seed in ((run, 1), (other, 2)):
        one.claim({**IDENTITY, "seed": seed}, {"seed": seed})
        one.finish({"steps": 0})
    for name in ("identity.json", "config.json", "summary.json"):
        mine, theirs = (f"{one.url}/{name}" for one in (run, other))
        kept = uri.read_bytes(mine) or b""
        uri.write_bytes(mine, uri.read_bytes(theirs) or b"")
        with pytest.raises(StoreDamagedError, match=rf"{name} is no sound .*exchanged or moved"):
            {"identity.json": run.identity, "config.json": run.config, "summary.json": run.summary}[name]()
        uri.write_bytes(mine, kept)
    uri.remove_file(f"{run.url}/identity.json")
    with pytest.raises(StoreDamagedError, match=r"without identity\.json"):
        run.summary()
    run.claim({**IDENTITY, "seed": 1}, {"seed": 1})
    assert run.summary() == {"steps": 0}, "the same settings, so all that was there counts again"


def test_a_students_files_are_listed_and_checked(run: RunFolder, tmp_path: Path) -> None:
    run.claim(IDENTITY, {})
    assert run.student_faults() == [f"{run.url}/student.json is missing"]
    (tmp_path / "made" / "code").mkdir(parents=True)
    (tmp_path / "made" / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "made" / "code" / "model.py").write_bytes(b"pass")
    uri.put_folder(str(tmp_path / "made"), run.student_url)
    run.student_listing.write(records_of(str(tmp_path / "made")))
    assert run.student_faults() == []
    weights = f"{run.student_url}/model.safetensors"
    uri.write_bytes(weights, bytes(999))
    assert run.student_faults() == [f"{weights}: 999 bytes instead of 1,000"]
    uri.remove_file(weights)
    assert run.student_faults() == [f"{weights}: missing"]
    uri.write_bytes(weights, bytes(999) + b"\1")
    assert [one.what for one in run.student_listing.differences()] == [
        "its bytes are not those that were written (sha256 differs)"
    ]
    resealed(run.student_listing.url, files={"../../../evil": {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(StoreDamagedError, match="would lead out of its folder"):
        run.student_faults()


def test_services_know_the_run_by_an_id_that_stays(run: RunFolder, place: str) -> None:
    known = run.tracking_id()
    assert len(known) == 16
    assert RunFolder(place, "first").tracking_id() == known
    assert RunFolder(place, "second").tracking_id() != known
    uri.remove_tree(run.url)
    assert run.tracking_id() != known, "begun anew"


def test_the_summary_is_there_once_the_run_is_complete(run: RunFolder) -> None:
    run.claim(IDENTITY, {})
    assert run.summary() is None
    run.finish({"gap": {"math": 1.25}, "tokens": 2**40})
    assert run.summary() == {"gap": {"math": 1.25}, "tokens": 2**40}
