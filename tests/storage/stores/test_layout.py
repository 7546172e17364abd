from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import FsspecStore, MemoryStore

from storage.files import uri
from storage.stores.codec import CodecConfig, TargetFormat
from storage.stores.layout import array_specs, create_array, encode_shard, shard_key

DIMS = {
    "blocks": {"seq_len": 6, "vocab_size": 152_064, "shard_blocks": 4},
    "targets": {"seq_len": 6, "vocab_size": 152_064, "shard_blocks": 4, "k": 3},
}


@pytest.mark.parametrize("kind", ["blocks", "targets"])
def test_any_zarr_reader_reads_a_store(place: str, maker, kind) -> None:
    dims = DIMS[kind]
    content = {"train": maker.arrays(kind, dims, 10), "validation": maker.arrays(kind, dims, 3, seed=1)}
    maker.write(place, kind, dims, content)
    store = FsspecStore.from_url(place, read_only=True) if place.startswith("s3://") else place
    group = zarr.open_group(store, mode="r")
    assert group.attrs.asdict() == {"ddk": {"format_version": 3, "kind": kind, "dims": dims}}
    assert "train" in group
    for split, arrays in content.items():
        assert sorted(group[split].array_keys()) == sorted(arrays)
        for name, data in arrays.items():
            np.testing.assert_array_equal(group[split][name][:], data, strict=True)
            np.testing.assert_array_equal(group[split][name].oindex[[2, 0, 2]], data[[2, 0, 2]], strict=True)


def test_the_format_is_as_documented(tmp_path: Path, maker) -> None:
    dims = DIMS["targets"]
    content = {"train": maker.arrays("targets", dims, 10), "validation": maker.arrays("targets", dims, 1)}
    maker.write(f"{tmp_path}/a.zarr", "targets", dims, content)
    expected = {
        "ids": ("int32", [10, 6, 3], -1, ["block", "position", "rank"]),
        "logprobs": ("float32", [10, 6, 3], "NaN", ["block", "position", "rank"]),
        "tail_mass": ("float32", [10, 6], "NaN", ["block", "position"]),
        "true_logprobs": ("float32", [10, 6], "NaN", ["block", "position"]),
    }
    for name, (dtype, shape, fill_value, dimensions) in expected.items():
        stored = json.loads((tmp_path / "a.zarr/train" / name / "zarr.json").read_bytes())
        assert stored["zarr_format"] == 3
        assert (stored["data_type"], stored["shape"], stored["fill_value"]) == (dtype, shape, fill_value)
        assert stored["dimension_names"] == dimensions
        assert stored["chunk_grid"]["configuration"]["chunk_shape"] == [4, *shape[1:]]
        (sharding,) = stored["codecs"]
        assert sharding["name"] == "sharding_indexed"
        inner = sharding["configuration"]
        assert inner["chunk_shape"] == [1, *shape[1:]]
        assert inner["index_location"] == "end"
        assert [codec["name"] for codec in inner["index_codecs"]] == ["bytes", "crc32c"]
        assert [codec["name"] for codec in inner["codecs"]] == ["bytes", "blosc", "crc32c"]
        assert inner["codecs"][0]["configuration"] == {"endian": "little"}
        blosc = inner["codecs"][1]["configuration"]
        assert (blosc["cname"], blosc["shuffle"], blosc["typesize"]) == ("zstd", "shuffle", 4)
        # Three shard objects of 4, 4 and 2 blocks, and nothing else.
        folder = tmp_path / "a.zarr/train" / name / "c"
        objects = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert objects == [f"{shard}{'/0' * (len(shape) - 1)}" for shard in range(3)]
    assert uri.list_names(f"{tmp_path}/a.zarr") == ["copy", "manifest.json", "train", "validation", "zarr.json"]


def test_the_specs_of_each_kind() -> None:
    (tokens,) = array_specs("blocks", DIMS["blocks"])
    assert (tokens.name, tokens.block_shape, shard_key(tokens, 12)) == ("tokens", (7,), "c/12/0")
    shapes = {spec.name: spec.block_shape for spec in array_specs("targets", DIMS["targets"])}
    assert shapes == {"ids": (6, 3), "logprobs": (6, 3), "tail_mass": (6,), "true_logprobs": (6,)}


