"""Every kind of damage is found and named, and a repair makes the damaged shards again and no others."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage.checking.verify_store import uncommit, verify
from storage.files import uri
from storage.stores.manifest import StoreWriter, read_manifest
from storage.stores.schema import Manifest
from storage.targets import open_targets

DIMS = {"seq_len": 7, "k": 3, "vocab_size": 100, "shard_blocks": 4}


def shard_of(shard: int) -> dict[str, np.ndarray[Any, Any]]:
    random_ = np.random.default_rng(shard)
    return {
        "ids": random_.integers(0, 100, (4, 7, 3)).astype(np.int32),
        "logprobs": -random_.random((4, 7, 3)).astype(np.float32),
        "tail_mass": random_.random((4, 7)).astype(np.float32),
        "true_logprobs": -random_.random((4, 7)).astype(np.float32),
    }


def write(url: str, kind: Any = "targets") -> Manifest:
    """Complete whatever is missing of four train shards and one of validation; says which were written."""
    writer = StoreWriter(url, kind, {"x": 1}, DIMS)
    written = []
    for split, count in (("train", 4), ("validation", 1)):
        for shard in sorted(set(range(count)) - set(writer.committed(split))):
            arrays = shard_of(shard) if kind == "targets" else {"tokens": np.full((4, 8), shard, dtype=np.int32)}
            writer.write_shard(split, shard, arrays)
            written.append(f"{split} {shard}")
    return writer.finish(facts={"written": written})


@pytest.fixture
def store(place: str) -> str:
    url = f"{place}/math.zarr"
    write(url)
    return url


def found(url: str, *, full: bool = True) -> list[str]:
    manifest = read_manifest(url)
    assert manifest is not None
    return [str(damage) for damage in verify(url, manifest, full=full)]


def test_a_sound_store_is_sound(store: str) -> None:
    assert found(store) == []
    assert found(store, full=False) == []


def test_any_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    url = str(tmp_path / "math.zarr")
    write(url)
    objects = [path for path in (tmp_path / "math.zarr").rglob("*") if path.is_file() and path.name != "manifest.json"]
    random_ = random.Random(0)
    for path in objects:
        content = path.read_bytes()
        for position in {0, len(content) - 1, *random_.sample(range(len(content)), 5)}:
            path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
            lines = found(url)
            assert len(lines) == 1
            assert str(path.relative_to(tmp_path / "math.zarr")) in lines[0]
        path.write_bytes(content)
    assert found(url) == []


def test_missing_truncated_and_foreign_shards_are_named(store: str) -> None:
    uri.remove_file(f"{store}/train/ids/c/1/0/0")
    shard = uri.read_bytes(f"{store}/train/tail_mass/c/2/0")
    assert shard is not None
    uri.write_bytes(f"{store}/train/tail_mass/c/2/0", shard[:-1])
    # Intact in itself, and of another place: only the digest tells.
    foreign = uri.read_bytes(f"{store}/train/logprobs/c/0/0/0")
    assert foreign is not None
    uri.write_bytes(f"{store}/train/logprobs/c/3/0/0", foreign)
    assert found(store) == [
        "train shard 1, train/ids/c/1/0/0: missing",
        f"train shard 2, train/tail_mass/c/2/0: {len(shard) - 1:,} bytes instead of {len(shard):,}",
        next(line for line in found(store) if line.startswith("train shard 3, train/logprobs/c/3/0/0: ")),
    ]
    assert "train shard 1, train/ids/c/1/0/0: missing" in found(store, full=False)


def test_a_repair_makes_the_damaged_shards_again_and_no_others(store: str) -> None:
    before = read_manifest(store)
    assert before is not None
    uri.write_bytes(f"{store}/train/ids/c/2/0/0", b"rubbish")
    uri.write_bytes(f"{store}/validation/zarr.json", b"{}")
    damages = verify(store, before, full=True)
    assert uncommit(store, before, damages) == {"train": [2]}
    unfinished = read_manifest(store)
    assert unfinished is not None
    assert not unfinished.complete
    after = write(store)
    assert after.facts == {"written": ["train 2"]}
    assert after.splits == before.splits
    assert found(store) == []
    np.testing.assert_array_equal(open_targets(store).read(range(8, 12)).ids, shard_of(2)["ids"])


def test_blocks_are_made_again_from_the_first_damaged_shard_on(tmp_path: Path) -> None:
    """Each shard says where in the corpus the next one begins."""
    url = str(tmp_path / "math.zarr")
    manifest = write(url, "blocks")
    uri.write_bytes(f"{url}/train/tokens/c/1/0", b"rubbish")
    assert uncommit(url, manifest, verify(url, manifest, full=True)) == {"train": [1, 2, 3]}
    assert write(url, "blocks").facts == {"written": ["train 1", "train 2", "train 3"]}
    assert found(url) == []


@pytest.mark.parametrize("step", range(1, 7))
def test_a_repair_killed_anywhere_loses_no_good_shard(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "math.zarr")
    manifest = write(url)
    uri.write_bytes(f"{url}/train/ids/c/2/0/0", b"rubbish")
    damages = verify(url, manifest, full=True)
    original, calls = uri.write_bytes, 0

    def dying(place: str, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise KeyboardInterrupt
        original(place, content)

    monkeypatch.setattr(uri, "write_bytes", dying)
    with contextlib.suppress(KeyboardInterrupt):
        uncommit(url, manifest, damages)
    monkeypatch.undo()
    now = read_manifest(url)
    assert now is not None
    if now.complete:
        uncommit(url, now, verify(url, now, full=True))
    assert write(url).facts == {"written": ["train 2"]}
    assert found(url) == []
