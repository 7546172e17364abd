"""A split's blocks, written a shard at a time from where an earlier attempt stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from ddk.values import Split
from storage.stores.manifest import StoreWriter
from storage.stores.schema import ShardRecord
from tasks.planning.store_plan import StorePlan
from tasks.showing.progress import Meter, meter

Block = TypeVar("Block")
Arrays = dict[str, np.ndarray[Any, Any]]
Facts = dict[str, Any]


def write_shards(
    store: StorePlan,
    writer: StoreWriter,
    split: Split,
    blocks: Callable[[ShardRecord | None, Meter], Iterator[Block]],
    content: Callable[[list[Block]], tuple[Arrays, Facts]],
) -> int:
    """Write the rest of a split; nothing where its last shard is there.

    Args:
        blocks: gives the blocks behind the last committed shard, of which it is handed the record (None: from the
            beginning), and reports bytes read to the meter.
        content: a shard's arrays by name, [n, …], and the facts that are kept of it, from which `blocks` goes on.

    Returns:
        Blocks of the split, earlier attempts' included.
    """
    shard_blocks = store.blocks_dims["shard_blocks"]
    limit = store.corpus.max_train_blocks if split == "train" else store.corpus.max_validation_blocks
    committed = writer.committed(split)
    last = committed[len(committed) - 1] if committed else None
    written = sum(record.blocks for record in committed.values())
    if last is not None and last.facts["end"]:
        return written
    size = sum(file.size for file in store.files(split))
    with meter(f"pack {store.domain} {split}", size, "bytes", root=store.root) as progress:
        rest = blocks(last, progress)
        for shard in range(len(committed), 2**31):
            wanted = shard_blocks if limit is None else min(shard_blocks, limit - written)
            batch = [block for _, block in zip(range(wanted), rest, strict=False)]
            # The end is known only when the stream gives less than was asked for: a last full shard is followed by
            # an empty attempt.
            end = len(batch) < shard_blocks
            if batch:
                arrays, facts = content(batch)
                writer.write_shard(split, shard, arrays, {**facts, "end": end})
                written += len(batch)
            if end:
                break
    return written
