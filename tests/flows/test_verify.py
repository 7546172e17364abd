"""`ddk verify` over a real root: damage named, repaired, and only the damaged shard captured again."""

from __future__ import annotations

import shutil
from pathlib import Path

from small_run import Ddk, SmallRun, files_below


def test_a_flipped_byte_is_named_repaired_and_recaptured_alone(small_run: SmallRun, ddk: Ddk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_run.root, root)
    before = files_below(root / "targets")
    assert ddk("verify", str(root)).code == 0

    victim = next(root.glob("targets/*/math.zarr")) / "train" / "logprobs" / "c" / "2" / "0" / "0"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found = ddk("verify", str(root))
    assert found.code == 1
    assert "math.zarr: train shard 2, train/logprobs/c/2/0/0: its bytes are not those that were written" in found.out
    # Training on it is refused, and says how to go on.
    refused = ddk("train", small_run.config, "--root", str(root), "--run", "other", "--set", "train.steps=40")
    assert refused.code == 2
    assert "--repair` and then `ddk cache` make it anew" in refused.err

    repaired = ddk("verify", str(root), "--repair")
    assert repaired.code == 1
    assert "taken out: train 2; `ddk cache CONFIG` makes them again, and no others" in repaired.out
    again = ddk("cache", small_run.config, "--root", str(root))
    assert again.code == 0, again.err
    assert "math: 1 shards written" in again.out
    assert "code: 0 shards written" in again.out
    after = files_below(root / "targets")
    assert {path: c for path, c in after.items() if not path.endswith("manifest.json")} == {
        path: c for path, c in before.items() if not path.endswith("manifest.json")
    }
    assert ddk("verify", str(root)).code == 0
