from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ddk.values import SparseTargets
from storage.blocks import open_blocks
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.targets import open_targets, teacher_perplexity

DIMS = {"seq_len": 6, "vocab_size": 152_064, "shard_blocks": 4, "k": 3}
BLOCK_DIMS = {name: size for name, size in DIMS.items() if name != "k"}
ARRAYS = ("ids", "logprobs", "tail_mass", "true_logprobs")


@pytest.fixture(autouse=True)
def empty_shard_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDK_SHARD_CACHE_DIR", str(tmp_path / "shard-cache"))


@pytest.fixture
def content(maker):
    """Eleven train blocks (shards of 4, 4 and 3) and five validation blocks."""
    return {"train": maker.arrays("targets", DIMS, 11), "validation": maker.arrays("targets", DIMS, 5, seed=1)}


@pytest.fixture
def store(place: str, maker, content) -> str:
    maker.write(place, "targets", DIMS, content)
    return place


@pytest.fixture
def local_store(tmp_path: Path, maker, content) -> str:
    maker.write(f"{tmp_path}/a.zarr", "targets", DIMS, content)
    return f"{tmp_path}/a.zarr"


def by_name(targets: SparseTargets) -> dict[str, np.ndarray]:
    return {name: getattr(targets, name) for name in ARRAYS}


def check_equal(targets: SparseTargets, arrays, indices) -> None:
    for name, data in by_name(targets).items():
        np.testing.assert_array_equal(data, arrays[name][indices], strict=True)


# Reading


def test_targets_are_read_as_they_were_written(store: str, content) -> None:
    rng = np.random.default_rng(7)
    for split, arrays in content.items():
        view, blocks = open_targets(store, split), len(arrays["ids"])
        assert (len(view), view.k, view.vocab_size, view.seq_len) == (blocks, 3, 152_064, 6)
        for indices in (
            np.arange(blocks),
            np.arange(2, blocks - 1),
            np.arange(blocks)[::-1],
            np.array([3, 3, 0, 4, 0, 3]),
            np.array([blocks - 1]),
            np.array([0, 1, 2, 4]),
            *(rng.integers(0, blocks, size) for size in (5, 30)),
        ):
            check_equal(view.read(indices), arrays, indices)
            np.testing.assert_array_equal(view.true_logprobs(indices), arrays["true_logprobs"][indices], strict=True)
        np.testing.assert_array_equal(view.true_logprobs(), arrays["true_logprobs"], strict=True)


def test_blocks_are_read_as_they_were_written(place: str, maker) -> None:
    content = {"train": maker.arrays("blocks", DIMS, 9), "validation": maker.arrays("blocks", DIMS, 1, seed=1)}
    maker.write(place, "blocks", BLOCK_DIMS, content)
    for split, arrays in content.items():
        view, tokens = open_blocks(place, split), arrays["tokens"]
        assert (len(view), view.vocab_size, view.seq_len, view.split) == (len(tokens), 152_064, 6, split)
        for indices in (range(len(view)), [0], [len(view) - 1, 0, 0, len(view) - 1], np.arange(len(view))[::-1]):
            np.testing.assert_array_equal(view.read(indices), tokens[np.asarray(indices)], strict=True)


def test_sequences_of_any_kind_are_indices(local_store: str, content) -> None:
    view = open_targets(local_store)
    for indices in ([4, 2], (4, 2), range(4, 1, -2), np.array([4, 2], np.int32)):
        check_equal(view.read(indices), content["train"], [4, 2])
    none = view.read([])
    assert (len(none), none.ids.shape, none.tail_mass.shape) == (0, (0, 6, 3), (0, 6))


@pytest.mark.parametrize("indices", [[11], [-1], [0, 11], [-12], range(8, 12)])
def test_blocks_beyond_the_end_are_refused(local_store: str, indices) -> None:
    with pytest.raises(IndexError, match=rf"of {re.escape(local_store)} \(train\), of 11"):
        open_targets(local_store).read(indices)


def test_ids_of_large_vocabularies_survive(place: str, maker) -> None:
    ids = np.array([131_071, 131_072, 131_073, 143_999, 150_000, 152_063], np.int32).reshape(1, 6, 1)
    dims = {**DIMS, "k": 1}
    arrays = {**maker.arrays("targets", dims, 1), "ids": ids}
    maker.write(place, "targets", dims, {"train": arrays, "validation": arrays})
    view = open_targets(place)
    assert view.k == 1
    np.testing.assert_array_equal(view.read([0, 0]).ids, np.concatenate([ids, ids]), strict=True)


def test_a_probability_of_zero_and_tiny_numbers_survive(local_store: str, maker, tmp_path: Path) -> None:
    arrays = maker.arrays("targets", DIMS, 1)
    arrays["logprobs"][0, 0] = [-0.0, -1e-38, -np.inf]
    arrays["tail_mass"][0, :3] = [0.0, 1e-45, 1.0]
    maker.write(f"{tmp_path}/b.zarr", "targets", DIMS, {"train": arrays, "validation": arrays})
    read = open_targets(f"{tmp_path}/b.zarr").read([0])
    for name, data in by_name(read).items():
        assert data.tobytes() == arrays[name].tobytes()


def test_teacher_perplexity_is_that_of_float64(store: str, content) -> None:
    expected = math.exp(-math.fsum(map(float, content["validation"]["true_logprobs"].ravel())) / (5 * 6))
    assert teacher_perplexity(store) == pytest.approx(expected, rel=1e-13)


