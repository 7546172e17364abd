from __future__ import annotations

import math
import random
import threading
from typing import Any

import pytest
from resealing import resealed

from ddk.values import DomainGap, Mixture
from storage.errors import FormatVersionError, StoreDamagedError
from storage.files import uri
from storage.runs.mixtures import MixtureHistory, MixtureRecord, make_record


def record(version: int, step: int | None = None) -> MixtureRecord:
    random_ = random.Random(version)
    weights = [random_.random() for _ in range(3)]
    domains = ["math", "数学", "a.b/c"]
    return make_record(
        version=version,
        step=10 * version if step is None else step,
        tokens_seen=2**40 + version,
        gaps=[
            DomainGap(domain=domain, student_ppl=math.exp(random_.uniform(0, 10)), teacher_ppl=1 + random_.random())
            for domain in domains
        ],
        mixture=Mixture(probabilities={d: w / sum(weights) for d, w in zip(domains, weights, strict=True)}),
        blocks_drawn={"math": version * 3, "数学": 0},
    )


@pytest.fixture
def history(place: str) -> MixtureHistory:
    return MixtureHistory(f"{place}/runs/a")


def test_a_history_grows_version_by_version(history: MixtureHistory) -> None:
    assert history.records() == []
    assert history.at_step(0) is None
    written = [record(version) for version in range(12)]
    for one in written:
        history.append(one)
    assert history.records() == written


def test_numbers_are_read_exactly_as_they_were_written(history: MixtureHistory) -> None:
    odd = record(0).model_copy(
        update={
            "probabilities": {"a.b/c": 0.1 + 0.2, "math": 5e-324, "数学": 1 - (0.1 + 0.2)},
            "tokens_seen": 2**62 + 1,
        }
    )
    history.append(odd)
    (found,) = history.records()
    # Order included: what is summed over the domains comes out the same.
    assert [(d, p.hex()) for d, p in found.probabilities.items()] == [
        (d, p.hex()) for d, p in odd.probabilities.items()
    ]
    assert [gap.student_ppl.hex() for gap in found.gaps] == [gap.student_ppl.hex() for gap in odd.gaps]
    assert found.tokens_seen == 2**62 + 1
    assert found.gaps == odd.gaps
    assert [gap.domain for gap in found.gaps] == ["a.b/c", "math", "数学"]
    assert found.mixture == odd.mixture


def test_positions_are_kept_where_there_are_some_and_not_a_word_where_there_are_none(place: str) -> None:
    plain, weighed = record(0), record(1).model_copy(update={"positions": {"a.b/c": 3, "math": 9}})
    history = MixtureHistory(f"{place}/runs/b")
    history.append(plain)
    history.append(weighed)
    assert history.records() == [plain, weighed]
    assert set(uri.read_json(f"{place}/runs/b/mixtures/00000.json")) == {
        *MixtureRecord.model_fields,
        "seal",
    } - {"positions", "kl", "train_blocks", "capped"}
    assert uri.read_json(f"{place}/runs/b/mixtures/00001.json")["positions"] == {"a.b/c": 3, "math": 9}


def test_only_the_next_version_may_be_added(history: MixtureHistory, place: str) -> None:
    history.append(record(0))
    before = uri.read_bytes(f"{place}/runs/a/mixtures/00000.json")
    for version in (0, 2):
        with pytest.raises(ValueError, match=f"expects version 1; this record is version {version}"):
            history.append(record(version, step=99))
    history.append(record(1))
    assert uri.read_bytes(f"{place}/runs/a/mixtures/00000.json") == before
    assert uri.list_names(f"{place}/runs/a/mixtures") == ["00000.json", "00001.json"]


def test_another_process_sees_what_was_added(history: MixtureHistory, place: str) -> None:
    other = MixtureHistory(f"{place}/runs/a")
    assert other.records() == []
    history.append(record(0))
    assert other.records() == [record(0)]


def test_the_newest_record_of_a_step(history: MixtureHistory) -> None:
    for version, step in enumerate((0, 50, 50, 100)):
        history.append(record(version, step))
    assert [found.version if (found := history.at_step(step)) else None for step in (0, 50, 100, 75)] == [0, 2, 3, None]


def test_a_missing_version_is_named(history: MixtureHistory, place: str) -> None:
    for version in range(3):
        history.append(record(version))
    uri.remove_file(f"{place}/runs/a/mixtures/00001.json")
    with pytest.raises(
        StoreDamagedError, match=r"mixtures lacks a version: it holds 00000\.json, 00002\.json; restore"
    ):
        history.records()
    with pytest.raises(StoreDamagedError, match="lacks a version"):
        history.append(record(2))


