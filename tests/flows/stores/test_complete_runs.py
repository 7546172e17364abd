"""A run that is complete is told at once, without a model library; whatever has changed since is planned anew."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import SmallRun, small_config, write_config

from flows.config import Config, load_config
from flows.stores.stage_states import plan_stages
from flows.stores.stages_shown import complete_stages
from storage.stores.generations import generation
from tasks.planning.complete_runs import find_complete

AT_ONCE = """
import os, sys
from flows.__main__ import main
sys.argv = ["ddk", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "prefect", "vllm"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture
def complete(small_run: SmallRun, tmp_path: Path) -> Config:
    """Of the small run, copied, with models and a corpus file that a test may change."""
    root = tmp_path / "root"
    shutil.copytree(small_run.root, root)
    config: dict[str, Any] = small_config()
    for name in ("teacher", "student"):
        shutil.copytree(config[name]["model"], tmp_path / name)
        config[name] = {**config[name], "model": str(tmp_path / name)}
    corpus = Path(config["domains"]["math"]["train"])
    (tmp_path / corpus.name).write_bytes(corpus.read_bytes())
    domains = {**config["domains"], "math": {**config["domains"]["math"], "train": str(tmp_path / corpus.name)}}
    path = write_config(tmp_path, root=str(root), teacher=config["teacher"], student=config["student"], domains=domains)
    loaded = load_config(path)
    assert complete_stages(loaded) is None, "made by another configuration: other paths"
    assert {one.state for one in plan_stages(loaded)} == {"complete"}
    return loaded


def test_what_is_told_at_once_is_what_a_plan_says(complete: Config) -> None:
    assert complete_stages(complete) == plan_stages(complete)


@pytest.mark.parametrize("command", ["distill", "plan"])
def test_no_model_library_is_imported(small_run: SmallRun, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, command, small_run.config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout if command == "plan" else "train small: complete already" in done.stderr


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_looking_into_stores_imports_none_either(small_run: SmallRun, command: str) -> None:
    place = small_run.root / "runs" / "small"
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, command, str(place)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\n")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _first(root: Path, pattern: str) -> Path:
    return next(root.glob(pattern))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight of the student": lambda place: _flip(place / "student" / "model.safetensors"),
    "the teacher's tokenizer": lambda place: _append(place / "teacher" / "tokenizer.json"),
    "a config": lambda place: _append(place / "student" / "config.json"),
    "a corpus": lambda place: _append(_first(place, "*.jsonl*")),
    "the memory, damaged": lambda place: _flip(place / "root" / "complete.json"),
    "the memory, gone": lambda place: (place / "root" / "complete.json").unlink(),
    "a store, gone": lambda place: shutil.rmtree(_first(place / "root", "targets/*/math.zarr")),
    "a manifest, damaged": lambda place: _flip(_first(place / "root", "blocks/*/math.zarr/manifest.json")),
    "the final student": lambda place: _flip(place / "root/runs/small/student/model.safetensors"),
    "the summary": lambda place: (place / "root/runs/small/summary.json").unlink(),
    "the configuration": lambda place: _flip(place / "root/runs/small/config.json"),
    "the report": lambda place: (place / "root/runs/small/report/index.html").unlink(),
    "a store made again": lambda place: _made_again(_first(place / "root", "targets/*/math.zarr")),
}


def _made_again(store: Path) -> None:
    other = Path(generation(str(store), 2))
    other.parent.mkdir()
    shutil.copytree(store, other)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_has_changed_is_looked_at(complete: Config, change: Callable[[Path], object]) -> None:
    assert find_complete(complete.sources) is not None
    change(Path(complete.root).parent)
    assert find_complete(complete.sources) is None


@pytest.mark.parametrize(
    "override", ["teacher.k=8", "loss.gamma=0.5", "train.steps=4", "domains.math.max_train_blocks=9"]
)
def test_another_configuration_is_planned(small_run: SmallRun, override: str) -> None:
    assert find_complete(load_config(small_run.config).sources) is not None
    assert find_complete(load_config(small_run.config, [override]).sources) is None


def test_what_files_alone_cannot_tell_is_planned(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub may be another one tomorrow; a server's is out of sight."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    sources = load_config(small_run.config).sources
    assert sources.digest() is not None
    others = {"model": "someone/model"}, {"source": "server", "server_url": "http://localhost:8000/v1"}
    for other in others:
        teacher = sources.teacher.model_copy(update=other)
        assert type(sources)(**{**_fields(sources), "teacher": teacher}).digest() is None


def _fields(sources: Any) -> dict[str, Any]:
    return {name: getattr(sources, name) for name in type(sources).__slots__}
