"""The names, shapes and chunks of a store's arrays: the only definition of the stored formats.

A store holds one domain: a Zarr v3 group with a group for each split, `train` and `validation`.

    <root>/blocks/<fingerprint>/<domain>.zarr
        tokens               int32   [N, L + 1]   packed token ids
      and where the corpus marks prompts (the dimension `marked` is 1):
        loss                 uint8   [N, L + 1]   1 where predicting the token carries loss, 0 for a prompt's tokens
    <root>/targets/<fingerprint>/<domain>.zarr, with `codec: exact`
        ids                  int32   [N, L, K]    most probable tokens, in descending order
        logprobs             float32 [N, L, K]    their log-probabilities
        tail_mass            float32 [N, L]       probability outside the K
        true_logprobs        float32 [N, L]       log-probability of the token that comes next
      and where they are kept:
        entropy              float32 [N, L]       of the whole distribution, in nats
        tail_mass_at         float32 [N, L, M]    probability outside the K at M further temperatures
        drawn_ids, _counts   int32   [N, L, D]    random draws
    the same, with `codec: compact`: `storage.stores.compact` says what the numbers mean
        scalars              uint16  [N, R, L]
        id_deltas            uint32  [N, L·K]
        codes                uint8   [N, L·K]     (uint16 above 254 levels)
        drawn_id_deltas      uint32  [N, L·D]
        drawn_counts         uint16  [N, L·D]
    <root>/scores/<fingerprint>/<domain>.zarr          of the train split alone
        losses               float32 [N, C]       mean token loss of C models on each block, in nats
    <root>/selections/<fingerprint>/<domain>.zarr      likewise; what is trained on, N kept blocks of the domain's
        indices              int32   [N]          which they are, ascending
        scores               float32 [N]          what they were chosen by

Each array is sharded: an inner chunk holds one block, a shard holds `shard_blocks` of them. Inner chunks are
compressed (Blosc, shuffled) and carry a crc32c. The fill value is one that no data has (-1, NaN, the largest
unsigned number): what was never written, or has gone missing, cannot be taken for data.

Beside the arrays: `manifest.json` (what the store is, and which shards count), a copy of it once the store is complete,
and, while a store is being written, `commits/` (one record a shard). See `storage.stores.manifest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from ddk.values import SPLITS, Split
from storage.stores.codec import PLAIN, TargetFormat

FORMAT_VERSION = 3
"""Of stores; a store of another version is not read."""
Kind = Literal["blocks", "targets", "scores", "selections"]
KINDS: tuple[Kind, ...] = ("blocks", "targets", "scores", "selections")
"""Each lies below `<root>/<kind>`."""
INDEX_ENTRY = 16
"""Bytes of an inner chunk's place in the index of its shard: offset and length."""
BLOCKS_PER_SHARD = 1024
"""Of token blocks: small beside targets, so that a shard of them is a few megabytes at the usual lengths."""