# Damage


def objects_of(store: str) -> list[tuple[str, int, Path]]:
    """Name of the array, number of the shard and path of every shard object of the train split."""
    found = []
    for name in ARRAYS:
        folder = Path(store) / "train" / name / "c"
        found += [
            (name, shard, next(path for path in (folder / str(shard)).rglob("0") if path.is_file()))
            for shard in range(len(os.listdir(folder)))
        ]
    return found


def test_no_flipped_byte_is_ever_read_as_data(tmp_path: Path, maker) -> None:
    dims, rng, caught, store = {**DIMS, "shard_blocks": 2}, np.random.default_rng(3), 0, f"{tmp_path}/a.zarr"
    arrays = maker.arrays("targets", dims, 3)  # a full shard and half of one
    maker.write(store, "targets", dims, {"train": arrays, "validation": arrays})
    view = open_targets(store)
    for name, shard, path in objects_of(store):
        whole = path.read_bytes()
        # Everywhere in the object; the last 36 bytes are its index.
        positions = {*rng.integers(0, len(whole), 12).tolist(), *rng.integers(len(whole) - 36, len(whole), 12).tolist()}
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.integers(0, 8)
            path.write_bytes(damaged)
            with pytest.raises(StoreDamagedError) as error:
                view.read(range(3))
            assert f"{store}: array 'train/{name}' is damaged in shard {shard} (" in str(error.value)
            assert f"`ddk verify {store} --repair` and then `ddk cache` make it anew" in str(error.value)
            # One block alone: damaged as well, or right.
            block = int(rng.integers(0, 3))
            try:
                check_equal(view.read([block]), arrays, [block])
            except StoreDamagedError:
                assert block // 2 == shard
                caught += 1
        path.write_bytes(whole)
    assert caught > 10
    check_equal(view.read(range(3)), arrays, np.arange(3))


def test_a_flipped_byte_on_s3_is_named(s3_server: str, maker, content) -> None:
    store = f"{s3_server}/flipped"
    maker.write(store, "targets", DIMS, content)
    whole = uri.read_bytes(f"{store}/train/ids/c/1/0/0")
    view = open_targets(store)
    for position in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 64
        uri.write_bytes(f"{store}/train/ids/c/1/0/0", bytes(damaged))
        for indices in (range(11), [4, 7, 6, 5, 0]):
            with pytest.raises(StoreDamagedError, match=r"/flipped: array 'train/ids' is damaged in shard 1 \("):
                view.read(indices)
        check_equal(view.read([0, 3, 10, 8]), content["train"], [0, 3, 10, 8])


def test_a_lost_or_truncated_shard_is_named(
    store: str, content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, last in (("ids", "/0/0"), ("true_logprobs", "/0")):
        # Else a sound copy would be read of what is damaged next.
        monkeypatch.setenv("DDK_SHARD_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        view = open_targets(store)
        url = f"{store}/train/{name}/c/2{last}"
        whole = uri.read_bytes(url)
        named = rf"{re.escape(store)}: array 'train/{name}' is damaged in shard 2 \("
        for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:7], b"", whole + b"\0", None):
            if damaged is None:
                uri.remove_file(url)
            else:
                uri.write_bytes(url, damaged)
            for indices in ([8], [10, 0, 9]):
                with pytest.raises(StoreDamagedError, match=named):
                    view.read(indices)
            check_equal(view.read([7, 0]), content["train"], [7, 0])
        uri.write_bytes(url, whole)
    check_equal(view.read(range(11)), content["train"], np.arange(11))


def test_every_damaged_shard_is_named(local_store: str) -> None:
    for _, _, path in objects_of(local_store)[:2]:
        path.write_bytes(b"x" * 100)
    with pytest.raises(StoreDamagedError, match="is damaged in shard 0, 1 "):
        open_targets(local_store).read(range(11))
    for _, shard, path in objects_of(local_store):
        if shard != 1:
            path.unlink()
    (Path(local_store) / "train/ids/c/1/0/0").unlink()
    with pytest.raises(StoreDamagedError, match=r"is damaged in shard 0, 1, 2 \(never written, or lost\)"):
        open_targets(local_store).read([9, 0, 5])


def test_blocks_name_their_own_remedy(tmp_path: Path, maker) -> None:
    url = f"{tmp_path}/a.zarr"
    maker.write(
        url, "blocks", BLOCK_DIMS, {split: maker.arrays("blocks", DIMS, 5) for split in ("train", "validation")}
    )
    os.unlink(f"{url}/validation/tokens/c/0/0")
    with pytest.raises(
        StoreDamagedError, match=r"array 'validation/tokens' is damaged in shard 0 .*`ddk pack` make it anew"
    ):
        open_blocks(url, "validation").read([0])
    assert len(open_blocks(url).read([0])) == 1


def test_damaged_metadata_of_zarr_misleads_nobody(local_store: str, content) -> None:
    for path in Path(local_store).rglob("zarr.json"):
        path.write_bytes(path.read_bytes().replace(b"int32", b"int16").replace(b"little", b"big"))
    check_equal(open_targets(local_store).read(range(11)), content["train"], np.arange(11))


def test_what_may_not_be_read_is_not_called_damaged(local_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = open_targets(local_store)

    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("storage.reading.shards.open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Access Denied"):
        view.read([0])
