"""Real processes: a training on two ranks against the same one on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_ranks

from ddk.parallel import World, join_world, leave_world, spread, synchronise, whole

SCRIPT = Path(__file__).parents[1] / "support" / "train_ranks.py"
ROOT = str(Path(__file__).parents[2])
TOLERANCE = 2e-5
Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def run(ranks: int, steps: int = 4, parallel: str = "ddp", **job: Any) -> dict[str, Any]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.json"
        changes = {"parallel": parallel, **job.pop("train", {})}
        asked = {"steps": steps, "out": str(out), "train": changes, **job}
        if ranks == 1:
            train_ranks.main(asked)
            return dict(json.loads(out.read_text()))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, str(SCRIPT), json.dumps(asked)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{SCRIPT.parent}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(out.read_text()))

    return run


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for ours, theirs in zip(one["reports"], other["reports"], strict=True):
        for figure in ("step", "ce", "kl", "gradient_norm", "learning_rate", "tokens"):
            assert ours[figure] == pytest.approx(theirs[figure], rel=TOLERANCE), figure
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=TOLERANCE)
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-4, abs=2e-3)
    assert one["state"] == other["state"]


def everything_read(result: dict[str, Any]) -> list[list[Any]]:
    return sorted(read for rank in result["reads"] for read in rank)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(train: Train, parallel: str) -> None:
    """The same batches, in halves; micro-batches and accumulation on both."""
    alone = train(1, train={"micro_batch_size": 2})
    two = train(2, parallel=parallel, train={"micro_batch_size": 1})
    assert_same_training(alone, two)
    assert everything_read(alone) == everything_read(two)
    assert [len(rank) for rank in two["reads"]] == [8, 8]
    assert len({report["ce"] for report in alone["reports"]}) == 4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_mean_is_per_token_of_all_ranks(train: Train, parallel: str) -> None:
    """Complaint 13 of peers.md. Blocks with 10% to 100% of their positions: a mean of the ranks' means would differ."""
    alone, two = train(1, masked=True), train(2, parallel=parallel, masked=True, train={"micro_batch_size": 1})
    assert_same_training(alone, two)
    assert alone["reports"][0]["ce"] != pytest.approx(train(1, 1)["reports"][0]["ce"], rel=1e-3)


@pytest.mark.parametrize(
    ("first", "then"), [((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (1, "ddp")), ((2, "ddp"), (2, "fsdp"))]
)
def test_a_checkpoint_goes_on_at_another_number_of_ranks(
    train: Train, tmp_path: Path, first: tuple[int, str], then: tuple[int, str]
) -> None:
    whole_run = train(1, 6)
    folder = str(tmp_path / "checkpoint")
    begun = train(first[0], 3, first[1], save=folder)
    resumed = train(then[0], 3, then[1], load=folder, state=begun["state"])
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
