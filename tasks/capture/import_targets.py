"""Stage 2 for a domain whose files already hold a teacher's predictions: makes the targets store from the files.

Neither an engine nor a GPU is started. The rows that `tasks.packing.pack_rows` cut into blocks are read again, with
their predictions, checked (see `storage.exchange.predictions`) and written a shard at a time. Committed shards
are kept; the store of blocks tells where a missing shard begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from ddk.values import SPLITS, Int32Array, SparseTargets, Split
from storage.blocks import open_blocks
from storage.corpus.files import CorpusFile
from storage.exchange.foreign import RowFormat, compression_url, iter_predictions, read_compression
from storage.exchange.predictions import Predictions
from storage.exchange.rows import place
from storage.stores.schema import ShardRecord
from storage.targets import TargetWriter
from tasks.capture.stored_targets import stored_targets
from tasks.packing.pack_rows import RowCounts, RowPlace, in_split, token_blocks
from tasks.planning.store_plan import Plan, StorePlan
from tasks.running.retries import RETRIES
from tasks.running.sharing import alone
from tasks.showing.progress import meter


@task(task_run_name="import {domain}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def import_targets(plan: Plan, domain: str) -> dict[str, Any]:
    """Read one domain's targets from its files; nothing to do where its store is complete.

    Returns:
        As `stored_targets`.

    Raises:
        StoreMissingError: the domain is not packed.
        UserError: a row is not as it should be; file, row and position are named. Nothing of that shard is stored.
    """
    store = plan[domain]
    writer = TargetWriter(store.targets_url, store.targets_inputs, store.targets_dims, store.targets_form)
    done_before = writer.complete
    written = 0
    if not done_before:
        with alone(store.targets_url, f"import {domain}"):
            written = _import(store, writer)
    renormalised = writer.manifest.total("renormalised")
    note = f"; the entries of {renormalised} positions summed to more than 1 and were renormalised"
    return stored_targets(
        store, writer.manifest, stage="import", verb="written", written=written, done_before=done_before, note=note
    )


def _import(store: StorePlan, writer: TargetWriter) -> int:
    started = time.monotonic()
    splits = () if writer.completed_by_another() else SPLITS
    written = sum(_import_split(store, writer, split) for split in splits)
    writer.finish(facts={"seconds": round(time.monotonic() - started, 3), "shards_written": written})
    return written


def _import_split(store: StorePlan, writer: TargetWriter, split: Split) -> int:
    """Write the shards that are missing; returns how many."""
    blocks = open_blocks(store.blocks_url, split)
    shard_blocks, seq_len = store.targets_dims["shard_blocks"], store.targets_dims["seq_len"]
    shards = -(-len(blocks) // shard_blocks)
    committed = set(writer.committed(split))
    missing = [shard for shard in range(shards) if shard not in committed]
    stream: Iterator[_Block] = iter(())
    label, positions = f"import {store.domain} {split}", len(blocks) * seq_len
    with meter(label, positions, "positions", root=store.root) as progress:
        for before, shard in zip([-2, *missing], missing, strict=False):
            first, stop = shard * shard_blocks, min((shard + 1) * shard_blocks, len(blocks))
            if shard != before + 1:
                stream = _target_blocks(
                    store, split, _locate(store, split, blocks.manifest.splits[split].shards, first)
                )
            batch = [block for _, block in zip(range(stop - first), stream, strict=False)]
            tokens = blocks.read(np.arange(first, stop))
            if len(batch) < len(tokens) or not np.array_equal(np.stack([b.tokens for b in batch]), tokens):
                raise UserError(f"the files of domain '{store.domain}' changed while they were read; run again")
            _write(store, writer, split, shard, batch)
            progress.advance((stop - first) * seq_len)
    return len(missing)


def _locate(store: StorePlan, split: Split, shards: Sequence[ShardRecord], block: int) -> RowPlace:
    """Where a block of the packed store begins: from its shard's beginning on, tokens are counted."""
    shard, offset = divmod(block, store.blocks_dims["shard_blocks"])
    start = RowPlace(**shards[shard - 1].facts["next"]) if shard else RowPlace()
    if offset == 0:
        return start
    places = token_blocks(store, split, start, RowCounts())
    return next(at for number, (at, _) in enumerate(places) if number == offset)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    tokens: Int32Array
    row: Predictions
    first: int
    """Of the row's predictions."""


