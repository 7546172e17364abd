"""`mixture.evaluation: scheduled`: the gap is measured by another flow; the training takes what there is."""

from __future__ import annotations

import json
from pathlib import Path

from resealing import content_of
from small_run import Ddk, SmallRun

SCHEDULED = ("--set", "mixture.evaluation=scheduled")


def versions_used(run: Path, step: int) -> list[int]:
    state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["state"]
    return list(state["mixture_versions"])


def record(run: Path, version: int) -> dict[str, object]:
    return content_of(run / "mixtures" / f"{version:05d}.json")


def test_an_evaluator_of_its_own_gives_the_same_equation(ddk: Ddk, small_run: SmallRun) -> None:
    run = small_run.root / "runs" / "apart"
    train = ("train", small_run.config, "--run", "apart", *SCHEDULED)
    ddk.kill_when((run / "checkpoints" / "step-00000002" / "state.json").exists, *train)
    for path in sorted((run / "checkpoints").iterdir())[1:]:  # what it did before the kill reached it
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert not (run / "mixtures" / "00001.json").exists(), "the training measures nothing between intervals"

    for _ in range(2):  # twice: the second changes nothing
        evaluated = ddk("gap", small_run.config, "--run", "apart", *SCHEDULED)
        assert evaluated.code == 0, evaluated.err
        assert "version 1 at step 2" in evaluated.out
    inline = record(small_run.run, 1)
    assert record(run, 1) == inline, "Eq. 2, whoever measures"

    done = ddk(*train)
    assert done.code == 0, done.err
    assert "step 2 continues with mixture version 1, measured at step 2" in done.err
    assert "step 4 continues with mixture version 1, measured at step 2" in done.err, "a missing one stops nothing"
    assert versions_used(run, 6) == [0, 1, 1]
    assert record(run, 2)["step"] == 6, "the end is always measured"
    assert len(list((run / "mixtures").iterdir())) == 3
