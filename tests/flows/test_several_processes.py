"""`ddk train` on two processes, and on two machines (both this one), against the small run's one process."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from resealing import content_of
from safetensors.torch import load_file
from small_run import Ddk, SmallRun

from ddk.errors import LostPartError
from storage.runs.folder import RunFolder
from tasks.training import processes as train_processes

TOLERANCE = 1e-4
KILLED = """Failures:
[1]:
  exitcode  : -15 (pid: 17235)  (SIGTERM)
  traceback : Signal 15 (SIGTERM) received by PID 17235
Root Cause (first observed failure):
[0]:
  traceback : Signal 9 (SIGKILL) received by PID 17236
"""
"""As torchrun writes it."""


def mixtures(run: Path) -> list[dict[str, Any]]:
    return [content_of(path) for path in sorted((run / "mixtures").iterdir())]


def losses(run: Path) -> list[float]:
    return [row["ce"] for row in RunFolder(str(run.parents[1]), run.name).metrics()]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=TOLERANCE)
    for ours, theirs in zip(mixtures(one), mixtures(other), strict=True):
        assert ours["blocks_drawn"] == theirs["blocks_drawn"]
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], rel=1e-3)
        for domain, both in ours["perplexities"].items():
            assert both == pytest.approx(theirs["perplexities"][domain], rel=1e-3)
    weights, expected = (load_file(run / "student" / "model.safetensors") for run in (one, other))
    for name, tensor in expected.items():
        # bfloat16 keeps 8 bits: a difference in rounding before it may be one in the last of them.
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=2e-2, atol=2e-3, msg=name)


def test_killed_on_two_processes_and_resumed_on_one(ddk: Ddk, small_run: SmallRun) -> None:
    """The leading process dies with -9 after the first checkpoint: its workers end too, and what is there goes on."""
    run = small_run.root / "runs" / "two"
    two = ("train", small_run.config, "--run", "two", "--set", "train.processes=2", "--set", "train.parallel=fsdp")
    checkpoint = run / "checkpoints" / "step-00000002" / "state.json"
    started = ddk.kill_when(checkpoint.exists, *two)
    assert len(started) >= 3, "torchrun and its workers"
    assert not psutil.wait_procs(started, timeout=20)[1], "nothing outlives the leading process"
    parts = sorted(path.name for path in checkpoint.parent.iterdir())
    assert parts == ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"]

    done = ddk("train", small_run.config, "--run", "two")
    assert done.code == 0, done.err
    assert "resumed from the checkpoint at step" in done.err
    assert_same_run(run, small_run.run)


def test_two_machines(ddk: Ddk, small_run: SmallRun) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ("--run", "machines", "--set", "train.nodes=2", "--set", f"train.rendezvous=127.0.0.1:{port}")
    settings += ("--set", "train.parallel=fsdp")
    other = ddk.start("join", small_run.config, "--node-rank", "1", *settings)
    try:
        done = ddk("train", small_run.config, *settings)
        assert done.code == 0, done.err
        assert "1 processes on 2 machine(s), fsdp" in done.err
        deadline = time.monotonic() + 30
        while other.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        _, err = other.communicate(timeout=5)
        assert other.returncode == 0, err
    finally:
        other.kill()
    assert_same_run(small_run.root / "runs" / "machines", small_run.run)


def test_what_does_not_fit_is_said(ddk: Ddk, small_run: SmallRun) -> None:
    refused = ddk("train", small_run.config, "--run", "three", "--set", "train.processes=3")
    assert refused.code == 2
    assert "batch_size 8 cannot be shared equally by 3 processes" in refused.err
    with pytest.raises(LostPartError, match=r"^a training process was killed by signal 9; probably .* out of memory"):
        raise train_processes._lost(1, KILLED.splitlines())
    ended = r"(?s)^the training processes ended \(exit code 1\).*Their last lines:\n.*Signal 15"
    with pytest.raises(LostPartError, match=ended):
        raise train_processes._lost(1, KILLED.replace("Signal 9 (SIGKILL) received by PID 17236", "").splitlines())
    nowhere = ddk("join", small_run.config, "--node-rank", "1")
    assert nowhere.code == 2
    assert "--node-rank is 1 and train.nodes 1" in nowhere.err
