from __future__ import annotations

import pytest

from storage import uri
from storage.errors import RunMismatchError, StoreDamagedError
from storage.runs import RunFolder

IDENTITY = {"method": "ddk", "seed": 1, "loss": {"gamma": 0.2, "tail": {"treatment": "bucket"}}, "stop": None}


@pytest.fixture
def run(place: str) -> RunFolder:
    return RunFolder(place, "first")


def test_where_things_lie() -> None:
    run = RunFolder("s3://bucket/root/", "first")
    assert run.url == "s3://bucket/root/runs/first"
    assert run.student_url == "s3://bucket/root/runs/first/student"
    assert run.report_url == "s3://bucket/root/runs/first/report"


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
        f"name (run: …) or remove that folder"
    )
    assert run.config() == {"a": 1}
    missing = {name: value for name, value in IDENTITY.items() if name != "stop"}
    with pytest.raises(RunMismatchError, match=r"stop: None → \(absent\)"):
        run.claim(missing, {})
    with pytest.raises(RunMismatchError, match=r"loss.tail.treatment: 'bucket' → 'drop'; method: 'ddk' → 'kd'"):
        run.claim({**IDENTITY, "method": "kd", "loss": {"gamma": 0.2, "tail": {"treatment": "drop"}}}, {})


def test_what_json_does_not_tell_apart_is_the_same_run(run: RunFolder) -> None:
    run.claim({"betas": (0.9, 0.95)}, {})
    run.claim({"betas": (0.9, 0.95)}, {})
    run.claim({"betas": [0.9, 0.95]}, {})


def test_an_unreadable_identity_is_named(run: RunFolder, place: str) -> None:
    uri.write_bytes(f"{place}/runs/first/identity.json", b"{")
    with pytest.raises(StoreDamagedError, match=r"identity\.json is not valid JSON"):
        run.claim(IDENTITY, {})


def test_metrics_come_in_the_order_of_the_steps(run: RunFolder) -> None:
    assert run.metrics() == []
    rows = [{"step": step, "ce": 1 / (step + 1)} for step in range(120)]
    for first in (100, 0, 5, 50):
        last = {0: 5, 5: 50, 50: 100, 100: 120}[first]
        run.write_metrics(first, rows[first:last])
    assert run.metrics() == rows
    run.write_metrics(50, rows[50:60])  # an interval that is trained again after a kill
    assert run.metrics() == rows[:60] + rows[100:]


def test_intervals_are_found_and_read_one_by_one(run: RunFolder, place: str) -> None:
    assert run.measured_intervals() == []
    assert run.interval_metrics(5) == []
    for first in (100_000_000, 5, 0):
        run.write_metrics(first, [{"step": first + 1}])
    uri.write_bytes(f"{place}/runs/first/metrics/notes.txt", b"somebody's")
    assert run.measured_intervals() == [0, 5, 100_000_000]
    assert run.interval_metrics(5) == [{"step": 6}]
    assert [row["step"] for row in run.metrics()] == [1, 6, 100_000_001]


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