def is_marked(dims: Mapping[str, int]) -> bool:
    """Whether a store of blocks says which tokens carry loss."""
    return bool(dims.get("marked"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of a store; its first axis is always the block."""

    name: str
    dtype: Literal["int32", "float32", "uint8", "uint16", "uint32"]
    block_shape: tuple[int, ...]
    """Shape of one block's part."""
    dimensions: tuple[str, ...]
    """Names of the axes of one block's part."""
    compressor: Literal["zstd", "zlib"] = "zstd"
    effort: int = 3
    """Of the compressor, in Blosc's scale."""

    @property
    def fill_value(self) -> float:
        kind = np.dtype(self.dtype).kind
        return {"i": -1, "f": math.nan, "u": np.iinfo(self.dtype).max if kind == "u" else 0}[kind]

    @property
    def block_bytes(self) -> int:
        """Of one block's part, decoded."""
        return math.prod(self.block_shape) * np.dtype(self.dtype).itemsize


def array_specs(kind: Kind, dims: Mapping[str, int], form: TargetFormat | None = None) -> tuple[ArraySpec, ...]:
    """The arrays of a store whose dimensions are `dims` (`seq_len`, for targets also `k`; see `Manifest.dims`)."""
    seq_len = dims["seq_len"]
    if kind == "blocks":
        tokens = ArraySpec(name="tokens", dtype="int32", block_shape=(seq_len + 1,), dimensions=("position",))
        loss = ArraySpec(name="loss", dtype="uint8", block_shape=(seq_len + 1,), dimensions=("position",))
        return (tokens, loss) if is_marked(dims) else (tokens,)
    if kind == "scores":
        return (ArraySpec(name="losses", dtype="float32", block_shape=(dims["models"],), dimensions=("model",)),)
    if kind == "selections":
        return (
            ArraySpec(name="indices", dtype="int32", block_shape=(), dimensions=()),
            ArraySpec(name="scores", dtype="float32", block_shape=(), dimensions=()),
        )
    form = form or PLAIN
    return _exact(seq_len, dims["k"], form) if form.codec.name == "exact" else _compact(seq_len, dims["k"], form)


def _exact(seq_len: int, k: int, form: TargetFormat) -> tuple[ArraySpec, ...]:
    def spec(name: str, dtype: Literal["int32", "float32"], *more: tuple[str, int]) -> ArraySpec:
        axes = (("position", seq_len), *more)
        names, shape = tuple(name for name, _ in axes), tuple(size for _, size in axes)
        return ArraySpec(name=name, dtype=dtype, block_shape=shape, dimensions=names)

    found = [
        spec("ids", "int32", ("rank", k)),
        spec("logprobs", "float32", ("rank", k)),
        spec("tail_mass", "float32"),
        spec("true_logprobs", "float32"),
    ]
    if form.entropy:
        found.append(spec("entropy", "float32"))
    if form.temperatures:
        found.append(spec("tail_mass_at", "float32", ("temperature", len(form.temperatures))))
    if form.draws:
        found += [spec(name, "int32", ("draw", form.draws)) for name in ("drawn_ids", "drawn_counts")]
    return tuple(found)


def _compact(seq_len: int, k: int, form: TargetFormat) -> tuple[ArraySpec, ...]:
    def flat(name: str, dtype: Literal["uint8", "uint16", "uint32"], most: int, effort: int) -> ArraySpec:
        return ArraySpec(name=name, dtype=dtype, block_shape=(seq_len * most,), dimensions=("entry",), effort=effort)

    rows = 3 + form.entropy + len(form.temperatures) + (form.draws > 0)
    found = [
        # Nearly random numbers, a few kilobytes a chunk: zlib's plain Huffman coding is 7% smaller than zstd there.
        ArraySpec(
            name="scalars",
            dtype="uint16",
            block_shape=(rows, seq_len),
            dimensions=("scalar", "position"),
            compressor="zlib",
            effort=5,
        ),
        # More effort takes longer than it saves: 5 in place of 4 a fifth more time for 0.5%, and codes, which have no
        # repetitions, are no smaller than with the least but one.
        flat("id_deltas", "uint32", k, 4),
        flat("codes", "uint8" if form.codec.levels <= 254 else "uint16", k, 2),
    ]
    if form.draws:
        # More effort saves 2% here, and takes as long as the top k's arrays together.
        found += [flat("drawn_id_deltas", "uint32", form.draws, 7), flat("drawn_counts", "uint16", form.draws, 7)]
    return tuple(found)


def create_array(group: zarr.Group, spec: ArraySpec, blocks: int, shard_blocks: int) -> zarr.Array[Any]:
    """The array's metadata; no data is written."""
    item = np.dtype(spec.dtype).itemsize
    return group.create_array(
        spec.name,
        shape=(blocks, *spec.block_shape),
        chunks=(1, *spec.block_shape),
        shards=(shard_blocks, *spec.block_shape),
        dtype=spec.dtype,
        fill_value=spec.fill_value,
        serializer=BytesCodec(endian="little"),
        compressors=[
            BloscCodec(cname=spec.compressor, clevel=spec.effort, shuffle="shuffle", typesize=item),
            Crc32cCodec(),
        ],
        dimension_names=("block", *spec.dimensions),
    )


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
        what = {"i": "negative ids", "f": "NaN", "u": "the fill value"}[data.dtype.kind]
        raise ValueError(f"shard of '{spec.name}' holds {what}")
    # What Zarr's sharding codec writes, byte for byte (tested), at a third of the time: the chunks in order, then for
    # each its offset and length (all ones where there is none), and a checksum of that.
    item = np.dtype(spec.dtype).newbyteorder("<")
    index = np.full((shard_blocks, 2), 2**64 - 1, dtype="<u8")
    chunks, offset = [], 0
    for number, block in enumerate(data):
        content = blosc.compress(np.ascontiguousarray(block, dtype=item), spec.compressor.encode(), spec.effort, 1)
        content += google_crc32c.value(content).to_bytes(4, "little")
        index[number] = offset, len(content)
        chunks.append(content)
        offset += len(content)
    encoded = index.tobytes()
    return b"".join([*chunks, encoded, google_crc32c.value(encoded).to_bytes(4, "little")])


def is_absent(data: np.ndarray[Any, Any]) -> npt.NDArray[np.bool_]:
    """Where an array holds what no data is: the fill value, or any other negative integer."""
    if data.dtype.kind == "u":
        return np.asarray(data == np.iinfo(data.dtype).max)
    return np.asarray(data < 0 if data.dtype.kind == "i" else np.isnan(data))


def shard_key(spec: ArraySpec, shard: int) -> str:
    """Path of a shard's object below its array: `c/3/0/0` for shard 3 of an array with three axes."""
    return "/".join(["c", str(shard), *("0" for _ in spec.block_shape)])
