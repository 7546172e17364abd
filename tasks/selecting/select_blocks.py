"""Chooses the train blocks of a domain by their scores, and writes which they are."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.data import loss_mask
from ddk.errors import UserError
from ddk.selection import balanced_draw, keep_highest, mean_over_positions
from ddk.train_config import StudentConfig, TrainConfig
from storage.blocks import open_blocks
from storage.corpus.selecting import ByTrajectory
from storage.selections import open_scores, open_selection
from storage.stores.manifest import StoreWriter
from storage.targets import open_targets
from tasks.planning.selection_plan import SelectionPlan
from tasks.planning.store_plan import Plan
from tasks.running.retries import RETRIES
from tasks.running.sharing import alone
from tasks.selecting.score_blocks import score_blocks
from tasks.showing.progress import logger

_AT_ONCE = 256
BINS = 40
"""Of the histogram of scores that the report draws."""


@task(task_run_name="select {selection.domain}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def select_domain(
    root: str, plan: Plan, selection: SelectionPlan, student: StudentConfig, train: TrainConfig
) -> dict[str, Any]:
    """Score one domain's blocks and choose among them; nothing to do where that is done.

    Returns:
        `{"domain", "blocks", "kept", "url", "done_before"}`.

    Raises:
        StoreMissingError: the domain is not packed, or its targets are not captured.
    """
    writer = StoreWriter(selection.selection_url, "selections", selection.selection_inputs, selection.selection_dims)
    done_before = writer.manifest.complete
    if not done_before:
        started = time.monotonic()
        score_blocks(root, plan, selection, student, train)
        with alone(selection.selection_url, f"select {selection.domain}"):
            if not writer.completed_by_another():
                _write(plan, selection, writer, started)
    kept, blocks = len(open_selection(selection.selection_url)), int(writer.manifest.facts["blocks"])
    if done_before:
        logger.info("select %s: complete already", selection.domain)
    else:
        logger.info("select %s: %d of %d blocks kept", selection.domain, kept, blocks)
    return {
        "domain": selection.domain,
        "blocks": blocks,
        "kept": kept,
        "url": selection.selection_url,
        "done_before": done_before,
    }


def _write(plan: Plan, selection: SelectionPlan, writer: StoreWriter, started: float) -> None:
    losses = open_scores(selection.scores_url).read().astype(np.float64)
    select = selection.select
    if isinstance(select, ByTrajectory):
        scores = losses[:, -1]
        kept = balanced_draw(_clusters(losses, select), select.keep, select.seed)
    else:
        scores = losses[:, 0] - _teacher_losses(plan, selection)
        kept = keep_highest(scores, select.keep)
    shard_blocks = selection.selection_dims["shard_blocks"]
    for number, first in enumerate(range(0, len(kept), shard_blocks)):
        part = kept[first : first + shard_blocks]
        if number not in writer.committed("train"):
            arrays = {"indices": part.astype(np.int32), "scores": scores[part].astype(np.float32)}
            writer.write_shard("train", number, arrays)
    facts = {"blocks": len(scores), "seconds": round(time.monotonic() - started, 3), **_histogram(scores, kept)}
    writer.finish(facts)


def _teacher_losses(plan: Plan, selection: SelectionPlan) -> npt.NDArray[np.float64]:
    """The teacher's mean loss on each train block, [N], from the stored log-probabilities.

    Raises:
        UserError: an imported cache does not say them.
    """
    store = plan[selection.domain]
    blocks, targets = open_blocks(store.blocks_url, "train"), open_targets(store.targets_url, "train")
    found = []
    for first in range(0, len(blocks), _AT_ONCE):
        chosen = np.arange(first, min(first + _AT_ONCE, len(blocks)))
        found.append(mean_over_positions(targets.true_logprobs(chosen), loss_mask(blocks, chosen)))
    losses = np.concatenate(found)
    if not np.isfinite(losses).all():
        raise UserError(
            f"domain '{selection.domain}': the targets of block {int(np.flatnonzero(~np.isfinite(losses))[0])} do not "
            f"give every true token a finite log-probability, so that there is no difference to select by; capture the "
            f"domain, or leave its select out"
        )
    return losses


def _clusters(losses: npt.NDArray[np.float64], select: ByTrajectory) -> npt.NDArray[np.int64]:
    """Number of each block's cluster: k-means on the blocks' losses at the checkpoints."""
    from sklearn.cluster import KMeans  # takes seconds to import, and is seldom needed

    clusters = min(select.clusters, len(np.unique(losses, axis=0)))
    found = KMeans(n_clusters=clusters, n_init=1, random_state=select.seed).fit_predict(losses)
    return np.asarray(found, dtype=np.int64)


def _histogram(scores: npt.NDArray[np.float64], kept: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Of all scores and of the kept ones, in the same bins."""
    edges = np.histogram_bin_edges(scores, BINS)
    return {
        "edges": [float(edge) for edge in edges],
        "all": [int(count) for count in np.histogram(scores, edges)[0]],
        "kept": [int(count) for count in np.histogram(scores[kept], edges)[0]],
    }
