"""Trackers of a real training, killed in its midst: each has every step and every measurement once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resealing import content_of
from small_run import Ddk, SmallRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.runs.folder import RunFolder


def tensorboard(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def steps(found: EventAccumulator, name: str) -> list[int]:
    return [event.step for event in found.Scalars(name)]


def test_a_run_has_tensorboard_files_by_itself(small_run: SmallRun) -> None:
    found = tensorboard(small_run.run)
    rows = RunFolder(str(small_run.root), "small").metrics()
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in losses] == pytest.approx([row["ce"] + 0.2 * row["kl"] for row in rows])
    times = [event.wall_time for event in losses]
    assert times == sorted(times)
    assert times == [row["time"] for row in rows]
    assert times[-1] - times[0] >= sum(row["seconds"] for row in rows[1:])
    assert steps(found, "gap/math/ratio") == [0, 2, 4, 6]
    assert not (small_run.run / "wandb").exists(), "nothing else unless it is asked for"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::sqlalchemy.exc.SADeprecationWarning")
def test_a_killed_training_goes_on_in_the_same_run_of_every_tracker(
    small_run: SmallRun, ddk: Ddk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    sets = ("tracking.wandb_project=p", "tracking.mlflow_experiment=e", f"tracking.mlflow_uri={uri}")
    train = ("train", small_run.config, "--run", "tracked", *(part for one in sets for part in ("--set", one)))
    run = small_run.root / "runs" / "tracked"
    ddk.kill_when((run / "mixtures" / "00001.json").exists, *train)
    done = ddk.process(*train, "--set", "tracking.wandb_entity=team")  # no matter to the student: the run goes on
    assert done.code == 0, done.err
    assert "resumed from the checkpoint" in done.err
    assert "tracking: run " in done.err

    found = tensorboard(run)
    assert steps(found, "train/ce") == [1, 2, 3, 4, 5, 6]
    assert steps(found, "mixture/code") == [0, 2, 4, 6]

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["train.learning_rate"] == "0.001"
    history = client.get_metric_history(tracked.info.run_id, "train/ce")
    assert sorted((m.step, m.value) for m in history) == [
        (row["step"], row["ce"]) for row in RunFolder(str(small_run.root), "tracked").metrics()
    ]
    assert len(client.get_metric_history(tracked.info.run_id, "gap/zh_books/student_ppl")) == 4

    # Offline, what the client had not written when it was killed is logged again, so that nothing is missing.
    rows = [row for folder in sorted((run / "wandb").glob("offline-run-*")) for row in wandb_rows(folder)]
    assert sorted({row["optimizer_step"] for row in rows if "train/ce" in row}) == [1, 2, 3, 4, 5, 6]
    assert sorted({row["optimizer_step"] for row in rows if "mixture/code" in row}) == [0, 2, 4, 6]

    # No tracker changes the student: the same run without any has the same mixture in the end.
    ours, theirs = (content_of(folder / "mixtures" / "00003.json") for folder in (run, small_run.run))
    assert ours == theirs


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    call = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]