def test_blocks_with_marks_have_an_array_of_them(tmp_path: Path, maker) -> None:
    dims = {**DIMS["blocks"], "marked": 1}
    tokens, loss = array_specs("blocks", dims)
    assert tokens == array_specs("blocks", DIMS["blocks"])[0]
    assert (loss.name, loss.dtype, loss.block_shape, loss.fill_value) == ("loss", "uint8", (7,), 255)
    marks = np.random.default_rng(0).integers(0, 2, (5, 7)).astype(np.uint8)
    arrays = {**maker.arrays("blocks", dims, 5), "loss": marks}
    done = maker.write(f"{tmp_path}/a.zarr", "blocks", dims, {"train": arrays, "validation": arrays})
    assert done.format_version == 3
    group = zarr.open_group(f"{tmp_path}/a.zarr", mode="r")
    assert group.attrs.asdict() == {"ddk": {"format_version": 3, "kind": "blocks", "dims": dims}}
    np.testing.assert_array_equal(group["train"]["loss"][:], marks, strict=True)
    with pytest.raises(ValueError, match="shard of 'loss' holds the fill value"):
        encode_shard(loss, np.full((1, 7), 255, np.uint8), 4)


@pytest.mark.parametrize("kind", ["blocks", "targets"])
def test_the_same_data_is_the_same_bytes(maker, kind) -> None:
    for spec in array_specs(kind, DIMS[kind]):
        data = maker.arrays(kind, DIMS[kind], 4)[spec.name]
        assert encode_shard(spec, data, 4) == encode_shard(spec, data.copy(order="F"), 4)
        assert encode_shard(spec, data[:3], 4) != encode_shard(spec, data, 4)
        assert encode_shard(spec, data[::-1], 4) != encode_shard(spec, data, 4)


@pytest.mark.parametrize("form", [None, TargetFormat(codec=CodecConfig(), entropy=True, draws=3, temperatures=(2.0,))])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_a_shard_is_what_zarr_itself_writes(form: TargetFormat | None, blocks: int) -> None:
    rng = np.random.default_rng(0)
    for spec in (*array_specs("targets", DIMS["targets"], form), *array_specs("blocks", DIMS["blocks"])):
        data = rng.integers(0, 200, (blocks, *spec.block_shape)).astype(spec.dtype)
        data[0] = 0  # a chunk that compresses to nearly nothing
        memory = MemoryStore()
        array = create_array(zarr.create_group(store=memory), spec, 4, 4)
        array[:blocks] = data
        assert encode_shard(spec, data, 4) == memory._store_dict[f"{spec.name}/{shard_key(spec, 0)}"].to_bytes()


def test_data_of_another_form_is_refused(maker) -> None:
    (spec,) = array_specs("blocks", DIMS["blocks"])
    tokens = maker.arrays("blocks", DIMS["blocks"], 5)["tokens"]
    for data in (tokens, tokens[:0], tokens[:2, :6], tokens[:2, :, None], tokens[:2].astype(np.int64)):
        with pytest.raises(ValueError, match=r"shard of 'tokens' has shape .* it must be \[1 to 4, 7\] int32"):
            encode_shard(spec, data, 4)


def test_what_would_read_as_never_written_is_refused(maker) -> None:
    arrays = maker.arrays("targets", DIMS["targets"], 2)
    arrays["ids"][1, 2, 0] = -1
    arrays["logprobs"][0, 0, 2] = np.nan
    specs = {spec.name: spec for spec in array_specs("targets", DIMS["targets"])}
    with pytest.raises(ValueError, match="shard of 'ids' holds negative ids"):
        encode_shard(specs["ids"], arrays["ids"], 4)
    with pytest.raises(ValueError, match="shard of 'logprobs' holds NaN"):
        encode_shard(specs["logprobs"], arrays["logprobs"], 4)
    arrays["logprobs"][0, 0, 2] = -np.inf  # a probability of 0 is data
    assert encode_shard(specs["logprobs"], arrays["logprobs"], 4)
