from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_runs import START, make_run

from storage.files import uri
from storage.files.below import bytes_of, files_below
from storage.files.claims import Claims
from storage.runs.overview import RunOverview, overviews


def by_name(root: str) -> dict[str, RunOverview]:
    return {one.name: one for one in overviews(root)}


def test_what_a_root_without_runs_has(place: str) -> None:
    assert overviews(place) == []
    uri.write_bytes(f"{place}/runs/notes.txt", b"a file of somebody's own")
    assert overviews(place) == []


def test_finished_running_unfinished_and_what_they_took(place: str) -> None:
    make_run(place, "first")
    make_run(place, "second", planned=9, finished=False, identity={"from": {"run": "first", "step": 2}})
    make_run(place, "third", finished=False, identity={"from": {"run": "second", "step": None}})
    with Claims(f"{place}/runs/third") as claims:
        assert claims.take("all")
        found = by_name(place)
    first, second, third = found["first"], found["second"], found["third"]
    assert (first.state, second.state, third.state) == ("complete", "unfinished", "running")
    assert (first.steps, second.steps, second.planned_steps, first.tokens) == (4, 4, 9, 400)
    assert (first.worst_ratio, first.worst_domain, first.mean_ratio) == (2.0, "code", 1.5)
    assert (first.began, first.ended) == (START + 1.0, START + 12.0)
    # 4 steps of 100 tokens in 2 s each, and 3 s with what is around them.
    assert (first.times.training_seconds, first.times.wall_seconds) == (8.0, 12.0)
    assert first.times.tokens_per_second == 50.0
    assert first.bytes == bytes_of(files_below(f"{place}/runs/first")) > 0
    assert (first.ancestry, second.ancestry, third.ancestry) == ((), ("first@2",), ("second", "first@2"))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda run: uri.write_bytes(f"{run.url}/identity.json", b"{}"),
        lambda run: uri.remove_file(f"{run.url}/identity.json"),
        lambda run: uri.remove_file(f"{run.url}/config.json"),
        lambda run: uri.remove_file(f"{run.url}/mixtures/00002.json"),
        lambda run: uri.write_bytes(f"{run.url}/summary.json", b"not JSON"),
        lambda run: run.finish({"steps": "many", "tokens_seen": 1}),
        lambda run: run.write_metrics(0, [{"step": 2, "time": 1.0}]),
    ],
)
def test_a_damaged_run_is_named_with_the_reason_and_the_others_are_listed(tmp_path: Path, break_it: Any) -> None:
    root = str(tmp_path)
    make_run(root, "sound")
    break_it(make_run(root, "broken"))
    found = by_name(root)
    assert found["sound"].state == "complete"
    assert found["broken"].state == "damaged"
    assert str(found["broken"].reason).startswith(f"{root}/runs/broken")
    assert found["broken"].bytes > 0
    assert not found["broken"].ancestry


def test_an_ancestry_that_bites_its_tail_ends(tmp_path: Path) -> None:
    make_run(str(tmp_path), "a", identity={"from": {"run": "b", "step": 1}})
    make_run(str(tmp_path), "b", identity={"from": {"run": "a", "step": 2}})
    make_run(str(tmp_path), "c", identity={"from": {"run": "../elsewhere", "step": 2}})
    found = by_name(str(tmp_path))
    assert found["a"].ancestry == ("b@1", "a@2")
    assert found["c"].ancestry == ()
