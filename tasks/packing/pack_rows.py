"""Stage 1 for a domain whose files already hold a teacher's predictions: its rows become token blocks.

Each row is cut into blocks of L + 1 tokens that overlap by one, so that every prediction has its targets and no block
crosses rows; what is left at a row's end is shorter than a block and is dropped:

    row      [5 6 7 8 9 1 2 3]     L = 3
    blocks   [5 6 7 8] [8 9 1 2]   the prediction of the last token, 3, is dropped

Blocks are written a shard at a time; with each shard goes the place of the next one, as in `tasks.packing.pack_corpus`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from ddk.values import SPLITS, Int32Array, Split
from storage.corpus.domain import domain_seed, in_validation
from storage.corpus.files import CorpusFile
from storage.exchange.foreign import iter_tokens
from storage.stores.manifest import StoreWriter
from storage.stores.schema import ShardRecord
from tasks.packing.shards import Arrays, Facts, write_shards
from tasks.planning.store_plan import Plan, StorePlan
from tasks.running.retries import RETRIES
from tasks.running.sharing import alone
from tasks.showing.progress import Meter, logger


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlace:
    """Where in a domain's files a block begins."""

    file: int = 0
    record: int = 0
    block: int = 0
    """Blocks of that row that come before."""


@dataclass(slots=True, kw_only=True)
class RowCounts:
    """What packing has passed so far."""

    rows: int = 0
    dropped_predictions: int = 0


@task(task_run_name="pack {domain}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def pack_rows(plan: Plan, domain: str) -> dict[str, Any]:
    """Pack the rows of one domain; nothing to do where its store is complete.

    Returns:
        As `tasks.packing.pack_corpus.pack_corpus` does.

    Raises:
        UserError: a row is not as it should be, or no row of a split is as long as a block.
    """
    store = plan[domain]
    writer = StoreWriter(store.blocks_url, "blocks", store.blocks_inputs, store.blocks_dims)
    done_before = writer.manifest.complete
    if not done_before:
        with alone(store.blocks_url, f"pack {domain}"):
            _pack(store, writer)
    splits, facts = writer.manifest.splits, writer.manifest.facts
    logger.info(
        "pack %s: %s",
        domain,
        "complete already"
        if done_before
        else f"{splits['train'].blocks} train and {splits['validation'].blocks} validation blocks of "
        f"{store.blocks_dims['seq_len'] + 1} tokens; {facts['train_dropped_predictions']} and "
        f"{facts['validation_dropped_predictions']} predictions at the ends of rows dropped",
    )
    return {
        "domain": domain,
        "url": store.blocks_url,
        "train_blocks": splits["train"].blocks,
        "validation_blocks": splits["validation"].blocks,
        "done_before": done_before,
    }


def _pack(store: StorePlan, writer: StoreWriter) -> None:
    started = time.monotonic()
    splits = () if writer.completed_by_another() else SPLITS
    counts = {split: _pack_split(store, writer, split) for split in splits}
    facts = {f"{split}_{name}": count for split in splits for name, count in asdict(counts[split]).items()}
    writer.finish(facts={"seconds": round(time.monotonic() - started, 3), **facts})


def _pack_split(store: StorePlan, writer: StoreWriter, split: Split) -> RowCounts:
    committed = writer.committed(split)
    counts = RowCounts(**committed[len(committed) - 1].facts["passed"]) if committed else RowCounts()

    def blocks(last: ShardRecord | None, progress: Meter) -> Iterator[tuple[RowPlace, Int32Array]]:
        start = RowPlace(**last.facts["next"]) if last is not None else RowPlace()
        return token_blocks(store, split, start, counts, progress)

    def content(batch: list[tuple[RowPlace, Int32Array]]) -> tuple[Arrays, Facts]:
        at, _ = batch[-1]
        facts = {"next": asdict(replace(at, block=at.block + 1)), "passed": asdict(counts)}
        return {"tokens": np.stack([tokens for _, tokens in batch])}, facts

    if write_shards(store, writer, split, blocks, content) == 0:
        raise UserError(
            f"domain '{store.domain}': none of the {counts.rows} {split} rows has the {writer.manifest.dims['seq_len']}"
            f" + 1 tokens of a block; lower packing.seq_len, or give it longer rows"
        )
    return counts


def token_blocks(
    store: StorePlan, split: Split, start: RowPlace, counts: RowCounts, progress: Meter | None = None
) -> Iterator[tuple[RowPlace, Int32Array]]:
    """The blocks from `start` on, each with its place. `counts` are raised as a row begins."""
    seq_len = store.blocks_dims["seq_len"]
    for index, file in enumerate(store.files(split)):
        if index >= start.file:
            first = start.record if index == start.file else 0
            for record, tokens in iter_tokens(file, store.blocks_dims["vocab_size"], first):
                if not in_split(store, split, file, record):
                    continue
                done = start.block if (index, record) == (start.file, start.record) else 0
                blocks, left = divmod(max(len(tokens) - 1, 0), seq_len)
                if done == 0:
                    counts.rows += 1
                    counts.dropped_predictions += left
                for block in range(done, blocks):
                    at = RowPlace(file=index, record=record, block=block)
                    yield at, tokens[block * seq_len : (block + 1) * seq_len + 1]
        if progress is not None:
            progress.advance(file.size)


def in_split(store: StorePlan, split: Split, file: CorpusFile, record: int) -> bool:
    fraction = store.corpus.validation_fraction
    if not fraction:
        return True
    return in_validation(domain_seed(store.domain), file.name, record, fraction) == (split == "validation")
