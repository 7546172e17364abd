"""`ddk verify` over a real root: damage named, repaired, and only the damaged shard captured again."""

from __future__ import annotations

import shutil
from pathlib import Path

from small_run import Ddk, SmallRun, files_below

from storage.stores.manifest import require_complete, write_manifest


def test_a_flipped_byte_is_named_repaired_and_recaptured_alone(small_run: SmallRun, ddk: Ddk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_run.root, root)
    before = files_below(root / "targets")
    assert ddk("verify", str(root)).code == 0

    victim = next(root.glob("targets/*/math.zarr")) / "train" / "codes" / "c" / "2" / "0"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    found = ddk("verify", str(root))
    assert found.code == 1
    assert "math.zarr: train shard 2, train/codes/c/2/0: its bytes are not those that were written" in found.out
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


def test_the_live_teacher_recognises_its_own_targets_and_no_others(
    small_run: SmallRun, ddk: Ddk, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_run.root, root)
    math, code = (next(root.glob(f"targets/*/{domain}.zarr")) for domain in ("math", "code"))
    called = ("--replay", small_run.config, "--root", str(root), "--blocks", "46")

    # A shard of another domain, with its sizes and digests: every byte is what the manifest says, and all is wrong.
    ours, theirs = (require_complete(str(store), "targets") for store in (math, code))
    shards = list(ours.splits["train"].shards)
    shards[1] = shards[1].model_copy(update={"objects": theirs.splits["train"].shards[1].objects})
    for name in shards[1].objects:
        source = next(path for path in (code / "train" / name / "c" / "1").rglob("*") if path.is_file())
        shutil.copy(source, math / source.relative_to(code))
    train = ours.splits["train"].model_copy(update={"shards": tuple(shards)})
    write_manifest(str(math), ours.model_copy(update={"splits": {**ours.splits, "train": train}}))
    assert ddk("verify", str(math)).code == 0
    wrong = ddk("verify", str(math), *called, "--repair")
    assert wrong.code == 1
    assert "38 of 46 blocks match what the teacher predicts now" in wrong.out
    assert wrong.out.count("WRONG train block") == 8, "the blocks of shard 1, and no others"
    assert "taken out: train 1;" in wrong.out

    other = ddk("verify", str(math), *called, "--set", "teacher.k=8")
    assert other.code == 2
    assert "none of the configuration's captured stores lies at" in other.err