@pytest.mark.parametrize("damaged", [b"", b'{"version": 1', b"\xff", b"{}", b"[]", b'"a"'])
def test_a_damaged_record_is_named(history: MixtureHistory, place: str, damaged: bytes) -> None:
    for version in range(2):
        history.append(record(version))
    uri.write_bytes(f"{place}/runs/a/mixtures/00001.json", damaged)
    with pytest.raises(StoreDamagedError, match=r"mixtures/00001\.json is no.*; restore it, or remove it and the"):
        history.records()


def test_what_was_held_out_is_kept_and_an_older_record_read_without_it(history: MixtureHistory, place: str) -> None:
    written = record(0).model_copy(
        update={"kl": {"math": 0.1 + 0.2, "数学": -1e-4}, "train_blocks": {"math": 20}, "capped": ("math",)}
    )
    history.append(written)
    history.append(record(1))
    assert history.records() == [written, record(1)]
    older = uri.read_bytes(f"{place}/runs/a/mixtures/00001.json") or b""
    assert all(name not in older for name in (b"kl", b"train_blocks", b"capped"))


def test_an_intact_record_in_another_place_is_refused(history: MixtureHistory, place: str) -> None:
    for version in range(3):
        history.append(record(version))
    first, second = (f"{place}/runs/a/mixtures/0000{version}.json" for version in (1, 2))
    one, two = uri.read_bytes(first), uri.read_bytes(second)
    uri.write_bytes(first, two)
    uri.write_bytes(second, one)
    with pytest.raises(StoreDamagedError, match=r"00001\.json .*is that of mixture 2 of run 'a' .*exchanged or moved"):
        history.records()
    other = MixtureHistory(f"{place}/runs/b")
    other.append(record(0))
    uri.write_bytes(f"{place}/runs/b/mixtures/00000.json", uri.read_bytes(f"{place}/runs/a/mixtures/00000.json"))
    with pytest.raises(StoreDamagedError, match="is that of mixture 0 of run 'a'"):
        other.records()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"probabilities": {"a.b/c": 0.5, "math": 0.5, "数学": 0.5}}, "must sum to 1"),
        ({"probabilities": {"math": 1.0}}, "are of different domains"),
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"tokens_seen": 1.5}, "tokens_seen: Input should be a valid integer"),
        ({"blocks_drawn": {"other": 1}}, "of other domains"),
        ({"kl": {"other": 1.0}}, "of other domains"),
        ({"kl": {"math": "nan"}}, "kl.math: Input should be a finite number"),
        ({"train_blocks": {"math": 0}}, "train_blocks.math: Input should be greater than or equal to 1"),
        ({"capped": ["other"]}, "of other domains"),
        ({"version": 7}, "it says that it is version 7"),
    ],
)
def test_what_cannot_be_is_refused_whoever_sealed_it(
    history: MixtureHistory, place: str, changes: dict[str, Any], why: str
) -> None:
    history.append(record(0))
    resealed(f"{place}/runs/a/mixtures/00000.json", **changes)
    with pytest.raises(StoreDamagedError, match=rf"mixtures/00000\.json is no sound mixture record \(.*{why}"):
        history.records()


def test_a_newer_record_is_refused(history: MixtureHistory, place: str) -> None:
    history.append(record(0))
    url = f"{place}/runs/a/mixtures/00000.json"
    uri.write_json(url, {**uri.read_json(url), "format_version": 3, "something_new": 1})
    with pytest.raises(FormatVersionError, match=r"00000\.json has format version 3, .* reads version 2; update ddk"):
        history.records()


def test_of_two_evaluators_at_once_one_appends(place: str) -> None:
    """Both have read the same history; the slower one is told, and what the quicker wrote stands."""
    url = f"{place}/runs/race"
    MixtureHistory(url).append(record(0))
    start = threading.Barrier(8)
    failed: list[ValueError] = []

    def evaluate(step: int) -> None:
        start.wait()
        try:
            MixtureHistory(url).append(record(1, step=step))
        except ValueError as error:
            failed.append(error)

    threads = [threading.Thread(target=evaluate, args=(step,)) for step in range(100, 108)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 7
    assert all("expects version 2; this record is version 1" in str(error) for error in failed)
    assert [one.version for one in MixtureHistory(url).records()] == [0, 1]
    assert 100 <= MixtureHistory(url).records()[1].step < 108


def test_the_same_record_again_is_no_conflict(place: str) -> None:
    """As where a PUT went through, its answer was lost, and it was made again."""
    url = f"{place}/x/00000.json"
    assert uri.create_json(url, {"a": 1})
    assert uri.create_json(url, {"a": 1})
    assert not uri.create_json(url, {"a": 2})
    assert uri.read_json(url) == {"a": 1}
    assert uri.list_names(f"{place}/x") == ["00000.json"]
