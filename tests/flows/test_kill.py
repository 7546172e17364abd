"""kill -9 of the real process, in the middle of capture and of training: the run ends with the same bytes."""

from __future__ import annotations

from pathlib import Path

import psutil
from small_run import Ddk, SmallRun, files_below, write_config


def test_killed_in_capture_and_in_training_ends_with_the_same_bytes(
    small_run: SmallRun, ddk: Ddk, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    root = tmp_path / "root"
    run = root / "runs" / "small"

    def commits() -> list[Path]:
        return list(root.glob("targets/*/*.zarr/commits/*.json"))

    started = ddk.kill_when(lambda: len(commits()) >= 3, "distill", config)
    assert any("VLLM" in process.name() for process in started if process.is_running()), "the engine was at work"
    assert not psutil.wait_procs(started, timeout=20)[1], "nothing outlives the front end"
    survived = {
        path: path.stat().st_mtime_ns for path in root.glob("targets/*/*.zarr/train/*/c/**/*") if path.is_file()
    }
    committed = {path.name for path in commits()}
    assert committed, "the kill came in the middle of a capture"
    assert not run.exists()

    ddk.kill_when((run / "checkpoints" / "step-00000002" / "state.json").exists, "distill", config)
    rewritten = [
        path
        for path, mtime in survived.items()
        if f"train-{int(path.relative_to(path.parents[path.parts[::-1].index('c')]).parts[1]):08d}.json" in committed
        and path.stat().st_mtime_ns != mtime
    ]
    assert rewritten == [], "a committed shard is never captured again"
    assert not (run / "summary.json").exists()

    ddk.kill_when((run / "mixtures" / "00002.json").exists, "train", config)
    done = ddk("distill", config)
    assert done.code == 0, done.err
    assert "resumed from the checkpoint at step" in done.err

    for store in ("blocks", "targets"):
        ours, theirs = files_below(root / store), files_below(small_run.root / store)
        # Manifests of complete stores record how long the writing took; all else is equal, byte for byte.
        assert _without(ours, "manifest.json") == _without(theirs, "manifest.json")
        assert ours.keys() == theirs.keys()
    for part in ("student", "mixtures", "checkpoints"):
        assert files_below(run / part).keys() == files_below(small_run.run / part).keys()
        assert _without(files_below(run / part), "README.md") == _without(
            files_below(small_run.run / part), "README.md"
        ), part


def _without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if not path.endswith(name)}
