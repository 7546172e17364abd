"""Stage 2: the teacher's targets for a domain's blocks, captured once.

Committed shards are kept, and the missing ones are captured. Several processes, on several machines, may work on one
store and share its shards (`tasks.running.sharing`). While the engine captures a shard, other threads read the tokens
of the next shard and check, encode and write the previous one, so that the engine need not wait.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from ddk.values import SPLITS, Int32Array, SparseTargets
from storage.blocks import open_blocks
from storage.files.claims import Claims
from storage.targets import TargetWriter
from tasks.capture.quota import Quota
from tasks.capture.stored_targets import stored_targets
from tasks.planning.store_plan import Plan, StorePlan
from tasks.running.retries import RETRIES
from tasks.running.sharing import Shard, ShardQueue
from tasks.showing.device import device_name
from tasks.showing.progress import Meter, meter
from tasks.teachers.config import Teacher, on_gpu


def run_name() -> str:
    """`cache math`, and where several capture together `cache math 3/8`."""
    given = runtime.task_run.parameters
    part = f" {given['part']}/{given['parts']}" if given.get("parts", 1) > 1 else ""
    return f"cache {given['domain']}{part}"


@task(task_run_name=run_name, cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def cache_targets(
    plan: Plan, domain: str, teacher: Teacher, part: int = 1, parts: int = 1, max_bytes: int | None = None
) -> dict[str, Any]:
    """Capture one domain; nothing to do where its store is complete. Returns when it is, by whomever.

    Args:
        teacher: started at its first capture, so that a complete domain costs no engine.
        part, parts: where several capture together, this one begins at part `part` of `parts`, counted from 1.
        max_bytes: that the targets of all domains may take together; None: no limit.

    Returns:
        As `stored_targets`.

    Raises:
        StoreMissingError: the domain is not packed.
        UserError: `max_bytes` is reached; every shard so far is kept.
        RuntimeError: the engine failed, or returned what is no distribution; nothing of that shard was stored.
    """
    store = plan[domain]
    writer = TargetWriter(store.targets_url, store.targets_inputs, store.targets_dims, store.targets_form)
    done_before = writer.complete
    written = 0
    if not done_before:
        started = time.monotonic()
        with Claims(store.targets_url) as claims:
            quota = Quota(max_bytes, (plan[one].targets_url for one in plan.domains), parts)
            capture = _Capture(store, writer, teacher, claims, quota)
            written = capture(part, parts)
            claims.wait_for("finish")
            facts = {"seconds": round(time.monotonic() - started, 3), "shards_written": written}
            writer.finish(facts={**facts, "device": _device(teacher)})
    return stored_targets(
        store, writer.manifest, stage="cache", verb="captured", written=written, done_before=done_before
    )


def _device(teacher: Teacher) -> str:
    config = getattr(teacher, "config", None)
    if config is None or config.source == "server":
        return "a server"
    return device_name(gpus=config.tensor_parallel_size if on_gpu() else 0)


class _Capture:
    """The missing shards of one store, as far as they fall to this process."""

    def __init__(self, store: StorePlan, writer: TargetWriter, teacher: Teacher, claims: Claims, quota: Quota) -> None:
        self._blocks = {split: open_blocks(store.blocks_url, split) for split in SPLITS}
        self._store = store
        self._writer = writer
        self._teacher = teacher
        self._claims = claims
        self._quota = quota
        self._shard_blocks = store.targets_dims["shard_blocks"]

    def __call__(self, part: int, parts: int) -> int:
        """Until every shard is committed. Returns how many this process has captured."""
        shards = {split: -(-len(blocks) // self._shard_blocks) for split, blocks in self._blocks.items()}
        queue = ShardQueue(self._writer, self._claims, shards, part, parts)
        label, in_all = f"capture {self._store.domain}", sum(map(len, self._blocks.values()))
        before = in_all - self._blocks_of(queue.left)
        with (
            meter(
                label,
                in_all,
                "blocks",
                done=before,
                positions=self._store.targets_dims["seq_len"],
                root=self._store.root,
            ) as progress,
            ThreadPoolExecutor(max_workers=2, thread_name_prefix="ddk-cache") as executor,
        ):
            captured = 0
            while True:
                captured += self._capture_ours(queue, executor, progress)
                others = self._blocks_of(queue.left)
                if not queue.wait():
                    progress.skip(others)
                    return captured
                progress.skip(others - self._blocks_of(queue.left))

    def _capture_ours(self, queue: ShardQueue, executor: ThreadPoolExecutor, progress: Meter) -> int:
        """All that are available without waiting. Three shards are in hand at most: one read ahead, one in the engine,
        one being written."""
        captured = 0
        ahead = executor.submit(self._take, queue)
        writing: Future[None] | None = None
        while (taken := ahead.result()) is not None:
            shard, tokens = taken
            ahead = executor.submit(self._take, queue)
            self._quota.check()
            targets, seconds = _captured(self._teacher, tokens, progress)
            if writing is not None:
                writing.result()
            writing = executor.submit(self._write, queue, shard, targets, seconds)
            captured += 1
        if writing is not None:
            writing.result()
        return captured

    def _take(self, queue: ShardQueue) -> tuple[Shard, Int32Array] | None:
        """The next shard that falls to us, and its tokens [n, L + 1]."""
        shard = queue.take()
        if shard is None:
            return None
        split, number = shard
        first = number * self._shard_blocks
        return shard, self._blocks[split].read(np.arange(first, first + self._shard_len(shard)))

    def _write(self, queue: ShardQueue, shard: Shard, targets: SparseTargets, seconds: float) -> None:
        check_distribution(targets)
        # Another process may have taken us for dead, and be at this shard or done with it.
        if queue.still_ours(shard):
            self._quota.add(self._writer.write_shard(*shard, targets, {"seconds": round(seconds, 3)}))

    def _shard_len(self, shard: Shard) -> int:
        split, number = shard
        return min(self._shard_blocks, len(self._blocks[split]) - number * self._shard_blocks)

    def _blocks_of(self, shards: list[Shard]) -> int:
        return sum(map(self._shard_len, shards))


def _captured(teacher: Teacher, tokens: Int32Array, progress: Meter) -> tuple[SparseTargets, float]:
    """The targets, and the seconds that the capture itself took, without the start of an engine."""
    began, started = time.monotonic(), getattr(teacher, "start_seconds", 0.0)
    targets = teacher.capture(tokens)
    seconds = time.monotonic() - began - (getattr(teacher, "start_seconds", 0.0) - started)
    progress.advance(len(tokens))
    return targets, max(seconds, 0.0)


def check_distribution(targets: SparseTargets) -> None:
    """Check that the captured targets are a distribution, so that a broken engine cannot fill a cache.

    Raises:
        UserError: a value is not a number, as where float16 overflows.
        RuntimeError: stored and outside mass do not add up to 1 within 0.001.
    """
    # −inf is a probability of 0, as a quantised teacher may give; NaN and +inf are not.
    if np.isnan(targets.logprobs_BLK).any() or not np.isfinite(targets.tail_mass_BL).all():
        raise UserError(
            "the teacher returned values that are not numbers, and none were stored: the values overflow its dtype, "
            "or its weights are damaged; set teacher.dtype: bfloat16 (or float32), or download the weights again"
        )
    mass = np.exp(targets.logprobs_BLK, dtype=np.float64).sum(-1) + targets.tail_mass_BL
    worst = float(np.abs(mass - 1.0).max())
    if worst > 1e-3 or np.isnan(targets.true_logprobs_BL).any():
        raise RuntimeError(f"the teacher's probabilities add up to 1 only within {worst:.3g}; nothing was stored")