def _target_blocks(store: StorePlan, split: Split, start: RowPlace) -> Iterator[_Block]:
    """The blocks from `start` on with their row's predictions."""
    seq_len = store.targets_dims["seq_len"]
    for index in range(start.file, len(store.files(split))):
        file = store.files(split)[index]
        first = start.record if index == start.file else 0
        for record, row in iter_predictions(file, _row_format(store, file), first, min_tokens=seq_len + 1):
            if not in_split(store, split, file, record):
                continue
            if split == "validation":
                _refuse_unknown(store, file, record, row)
            done = start.block if (index, record) == (start.file, start.record) else 0
            for block in range(done, (len(row.tokens_N) - 1) // seq_len):
                at = block * seq_len
                yield _Block(tokens=row.tokens_N[at : at + seq_len + 1], row=row, first=at)


def _row_format(store: StorePlan, file: CorpusFile) -> RowFormat:
    corpus = store.corpus
    compressed = corpus.targets == "distillkit"
    return RowFormat(
        vocab_size=store.targets_dims["vocab_size"],
        k=store.targets_dims["k"],
        shift=corpus.shift,
        compression=read_compression(compression_url(file, corpus.compression_config)) if compressed else None,
    )


def _refuse_unknown(store: StorePlan, file: CorpusFile, record: int, row: Predictions) -> None:
    """The teacher's perplexity is measured on validation blocks, and needs every true token's log-probability."""
    seq_len = store.targets_dims["seq_len"]
    unknown_P = np.isnan(row.true_logprobs_P[: (len(row.tokens_N) - 1) // seq_len * seq_len])
    if unknown_P.any():
        raise UserError(
            f"{place(file, record)}, position {int(np.flatnonzero(unknown_P)[0]) + 1 - store.corpus.shift}: the true "
            f"token is not among the entries, and its log-probability is needed in validation rows (the teacher's "
            f"perplexity is measured there); name validation files with a column 'true_logprobs' for domain "
            f"'{store.domain}', or capture the domain (targets: teacher)"
        )


def _write(store: StorePlan, writer: TargetWriter, split: Split, shard: int, batch: Sequence[_Block]) -> None:
    seq_len = store.targets_dims["seq_len"]

    def stacked(name: str) -> np.ndarray[Any, Any]:
        return np.stack([getattr(block.row, name)[block.first : block.first + seq_len] for block in batch])

    _check_alignment(store, split, shard, stacked("hit_P"), stacked("hit_elsewhere_P"))
    targets = SparseTargets(
        ids_BLK=stacked("ids_PK"),
        logprobs_BLK=stacked("logprobs_PK"),
        tail_mass_BL=stacked("tail_mass_P"),
        true_logprobs_BL=stacked("true_logprobs_P"),
    )
    writer.write_shard(split, shard, targets, {"renormalised": int(stacked("renormalised_P").sum())})


def _check_alignment(
    store: StorePlan, split: Split, shard: int, hit: np.ndarray[Any, Any], elsewhere: np.ndarray[Any, Any]
) -> None:
    """That the lists predict the tokens that `shift` says: true tokens are mostly among a teacher's most probable."""
    if hit.size >= 200 and elsewhere.mean() > hit.mean() + 0.2:
        shift = store.corpus.shift
        raise UserError(
            f"domain '{store.domain}', {split} shard {shard}: the true token is among the entries at "
            f"{100 * hit.mean():.0f}% of the positions with shift {shift}, and would be at "
            f"{100 * elsewhere.mean():.0f}% with shift {1 - shift}; set domains.{store.domain}.shift: {1 - shift}"
        )
