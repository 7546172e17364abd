"""Estimates the size of a store before it exists: a bound from its layout, and an expectation from measurements.

The bound is the layout itself (`storage.stores.layout`) before compression, so no data can exceed it. What compression
leaves depends on the teacher; `make bench-capture` measured it with the compact codec at 254 levels on the quickstart's
teacher, whose vocabulary is small. From there

    bytes a position ≈ 15.3 + 1.196·k + k·log2(levels / 254) / 8 + k·log2(V / 4,090) / 8

linear in k through the measurements at 32 and 64; a code has about as many bits as its grid has doublings; and an id's
difference to the one before grows by a bit with each doubling of the vocabulary, which is so where the k tokens spread
over a larger one as they do over a small one. `ddk inspect` says what the first domain of a real cache takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from storage.stores.codec import TargetFormat
from storage.stores.layout import ArraySpec, array_specs

BLOSC_HEADER, CRC32C, INDEX_PLACE = 16, 4, 16
"""Bytes of an inner chunk besides its data: at most Blosc's header; the checksum; its place in the shard's index."""
MEASURED_K = {32: 53.6, 64: 91.9}
"""Bytes a position by k, at 254 levels: benchmarks/out/capture.json."""
MEASURED_LEVELS, MEASURED_VOCAB = 254, 4090
MEASURED_DRAW = 36 / 50
"""Bytes of a random draw, likewise."""


def most_block_bytes(specs: Sequence[ArraySpec]) -> int:
    """A block's part of a store, before compression."""
    data = (math.prod(spec.block_shape) * np.dtype(spec.dtype).itemsize for spec in specs)
    return sum(size + BLOSC_HEADER + CRC32C + INDEX_PLACE for size in data)


def most_store_bytes(specs: Sequence[ArraySpec], splits: Iterable[int], shard_blocks: int) -> int:
    """Of a store's shards: a bound. The index of a shard has all its places, however few are taken.

    Args:
        splits: blocks of each.
    """
    splits = list(splits)
    shards = sum(-(-blocks // shard_blocks) for blocks in splits)
    unused = shards * shard_blocks - sum(splits)
    index = len(specs) * (shards * CRC32C + unused * INDEX_PLACE)
    return sum(splits) * most_block_bytes(specs) + index


def expected_target_bytes(form: TargetFormat, *, seq_len: int, k: int, vocab_size: int) -> float:
    """Expected bytes of a position's targets, from measurements (see the module); for the exact codec, the bound."""
    most = most_block_bytes(array_specs("targets", {"seq_len": seq_len, "k": k}, form)) / seq_len
    if form.codec.name == "exact":
        return most
    (few, at_few), (many, at_many) = sorted(MEASURED_K.items())
    each = (at_many - at_few) / (many - few)
    wider = max(0.0, math.log2(vocab_size / MEASURED_VOCAB)) / 8
    finer = math.log2(form.codec.levels / MEASURED_LEVELS) / 8
    found = at_few + (k - few) * each + k * (finer + wider)
    found += form.draws * (MEASURED_DRAW + wider) + 2 * len(form.temperatures)
    return min(most, found)
