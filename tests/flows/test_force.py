"""`--force`: made again beside what is there, which stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from resealing import content_of
from small_run import DOMAINS, Ddk, SmallRun, files_below, write_config


def test_made_again_beside_and_never_over(small_run: SmallRun, ddk: Ddk, tmp_path: Path) -> None:
    config, root = write_config(tmp_path), tmp_path / "root"
    shutil.copytree(small_run.root, root)
    before = files_below(root)

    packed = ddk("pack", config, "--force")
    assert packed.code == 0, packed.err
    for domain in DOMAINS:
        first, again = sorted(root.glob(f"blocks/*/{domain}.zarr"))
        assert again.parent.name == f"{first.parent.name}.2"
        ours, theirs = files_below(again), files_below(first)
        unsaid = {"manifest.json": b"", "copy/manifest.json": b""}  # how long packing took
        assert {**ours, **unsaid} == {**theirs, **unsaid}
        assert str(again) in packed.out
    cached = ddk("cache", config)
    assert cached.code == 0, cached.err
    assert cached.out.count(": 0 shards written") == len(DOMAINS), "the same blocks, so the same targets"

    refused = ddk("train", config)
    assert refused.code == 2, "its stores are others now, and the run is what it is"
    assert "run 'small'" in refused.err
    trained = ddk("train", config, "--force")
    assert trained.code == 0, trained.err
    assert "the new run is called 'small.2'" in trained.err
    assert f"{root}/runs/small.2/report/index.html" in trained.out
    again, first = files_below(root / "runs" / "small.2"), files_below(root / "runs" / "small")
    assert again["student/model.safetensors"] == first["student/model.safetensors"]
    ours, theirs = (content_of(root / "runs" / run / "mixtures" / "00003.json") for run in ("small.2", "small"))
    assert ours == theirs
    after = files_below(root)
    assert {name: after[name] for name in before} == before
