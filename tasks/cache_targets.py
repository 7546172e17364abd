"""Stage 2: the teacher's targets for a domain's blocks, captured once.

Shards that are committed stay; the missing ones are captured in order. While the engine captures a shard, other
threads read the next one's tokens and check, encode and write the one before, so that the engine waits for nothing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.types import SPLITS, Int32Array, SparseTargets, Split
from storage.blocks import open_blocks
from storage.manifest import Manifest, ShardRecord
from storage.targets import TargetWriter, perplexity_of
from storage.views import BlockView
from tasks.plan import Plan, StorePlan
from tasks.progress import Meter, logger, meter
from tasks.teacher import Teacher


@task(task_run_name="cache {domain}", cache_policy=NO_CACHE, persist_result=False)
def cache_targets(plan: Plan, domain: str, teacher: Teacher) -> dict[str, Any]:
    """Capture one domain; nothing to do where its store is complete.

    Args:
        teacher: started at its first capture, so that a complete domain costs no engine.

    Returns:
        `{"domain", "url", "shards_written", "done_before", "teacher_ppl", "retained_mass"}`; the last is the mean
        probability inside the K stored entries over all positions.

    Raises:
        StoreMissingError: the domain is not packed.
        RuntimeError: the engine failed, or returned what is no distribution; nothing of that shard was stored.
    """
    store = plan[domain]
    writer = TargetWriter(store.targets_url, store.targets_inputs, store.targets_dims, store.targets_form)
    done_before = writer.complete
    written = 0
    if not done_before:
        started = time.monotonic()
        blocks = {split: open_blocks(store.blocks_url, split) for split in SPLITS}
        written = _capture_missing(store, blocks, writer, teacher)
        writer.finish(facts={"seconds": round(time.monotonic() - started, 3), "shards_written": written})
    manifest = writer.manifest
    positions = sum(part.blocks for part in manifest.splits.values()) * store.targets_dims["seq_len"]
    retained = 1.0 - manifest.total("tail_mass_sum") / positions
    teacher_ppl = perplexity_of(manifest, store.targets_url, store.marked_blocks_url)
    logger.info(
        "cache %s: %s; teacher perplexity %.3f, %.2f%% of its probability in the %d stored tokens",
        domain,
        "complete already" if done_before else f"{written} of {_shards(manifest)} shards captured",
        teacher_ppl,
        100 * retained,
        store.targets_dims["k"],
    )
    return {
        "domain": domain,
        "url": store.targets_url,
        "shards_written": written,
        "done_before": done_before,
        "teacher_ppl": teacher_ppl,
        "retained_mass": retained,
    }


def _shards(manifest: Manifest) -> int:
    return sum(len(part.shards) for part in manifest.splits.values())


def _capture_missing(
    store: StorePlan, blocks: Mapping[Split, BlockView], writer: TargetWriter, teacher: Teacher
) -> int:
    shard_blocks = store.targets_dims["shard_blocks"]
    missing = [
        (split, shard)
        for split in SPLITS
        for shard in sorted(set(range(-(-len(blocks[split]) // shard_blocks))) - set(writer.committed(split)))
    ]
    to_capture = sum(_shard_len(blocks[split], shard, shard_blocks) for split, shard in missing)
    in_all = sum(len(blocks[split]) for split in SPLITS)
    seq_len = store.targets_dims["seq_len"]

    def read(split: Split, shard: int) -> Int32Array:
        first = shard * shard_blocks
        return blocks[split].read(np.arange(first, first + _shard_len(blocks[split], shard, shard_blocks)))

    with (
        meter(f"capture {store.domain}", in_all * seq_len, "positions") as progress,
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="ddk-cache") as executor,
    ):
        progress.advance((in_all - to_capture) * seq_len)
        # Three shards are in hand at most: one read ahead, one in the engine, one being written.
        ahead = deque(executor.submit(read, *shard) for shard in missing[:1])
        writing: Future[ShardRecord] | None = None
        for number, (split, shard) in enumerate(missing):
            tokens = ahead.popleft().result()
            ahead.extend(executor.submit(read, *following) for following in missing[number + 1 : number + 2])
            targets = _captured(teacher, tokens, progress)
            if writing is not None:
                writing.result()
            writing = executor.submit(_write, writer, split, shard, targets)
        if writing is not None:
            writing.result()
    return len(missing)


def _write(writer: TargetWriter, split: Split, shard: int, targets: SparseTargets) -> ShardRecord:
    check_distribution(targets)
    return writer.write_shard(split, shard, targets)


def _shard_len(blocks: BlockView, shard: int, shard_blocks: int) -> int:
    return min(shard_blocks, len(blocks) - shard * shard_blocks)


def _captured(teacher: Teacher, tokens: Int32Array, progress: Meter) -> SparseTargets:
    started = time.monotonic()
    targets = teacher.capture(tokens)
    positions = targets.true_logprobs_BL.size
    progress.advance(positions, f"{positions / (time.monotonic() - started):,.0f} tokens/s")
    return targets


def check_distribution(targets: SparseTargets) -> None:
    """That what was captured is a distribution: a broken engine must not fill a cache.

    Raises:
        RuntimeError: a value is not finite, or stored and outside mass do not add up to 1 within 0.001.
    """
    # −inf is a probability of 0, as a quantised teacher may give; NaN and +inf are not.
    if np.isnan(targets.logprobs_BLK).any() or not np.isfinite(targets.tail_mass_BL).all():
        raise RuntimeError("the teacher returned values that are not numbers; its weights or its dtype do not hold")
    mass = np.exp(targets.logprobs_BLK, dtype=np.float64).sum(-1) + targets.tail_mass_BL
    worst = float(np.abs(mass - 1.0).max())
    if worst > 1e-3 or np.isnan(targets.true_logprobs_BL).any():
        raise RuntimeError(f"the teacher's probabilities add up to 1 only within {worst:.3g}; nothing was stored")
