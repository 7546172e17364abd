"""Stage 1: a domain's documents become token blocks.

A split is one stream, cut into blocks and written a shard at a time. Every shard's record holds the place in the corpus
where the next shard begins, so that killed packing resumes there.

If a domain has a `prompt_field` or holds conversations, or documents begin with BOS, the store also holds which tokens
carry loss (array `loss`), and each shard's record counts the positions with loss. The teacher is still captured at all
positions; training and measuring take the positions that count from the blocks only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.domain_tree import depth
from ddk.errors import UserError
from ddk.packing import Cursor, PackedBlock, pack
from ddk.values import SPLITS, Split
from storage.stores.layout import is_marked
from storage.stores.manifest import StoreWriter
from storage.stores.schema import Manifest, ShardRecord
from tasks.packing.shards import Arrays, Facts, write_shards
from tasks.packing.tokenizing import DocumentKey, tokenize_documents
from tasks.planning.store_plan import Plan, StorePlan
from tasks.planning.text_ends import say_ends
from tasks.running.retries import RETRIES
from tasks.running.sharing import alone
from tasks.showing.progress import Meter, logger


@task(task_run_name="pack {domain}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def pack_corpus(plan: Plan, domain: str) -> dict[str, Any]:
    """Pack one domain; nothing to do where its store is complete.

    Returns:
        `{"domain", "url", "train_blocks", "validation_blocks", "done_before"}`.

    Raises:
        UserError: a file of the corpus is not as it should be, or a split holds no block, or no position that carries
            loss.
    """
    store = plan[domain]
    writer = StoreWriter(store.blocks_url, "blocks", store.blocks_inputs, store.blocks_dims)
    done_before = writer.manifest.complete
    if done_before:
        logger.info("pack %s: complete already", domain)
    else:
        say_ends(f"pack {domain}", plan.ends)
        with alone(store.blocks_url, f"pack {domain}"):
            _pack(plan, store, writer)
    splits = writer.manifest.splits
    if not done_before:
        logger.info(
            "pack %s: %d train and %d validation blocks of %d tokens%s",
            domain,
            splits["train"].blocks,
            splits["validation"].blocks,
            store.blocks_dims["seq_len"] + 1,
            _shares_with_loss(writer.manifest) if is_marked(store.blocks_dims) else "",
        )
    return {
        "domain": domain,
        "url": store.blocks_url,
        "train_blocks": splits["train"].blocks,
        "validation_blocks": splits["validation"].blocks,
        "done_before": done_before,
    }


def _pack(plan: Plan, store: StorePlan, writer: StoreWriter) -> None:
    started = time.monotonic()
    for split in () if writer.completed_by_another() else SPLITS:
        _pack_split(plan, store, writer, split)
        if is_marked(store.blocks_dims):
            _refuse_without_loss(store, writer, split)
    writer.finish(facts={"seconds": round(time.monotonic() - started, 3)})


def _pack_split(plan: Plan, store: StorePlan, writer: StoreWriter, split: Split) -> None:
    def blocks(last: ShardRecord | None, progress: Meter) -> Iterator[PackedBlock[DocumentKey]]:
        return _blocks(plan, store, split, _cursor(last) if last is not None else None, progress)

    def content(batch: list[PackedBlock[DocumentKey]]) -> tuple[Arrays, Facts]:
        _refuse_beyond_rows(store, split, batch)
        arrays, counts = _arrays(batch, marked=is_marked(store.blocks_dims))
        following = batch[-1].next
        return arrays, {"next": [*following.document, following.offset], **counts}

    if write_shards(store, writer, split, blocks, content) == 0:
        _refuse_empty(store, split)


def _arrays(batch: Sequence[PackedBlock[DocumentKey]], *, marked: bool) -> tuple[Arrays, dict[str, int]]:
    """A shard's arrays [n, L + 1] by name, and what is counted of it."""
    tokens = np.stack([block.tokens for block in batch])
    if not marked:
        return {"tokens": tokens}, {}
    loss = np.stack([block.loss for block in batch])
    # A block's first token is predicted by no position of it.
    return {"tokens": tokens, "loss": loss.astype(np.uint8)}, {"with_loss": int(loss[:, 1:].sum())}


def _blocks(
    plan: Plan, store: StorePlan, split: Split, start: Cursor[DocumentKey] | None, progress: Meter
) -> Iterator[PackedBlock[DocumentKey]]:
    documents = tokenize_documents(
        store.files(split),
        store.corpus,
        split,
        plan.tokenizer(),
        domain=store.domain,
        path=store.path,
        start=start.document if start is not None else (0, 0),
        on_progress=progress.advance,
        on_spelled=partial(_say_spelled, store.domain) if split == "train" else None,
        on_unanswered=partial(_say_unanswered, store.domain, split),
    )
    return pack(documents, store.blocks_dims["seq_len"], plan.eos_id, start, plan.bos_ids)


def _say_spelled(domain: str, token: str) -> None:
    logger.info(
        "pack %s: texts spell the control token %s, and it stays text; if the token itself is meant, as in chats, "
        "set the domain's special_tokens: control",
        *(domain, token),
    )


def _say_unanswered(domain: str, split: Split, count: int) -> None:
    logger.warning(
        "pack %s: %d %s conversations are left out, as the assistant says nothing in them", domain, count, split
    )


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
    if store.path is not None and "/" in store.path:
        remedy += f", or set path_depth: {depth(store.path) - 1}, so that it is merged with its neighbours"
    raise UserError(
        f"domain '{store.domain}' has fewer {split} tokens than one block of {store.blocks_dims['seq_len'] + 1} "
        f"(in {names}); {remedy}"
    )


def _refuse_beyond_rows(store: StorePlan, split: Split, batch: Sequence[PackedBlock[DocumentKey]]) -> None:
    """A tokenizer may have added tokens for which the teacher has no rows, as long as no text becomes one."""
    largest = max(int(block.tokens.max()) for block in batch)
    if largest >= (rows := store.blocks_dims["vocab_size"]):
        raise UserError(
            f"domain '{store.domain}': a {split} text becomes token {largest}, and the teacher predicts {rows} "
            f"tokens, not this one; remove the text from the corpus, or choose a teacher that has this token"
        )


def _refuse_without_loss(store: StorePlan, writer: StoreWriter, split: Split) -> None:
    shards = writer.committed(split).values()
    if not any(shard.facts["with_loss"] for shard in shards):
        blocks = sum(shard.blocks for shard in shards)
        where, field = (
            ("hold nothing that the assistant says", "the conversations")
            if store.corpus.messages
            else (f"lie within prompts (field '{store.corpus.prompt_field}')", "prompt_field")
        )
        raise UserError(
            f"domain '{store.domain}': no {split} position carries loss, for all {blocks} {split} blocks of "
            f"{store.blocks_dims['seq_len']} positions {where}; give it more {split} records, raise "
            f"domains.*.max_{split}_blocks or packing.seq_len, or check {field}"
        )


def _shares_with_loss(manifest: Manifest) -> str:
    positions = {split: manifest.splits[split].blocks * manifest.dims["seq_len"] for split in SPLITS}
    shares = [f"{manifest.total('with_loss', split) / positions[split]:.1%} of {split}" for split in SPLITS]
    return f"; {' and '.join(shares)} positions carry loss"
