"""Real processes: trainings on two ranks against the same ones on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_ranks
from repository import REPOSITORY

from ddk.parallel import World, join_world, leave_world, spread, synchronise, whole

SCRIPT = REPOSITORY / "tests" / "support" / "train_ranks.py"
TOLERANCE = 2e-5
CONTEXT = {
    "target": 64,
    "trained": 16,
    "block": 8,
    "max_scale": 6,
    "offset_after": 3,
    "distil": False,
    "saved_share": 0.5,
}
STEPS = 4


class Trainings:
    """What came out of trainings on one rank and on two; the two start once, for all of theirs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._on_two: list[dict[str, Any]] = []
        torch.set_num_threads(1)

    def on_one(self, name: str, **job: Any) -> None:
        train_ranks.train(self._job(name, "ddp", job), World())

    def on_two(self, name: str, parallel: str, **job: Any) -> None:
        """Done with all others when `run` is called, in this order."""
        self._on_two.append(self._job(name, parallel, job))

    def run(self) -> None:
        listed = self._folder / "jobs.json"
        listed.write_text(json.dumps(self._on_two))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{SCRIPT.parent}"}
        done = subprocess.run(
            [sys.executable, *torchrun, str(SCRIPT), str(listed)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,  # the output belongs in the message
        )
        assert done.returncode == 0, done.stderr

    def __getitem__(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self._out(name).read_text()))

    def _job(self, name: str, parallel: str, job: dict[str, Any]) -> dict[str, Any]:
        train = {"parallel": parallel, **job.pop("train", {})}
        asked = {"steps": STEPS, "out": str(self._out(name)), "train": train, **job}
        if "save" in asked:
            asked["save"] = str(self._folder / asked["save"])
        if "goes_on" in asked:
            before = asked.pop("goes_on")
            asked |= {"load": str(self._folder / before), "state_of": str(self._out(before))}
        return asked

    def _out(self, name: str) -> Path:
        return self._folder / f"{name}.json"


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    trainings = Trainings(tmp_path_factory.mktemp("trainings"))
    trainings.on_one("in pairs", train={"micro_batch_size": 2})
    trainings.on_one("first step", steps=1)
    trainings.on_one("masked", masked=True)
    trainings.on_one("context", context=CONTEXT)
    trainings.on_one("six steps", steps=6)
    trainings.on_one("one rank", steps=3, save="one rank")
    for parallel in ("ddp", "fsdp"):
        trainings.on_two(f"one by one, {parallel}", parallel, train={"micro_batch_size": 1})
        trainings.on_two(f"masked, {parallel}", parallel, masked=True, train={"micro_batch_size": 1})
        trainings.on_two(f"context, {parallel}", parallel, context=CONTEXT, train={"micro_batch_size": 1})
        trainings.on_two(parallel, parallel, steps=3, save=parallel)
    trainings.on_two("one rank, then fsdp", "fsdp", steps=3, goes_on="one rank")
    trainings.on_two("ddp, then fsdp", "fsdp", steps=3, goes_on="ddp")
    trainings.run()
    trainings.on_one("fsdp, then one rank", steps=3, goes_on="fsdp")
    return trainings


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for ours, theirs in zip(one["reports"], other["reports"], strict=True):
        for figure in ("step", "ce", "kl", "loss", "gradient_norm", "learning_rate", "tokens"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=TOLERANCE), figure
    for figure in ("perplexity", "kl"):
        assert one[figure] == pytest.approx(other[figure], rel=TOLERANCE), figure
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-4, abs=2e-3)
    assert one["state"] == other["state"]


def everything_read(result: dict[str, Any]) -> list[list[Any]]:
    return sorted(read for rank in result["reads"] for read in rank)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(trainings: Trainings, parallel: str) -> None:
    """The same batches, in halves; micro-batches and accumulation on both."""
    alone, two = trainings["in pairs"], trainings[f"one by one, {parallel}"]
    assert_same_training(alone, two)
    assert everything_read(alone) == everything_read(two)
    assert [len(rank) for rank in two["reads"]] == [8, 8]
    assert len({report["ce"] for report in alone["reports"]}) == STEPS


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_mean_is_per_token_of_all_ranks(trainings: Trainings, parallel: str) -> None:
    """Complaint 13 of peers.md. Blocks with 10% to 100% of their positions: a mean of the ranks' means would differ."""
    alone, two = trainings["masked"], trainings[f"masked, {parallel}"]
    assert_same_training(alone, two)
    assert alone["reports"][0]["ce"] != pytest.approx(trainings["first step"]["reports"][0]["ce"], rel=1e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_show_their_blocks_the_positions_that_one_would(trainings: Trainings, parallel: str) -> None:
    alone = trainings["context"]
    assert_same_training(alone, trainings[f"context, {parallel}"])
    assert alone["reports"][0]["loss"] != pytest.approx(trainings["first step"]["reports"][0]["loss"], rel=1e-3)


@pytest.mark.parametrize(("first", "then"), [("one rank", "fsdp"), ("fsdp", "one rank"), ("ddp", "fsdp")])
def test_a_checkpoint_goes_on_at_another_number_of_ranks(trainings: Trainings, first: str, then: str) -> None:
    whole_run, begun, resumed = trainings["six steps"], trainings[first], trainings[f"{first}, then {then}"]
    assert_same_training({**whole_run, "reports": whole_run["reports"][3:]}, resumed)
    assert sorted(everything_read(begun) + everything_read(resumed)) == everything_read(whole_run)


def test_alone_there_is_nothing_to_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world("cpu")
    assert world == World()
    assert world.share([1, 2, 3]) == [1, 2, 3]
    assert World(rank=1, size=3).share(range(8)) == range(1, 8, 3)
    values = torch.ones(2)
    assert world.total(values) is values
    assert (world.gather("a"), world.from_first(5)) == (["a"], 5)
    module = torch.nn.Linear(2, 2)
    assert spread(module, [], world, "fsdp", bf16=False) is module
    synchronise(module, wanted=True)
    assert whole(module.weight) is module.weight
    world.wait_for_all()
    leave_world(world)
