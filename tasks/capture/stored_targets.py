"""Summarises a complete store of targets, captured or imported: for the log, for Prefect's UI, for the caller."""

from __future__ import annotations

from typing import Any

from storage.stores.schema import Manifest
from storage.targets import perplexity_of
from tasks.planning.store_plan import StorePlan
from tasks.reporting.run_artifacts import publish_targets
from tasks.showing.progress import logger


def stored_targets(
    store: StorePlan, manifest: Manifest, *, stage: str, verb: str, written: int, done_before: bool, note: str = ""
) -> dict[str, Any]:
    """Log and show what the store holds.

    Args:
        manifest: of the complete store.
        stage: 'cache' or 'import'.
        verb: what was done to its shards, e.g. 'captured'.
        written: shards that this call has made.
        note: for the end of the line.

    Returns:
        `{"domain", "url", "shards_written", "done_before", "teacher_ppl", "retained_mass"}`; the last is the mean
        probability inside the K stored entries over all positions.
    """
    parts = manifest.splits.values()
    positions = sum(part.blocks for part in parts) * store.targets_dims["seq_len"]
    retained = 1.0 - manifest.total("tail_mass_sum") / positions
    teacher_ppl = perplexity_of(manifest, store.targets_url, store.marked_blocks_url)
    made = f"{written} of {sum(len(part.shards) for part in parts)} shards {verb}"
    logger.info(
        "%s %s: %s; teacher perplexity %.3f, %.2f%% of its probability in the %d stored tokens%s",
        *(stage, store.domain),
        "complete already" if done_before else made,
        *(teacher_ppl, 100 * retained, store.targets_dims["k"], note),
    )
    publish_targets(store.domain, store.targets_url, manifest, teacher_ppl, retained)
    return {
        "domain": store.domain,
        "url": store.targets_url,
        "shards_written": written,
        "done_before": done_before,
        "teacher_ppl": teacher_ppl,
        "retained_mass": retained,
    }
