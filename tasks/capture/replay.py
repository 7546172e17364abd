"""Checks whether a store matches what the teacher predicts now: captures a sample of its blocks again and compares.

`ddk verify` proves that the stored bytes are unchanged; this proves that they were right in the first place: the right
teacher, the right blocks, no position off by one. The numbers need not be equal to the last bit, because the order of
sums in a forward pass depends on the machine, its kernels and the rest of the batch. Each block is therefore compared
with a tolerance, which a block of another teacher, or of other tokens, exceeds a hundredfold.

    true tokens    |difference of log-probabilities|, mean over the block: at most 0.005 in float32, 0.05 below
    distributions  KL(now ‖ stored), mean over the block: at most 1e-4 in float32, 5e-3 below, and besides four times
                   what the store's codec is known to lose on average
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from ddk.values import SPLITS, SparseTargets, Split
from storage.blocks import open_blocks
from storage.fingerprint import differences
from storage.reading.views import TargetView
from storage.stores.codec import divergences
from storage.stores.manifest import require_complete
from storage.targets import distortion, open_targets
from tasks.planning.store_plan import StorePlan
from tasks.showing.progress import meter
from tasks.teachers.config import Teacher

TRUE_TOLERANCE = {"float32": 0.005}
KL_TOLERANCE = {"float32": 1e-4}
HALF_TRUE_TOLERANCE, HALF_KL_TOLERANCE = 0.05, 5e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedBlock:
    """One block, as stored and as captured now; means over its positions, in nats."""

    split: Split
    block: int
    shard: int
    true_difference: float
    divergence: float
    holds: bool

    def __str__(self) -> str:
        return (
            f"{self.split} block {self.block} (shard {self.shard}): true tokens differ by {self.true_difference:.2g}, "
            f"KL {self.divergence:.2g}"
        )


@task(task_run_name="replay {store.domain}", cache_policy=NO_CACHE, persist_result=False)
def replay(store: StorePlan, dtype: str, teacher: Teacher, blocks: int, seed: int = 0) -> list[ReplayedBlock]:
    """Capture a sample of a complete store's blocks again.

    Args:
        dtype: of the teacher's forward pass.
        blocks: how many, over both splits in proportion; at least one of each.
        seed: of the sample.

    Raises:
        StoreMissingError: no complete store.
        UserError: the store at that place is another one.
    """
    manifest = require_complete(store.targets_url, "targets")
    if differing := differences(manifest.inputs, dict(store.targets_inputs)):
        raise UserError(f"{store.targets_url} is not what this configuration describes ({'; '.join(differing)})")
    lost = distortion(manifest)
    tolerance = KL_TOLERANCE.get(dtype, HALF_KL_TOLERANCE) + 4 * (lost.mean if lost is not None else 0.0)
    rng = np.random.default_rng(seed)
    sizes = {split: manifest.splits[split].blocks for split in SPLITS}
    found: list[ReplayedBlock] = []
    with meter(f"replay {store.domain}", blocks, "blocks", root=store.root) as progress:
        for split, size in sizes.items():
            wanted = min(size, max(1, round(blocks * size / sum(sizes.values()))))
            chosen = np.sort(rng.choice(size, wanted, replace=False))
            tokens = open_blocks(store.blocks_url, split)
            view = open_targets(store.targets_url, split)
            step = manifest.dims["shard_blocks"]
            for start in range(0, wanted, step):
                part = chosen[start : start + step]
                now = teacher.capture(tokens.read(part))
                found += _compared(view, part, now, TRUE_TOLERANCE.get(dtype, HALF_TRUE_TOLERANCE), tolerance)
                progress.advance(len(part))
    return found


def _compared(
    view: TargetView, blocks: np.ndarray[tuple[int], np.dtype[np.int64]], now: SparseTargets, true: float, kl: float
) -> Iterator[ReplayedBlock]:
    stored = view.read(blocks)
    differences_BL = np.abs(now.true_logprobs_BL.astype(np.float64) - stored.true_logprobs_BL)
    divergences_BL = divergences(now, stored, view.vocab_size).reshape(differences_BL.shape)
    for block, true_difference, divergence in zip(
        blocks, np.nanmean(differences_BL, axis=-1), divergences_BL.mean(-1), strict=True
    ):
        yield ReplayedBlock(
            split=view.split,
            block=int(block),
            shard=int(block) // view.manifest.dims["shard_blocks"],
            true_difference=float(true_difference),
            divergence=float(divergence),
            holds=bool(true_difference <= true and divergence <= kl),
        )
