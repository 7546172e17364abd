"""What a run really cost, of runs and stores that were made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_runs import make_run

from storage.files import uri
from storage.fingerprint import fingerprint
from storage.runs.overview import times_of
from storage.stores.manifest import StoreWriter
from tasks.reporting.costs import cost_lines, costs_of

DIMS = {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4, "k": 3}


def capture(root: str, seconds: list[float | None]) -> str:
    """A store of targets with a shard of 4 blocks for each of `seconds`; returns its folder."""
    inputs = {"blocks": "0" * 16, "seconds": seconds}
    writer = StoreWriter(f"{root}/targets/{fingerprint(inputs)}/math.zarr", "targets", inputs, DIMS)
    for shard, took in enumerate(seconds):
        arrays = {
            "ids": np.ones((4, 6, 3), np.int32),
            "logprobs": np.zeros((4, 6, 3), np.float32),
            "tail_mass": np.zeros((4, 6), np.float32),
            "true_logprobs": np.zeros((4, 6), np.float32),
        }
        writer.write_shard("train", shard, arrays, {} if took is None else {"seconds": took})
    writer.finish({"device": "CPU, 2 cores", "seconds": 99.0})
    return fingerprint(inputs)


def test_time_of_the_steps_of_training_as_a_whole_and_of_the_capture(tmp_path: Path) -> None:
    root = str(tmp_path)
    stores = {"math": {"targets": capture(root, [1.5, 2.5]), "blocks": "0" * 16}}
    config = {"train": {"steps": 8, "batch_size": 10}, "packing": {"seq_len": 10}}
    run = make_run(root, "first", stores=stores, config=config, finished=False)
    found = costs_of(run)
    # 4 steps of 100 tokens: 2 s each by themselves, 3 s with what is between them.
    assert (found["training_seconds"], found["wall_seconds"], found["tokens_per_second"]) == (8.0, 12.0, 50.0)
    assert found["planned_tokens"] == 8 * 10 * 10
    taken = found["capture"]
    assert (taken["seconds"], taken["positions"], taken["tokens_per_second"]) == (4.0, 48, 12.0)
    size = sum(path.stat().st_size for path in (tmp_path / "targets").rglob("c/*/*/*") if path.is_file())
    size += sum(path.stat().st_size for path in (tmp_path / "targets").rglob("c/*/0") if path.is_file())
    assert taken["bytes"] == size
    assert dict(cost_lines(found)) == {
        "Optimizer steps took": "8.0 s, 50.0 tokens/s",
        "Training in all": "12.0 s",
        "Tokens trained on": "400 of 800 planned",
        "Capture took": "4.0 s, 12.0 tokens/s on CPU, 2 cores",
        "Targets": f"{size / 1000:.1f} kB, 48 positions" if size >= 1000 else f"{size} B, 48 positions",
    }


def test_what_older_versions_did_not_record_is_left_out(tmp_path: Path) -> None:
    root = str(tmp_path)
    run = make_run(root, "old", stores={"math": {"targets": capture(root, [1.5, None])}}, finished=False)
    run.finish({"steps": 4, "tokens_seen": 400, "training_seconds": 8.0})
    found = costs_of(run)
    assert (found["wall_seconds"], found["tokens_per_second"], found["capture"]["seconds"]) == (None, 50.0, None)
    assert [what for what, _ in cost_lines(found)] == ["Optimizer steps took", "Targets"]


def test_damaged_measurements_and_stores_that_are_gone_stop_no_report(tmp_path: Path) -> None:
    run = make_run(str(tmp_path), "first", stores={"math": {"targets": "0" * 16}}, finished=False)
    uri.write_bytes(f"{run.url}/metrics/step-00000000.json", b"[]")
    found = costs_of(run)
    assert (found["training_seconds"], found["capture"]) == (None, None)
    assert cost_lines(found) == []


@pytest.mark.parametrize("rows", [[], [{"seconds": 1.0, "tokens": 3}]])
def test_times_without_a_clock(rows: list[dict[str, float]]) -> None:
    assert times_of(rows, 5.0).wall_seconds is None
