"""`ddk plan`: what is complete, unfinished, stale or missing, and why; nothing runs, nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resealing import resealed
from small_run import DOMAINS, SmallRun, files_below, small_config, write_config

from flows.config import Config, load_config
from flows.stores.stage_states import plan_stages
from flows.stores.stages_shown import StagePlan, render


def planned(config: Config) -> dict[str, StagePlan]:
    return {f"{one.stage} {one.of}": one for one in plan_stages(config)}


def states(config: Config) -> dict[str, str]:
    return {name: one.state for name, one in planned(config).items()}


def test_a_complete_run_has_nothing_to_do(small_run: SmallRun) -> None:
    before = files_below(small_run.root)
    config = load_config(small_run.config)
    assert set(states(config).values()) == {"complete"}
    assert list(states(config)) == [f"{s} {d}" for s in ("pack", "cache") for d in sorted(DOMAINS)] + ["train small"]
    lines = list(render(plan_stages(config)))
    assert lines[-1] == "nothing to do"
    assert "40 train + 6 validation blocks" in lines[0]
    assert files_below(small_run.root) == before


@pytest.mark.parametrize(
    ("override", "stale", "why"),
    [
        ("teacher.k=8", [f"cache {domain}" for domain in DOMAINS], "teacher.k: 16 → 8"),
        ("domains.math.max_train_blocks=20", ["pack math"], "corpus.max_train_blocks: 40 → 20"),
        ("domains.math.max_train_blocks=20", ["cache math"], "its blocks are others"),
        ("loss.gamma=0.5", ["train small"], "loss.gamma: 0.2 → 0.5; give it another name"),
    ],
)
def test_what_a_change_makes_stale(small_run: SmallRun, override: str, stale: list[str], why: str) -> None:
    found = planned(load_config(small_run.config, [override]))
    for name in stale:
        assert found[name].state == "stale"
        assert why in found[name].why
    touched = {"teacher.k=8": {"cache", "train"}, "loss.gamma=0.5": {"train"}}.get(override)
    for name, one in found.items():
        affected = one.stage in touched if touched else one.of in ("math", "small")
        assert (one.state != "complete") == affected, name
    assert "to do: " in list(render(list(found.values())))[-1]


def test_a_changed_file_is_named(small_run: SmallRun, tmp_path: Path) -> None:
    config: dict[str, Any] = small_config()
    source = Path(config["domains"]["math"]["train"])
    copy = tmp_path / source.name
    copy.write_bytes(source.read_bytes() + source.read_bytes())  # gzip members may follow one another
    path = write_config(
        tmp_path, root=str(small_run.root), domains={"math": {**config["domains"]["math"], "train": str(copy)}}
    )
    found = planned(load_config(path))
    assert found["pack math"].state == "stale"
    assert found["pack math"].why == f"corpus.train: {source.name} changed"
    assert found["pack code"].state == "complete"


def test_missing_and_unfinished(small_run: SmallRun, tmp_path: Path) -> None:
    assert set(states(load_config(small_run.config, root=str(tmp_path / "empty"))).values()) == {"missing"}
    assert states(load_config(small_run.config, run="other"))["train other"] == "missing"
    root = tmp_path / "root"
    for path, content in files_below(small_run.root).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "runs" / "small" / "summary.json").unlink()
    store = next((root / "targets").glob("*/math.zarr"))
    manifest = (store / "manifest.json").read_text()
    resealed(str(store / "manifest.json"), complete=False, splits={})
    found = planned(load_config(small_run.config, root=str(root)))
    assert found["cache math"].state == "unfinished"
    (store / "manifest.json").write_text(manifest)
    found = planned(load_config(small_run.config, root=str(root)))
    assert (found["train small"].state, found["train small"].why) == ("unfinished", "step 6 of 6")
