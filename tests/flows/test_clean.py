"""`ddk clean`, its flow, and what a configuration keeps; no engine and no training."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from made_runs import make_run
from small_run import Ddk, write_config

from flows.clean import clean
from flows.config import load_config
from flows.stages import flow_parameters, plan_of
from flows.unneeded import age
from storage.stores.manifest import StoreWriter

DAY = 86400.0


def aged(folder: Path, days: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def ddk(tmp_path: Path) -> Ddk:
    return Ddk(tmp_path)


def test_it_lists_and_removes_only_when_told_to(tmp_path: Path, ddk: Ddk) -> None:
    root = tmp_path / "root"
    make_run(str(root), "weekly-1")
    make_run(str(root), "other")
    aged(root, 9)
    step = root / "runs" / "other" / "checkpoints" / "step-00000002"
    called = ("clean", str(root), "--keep-runs", "weekly-*")
    for more in ((), ("--dry-run",), ("--dry-run", "--yes")):
        done = ddk(*called, *more)
        assert done.code == 0, done.err
        assert "runs/other/checkpoints/step-00000002: its run is finished, and has a later one" in done.out
        assert "weekly-1" not in done.out
        assert "would free 1 thing, " in done.out
        assert step.exists()
    assert "1 thing, " in ddk(*called, "--older", "2w").out
    assert "younger than 2w" in ddk(*called, "--older", "2w", "--yes").out
    assert step.exists()
    assert "freed " in ddk(*called, "--yes").out
    assert not step.exists()
    assert (root / "runs" / "weekly-1" / "checkpoints" / "step-00000002" / "state.json").exists()
    assert "nothing to remove" in ddk(*called, "--yes").out


@pytest.mark.parametrize("older", ["10m", "30", "d", "-1d", "1y", ""])
def test_an_age_that_is_none_or_too_short_is_refused(tmp_path: Path, ddk: Ddk, older: str) -> None:
    assert "--older" in ddk.refusal("clean", str(tmp_path), f"--older={older}")


def test_ages() -> None:
    assert [age(text) for text in ("90m", "12h", "30d", "4w")] == [5400.0, 43200.0, 30 * DAY, 28 * DAY]


def test_a_place_that_is_no_root_is_refused(tmp_path: Path, ddk: Ddk) -> None:
    assert "there is no store and no run below" in ddk.refusal("clean", str(tmp_path / "nothing"))
    assert "--older" not in ddk.refusal("clean", "https://example.org/root")


def test_a_configuration_keeps_the_stores_that_no_run_has_read_yet(tmp_path: Path, ddk: Ddk) -> None:
    path = write_config(tmp_path, domains={"code": None, "zh_books": None})
    config = load_config(path)
    store = plan_of(config)["math"]
    StoreWriter(store.blocks_url, "blocks", store.blocks_inputs, store.blocks_dims)
    make_run(config.root, "other", steps=(4,))
    aged(Path(config.root), 9)
    place = store.blocks_url.removeprefix(f"{config.root}/")
    assert place in ddk("clean", config.root).out
    assert "nothing to remove" in ddk("clean", config.root, "--config", path, "--yes").out
    # The deployment's flow: with the configuration's sections as its parameters.
    assert clean.fn(**flow_parameters(config), delete=True) == {"things": 0, "bytes": 0, "freed": 0}
    other = config.model_copy(update={"packing": config.packing.model_copy(update={"seq_len": 48})})
    found = clean.fn(**flow_parameters(other), older="8d", delete=True)
    assert found["things"] == 1
    assert found["freed"] == found["bytes"] > 0
    assert not Path(store.blocks_url).exists()
