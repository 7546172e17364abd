"""Stage 1: a domain's documents become token blocks.

A split is one stream, cut into blocks and written a shard at a time. With every shard goes the place in the corpus
where the next one begins, so that packing which was killed goes on there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from ddk.packing import Cursor, PackedBlock, pack
from ddk.student import load_tokenizer
from ddk.types import SPLITS, Split
from storage.manifest import ShardRecord, StoreWriter
from tasks.plan import Plan, StorePlan
from tasks.progress import Meter, logger, meter
from tasks.tokenize import DocumentKey, tokenize_documents


@task(task_run_name="pack {domain}", cache_policy=NO_CACHE, persist_result=False)
def pack_corpus(plan: Plan, domain: str) -> dict[str, Any]:
    """Pack one domain; nothing to do where its store is complete.

    Returns:
        `{"domain", "url", "train_blocks", "validation_blocks", "done_before"}`.

    Raises:
        UserError: a file of the corpus is not as it should be, or a split holds no block.
    """
    store = plan[domain]
    writer = StoreWriter(store.blocks_url, "blocks", store.blocks_inputs, store.blocks_dims)
    done_before = writer.manifest.complete
    if done_before:
        logger.info("pack %s: complete already", domain)
    else:
        started = time.monotonic()
        for split in SPLITS:
            _pack_split(plan, store, writer, split)
        writer.finish(facts={"seconds": round(time.monotonic() - started, 3)})
    splits = writer.manifest.splits
    if not done_before:
        logger.info(
            "pack %s: %d train and %d validation blocks of %d tokens",
            domain,
            splits["train"].blocks,
            splits["validation"].blocks,
            store.blocks_dims["seq_len"] + 1,
        )
    return {
        "domain": domain,
        "url": store.blocks_url,
        "train_blocks": splits["train"].blocks,
        "validation_blocks": splits["validation"].blocks,
        "done_before": done_before,
    }


def _pack_split(plan: Plan, store: StorePlan, writer: StoreWriter, split: Split) -> None:
    shard_blocks = store.blocks_dims["shard_blocks"]
    limit = store.corpus.max_train_blocks if split == "train" else store.corpus.max_validation_blocks
    committed = writer.committed(split)
    shards = len(committed)
    if shards and committed[shards - 1].facts["end"]:
        return
    written = shards * shard_blocks
    start = _cursor(committed[shards - 1]) if shards else None
    size = sum(file.size for file in store.files(split))
    with meter(f"pack {store.domain} {split}", size, "bytes") as progress:
        blocks = _blocks(plan, store, split, start, progress)
        for shard in range(shards, 2**31):
            wanted = shard_blocks if limit is None else min(shard_blocks, limit - written)
            batch = [block for _, block in zip(range(wanted), blocks, strict=False)]
            # The end is known only when the stream gives less than was asked for: a last full shard is followed by
            # an empty attempt.
            end = len(batch) < shard_blocks
            if batch:
                last = batch[-1].next
                facts = {"next": [*last.document, last.offset], "end": end}
                writer.write_shard(split, shard, {"tokens": np.stack([block.tokens for block in batch])}, facts)
                written += len(batch)
            if end:
                break
    if written == 0:
        _refuse_empty(store, split)


def _blocks(
    plan: Plan, store: StorePlan, split: Split, start: Cursor[DocumentKey] | None, progress: Meter
) -> Iterator[PackedBlock[DocumentKey]]:
    tokenizer = load_tokenizer(plan.teacher_folder)
    documents = tokenize_documents(
        store.files(split),
        store.corpus,
        split,
        tokenizer,
        domain=store.domain,
        start=start.document if start is not None else (0, 0),
        on_progress=progress.advance,
    )
    return pack(documents, store.blocks_dims["seq_len"], plan.eos_id, start)


def _cursor(record: ShardRecord) -> Cursor[DocumentKey]:
    file, document, offset = record.facts["next"]
    return Cursor(document=(file, document), offset=offset)


def _refuse_empty(store: StorePlan, split: Split) -> None:
    files = store.files(split)
    names = ", ".join(file.url for file in files[:3]) + (", …" if len(files) > 3 else "")
    remedy = (
        "give it more text, or lower packing.seq_len"
        if split == "train"
        else "give it more validation text (domains.*.validation or validation_fraction), or lower packing.seq_len"
    )
    raise UserError(
        f"domain '{store.domain}' has fewer {split} tokens than one block of {store.blocks_dims['seq_len'] + 1} "
        f"(in {names}); {remedy}"
    )
