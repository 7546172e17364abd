"""What the arrays of a store are called and how they are cut: the one table of the stored format.

Format 1, for one domain, a Zarr v3 group with a group for each split:

    <root>/blocks/<fingerprint>/<domain>.zarr
        {train,validation}/tokens            int32   [N, L + 1]   packed token ids
    <root>/targets/<fingerprint>/<domain>.zarr
        {train,validation}/ids               int32   [N, L, K]    most probable tokens, in descending order
        {train,validation}/logprobs          float32 [N, L, K]    their log-probabilities
        {train,validation}/tail_mass         float32 [N, L]       probability outside the K
        {train,validation}/true_logprobs     float32 [N, L]       log-probability of the token that comes next

Each array is sharded: an inner chunk holds one block, a shard holds `shard_blocks` of them. Inner chunks are
compressed (Blosc: zstd, shuffled) and carry a crc32c. The fill value is one that no data has (-1, NaN): what was
never written, or has gone missing, cannot be taken for data.

Beside the arrays: `manifest.json` (what the store is, and which shards count) and, while a store is being written,
`commits/` (one record a shard). See `storage.manifest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import MemoryStore

from ddk.types import SPLITS, Split

FORMAT_VERSION = 1
Kind = Literal["blocks", "targets"]
BLOCKS_PER_SHARD = 1024
"""Of token blocks: small beside targets, so that a shard of them is a few megabytes at the usual lengths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of a store; its first axis is always the block."""

    name: str
    dtype: Literal["int32", "float32"]
    block_shape: tuple[int, ...]
    """Shape of one block's part."""

    @property
    def fill_value(self) -> float:
        return -1 if self.dtype == "int32" else math.nan


def array_specs(kind: Kind, dims: Mapping[str, int]) -> tuple[ArraySpec, ...]:
    """The arrays of a store whose dimensions are `dims` (`seq_len`, for targets also `k`)."""
    seq_len = dims["seq_len"]
    if kind == "blocks":
        return (ArraySpec(name="tokens", dtype="int32", block_shape=(seq_len + 1,)),)
    return (
        ArraySpec(name="ids", dtype="int32", block_shape=(seq_len, dims["k"])),
        ArraySpec(name="logprobs", dtype="float32", block_shape=(seq_len, dims["k"])),
        ArraySpec(name="tail_mass", dtype="float32", block_shape=(seq_len,)),
        ArraySpec(name="true_logprobs", dtype="float32", block_shape=(seq_len,)),
    )


def create_array(group: zarr.Group, spec: ArraySpec, blocks: int, shard_blocks: int) -> zarr.Array[Any]:
    """The array's metadata; no data is written."""
    return group.create_array(
        spec.name,
        shape=(blocks, *spec.block_shape),
        chunks=(1, *spec.block_shape),
        shards=(shard_blocks, *spec.block_shape),
        dtype=spec.dtype,
        fill_value=spec.fill_value,
        serializer=BytesCodec(endian="little"),
        compressors=[BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=4), Crc32cCodec()],
        dimension_names=("block", "position", "rank")[: 1 + len(spec.block_shape)],
    )


def array_metadata(spec: ArraySpec, blocks: int, shard_blocks: int) -> ArrayV3Metadata:
    """What the array's `zarr.json` says, from this table."""
    array = create_array(zarr.create_group(store=MemoryStore()), spec, blocks, shard_blocks)
    return cast(ArrayV3Metadata, array.metadata)


def group_metadata(
    specs: tuple[ArraySpec, ...], blocks: Mapping[Split, int], shard_blocks: int, attributes: Mapping[str, Any]
) -> dict[str, bytes]:
    """Every `zarr.json` of a store, by its path."""
    memory = MemoryStore()
    root = zarr.create_group(store=memory, attributes=dict(attributes))
    for split in SPLITS:
        group = root.create_group(split)
        for spec in specs:
            create_array(group, spec, blocks[split], shard_blocks)
    return {key: value.to_bytes() for key, value in memory._store_dict.items()}


def encode_shard(spec: ArraySpec, data: np.ndarray[Any, Any], shard_blocks: int) -> bytes:
    """The bytes of one shard object, as any Zarr v3 reader decodes them.

    Args:
        data: [n, *spec.block_shape] with 1 ≤ n ≤ shard_blocks (fewer in the last shard of a split).

    Raises:
        ValueError: another shape or dtype, or values that mean 'never written' (negative ids, NaN).
    """
    if data.shape[1:] != spec.block_shape or not 0 < len(data) <= shard_blocks or data.dtype != np.dtype(spec.dtype):
        raise ValueError(
            f"shard of '{spec.name}' has shape {data.shape} and dtype {data.dtype}; "
            f"it must be [1 to {shard_blocks}, {', '.join(map(str, spec.block_shape))}] {spec.dtype}"
        )
    if is_absent(data).any():
        raise ValueError(f"shard of '{spec.name}' holds {'negative ids' if spec.dtype == 'int32' else 'NaN'}")
    memory = MemoryStore()
    # One shard long, however few blocks it holds: absent inner chunks are marked so in the shard's index.
    array = create_array(zarr.create_group(store=memory), spec, shard_blocks, shard_blocks)
    array[: len(data)] = data
    return bytes(memory._store_dict[f"{spec.name}/{shard_key(spec, 0)}"].to_bytes())


def is_absent(data: np.ndarray[Any, Any]) -> npt.NDArray[np.bool_]:
    """Where an array holds what no data is: the fill value, or any other negative integer."""
    return np.asarray(data < 0 if data.dtype.kind == "i" else np.isnan(data))


def shard_key(spec: ArraySpec, shard: int) -> str:
    """Path of a shard's object below its array: `c/3/0/0` for shard 3 of an array with three axes."""
    return "/".join(["c", str(shard), *("0" for _ in spec.block_shape)])
