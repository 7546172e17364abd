"""The stored teacher targets of a domain: opens and writes a store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddk.values import SPLITS, SparseTargets, Split
from storage.blocks import open_blocks
from storage.errors import StoreDamagedError, StoreMissingError
from storage.reading.views import BlockView, TargetView
from storage.stores.codec import Distortion, TargetFormat, encode
from storage.stores.manifest import StoreWriter, require_complete
from storage.stores.schema import Manifest, ShardRecord

_BLOCKS_AT_ONCE = 256
_MOST_NATS = 700.0
"""Of a mean over positions: e to this power is the largest number there is."""


def open_targets(url: str, split: Split = "train") -> TargetView:
    """A read-only view of one domain's teacher targets.

    Args:
        url: `<root>/targets/<fingerprint>/<domain>.zarr`.

    Raises:
        StoreMissingError: no complete store of targets there.
    """
    return TargetView(url, split)


def teacher_perplexity(url: str, blocks_url: str | None = None) -> float:
    """ℓ_T of the domain: exp(−mean log-probability of the true token) over its validation blocks.

    From the sums that were taken while the shards were captured, in float64, before anything was rounded; a store of
    format 1 has none, and is read. Where the blocks mark prompts, the mean is over the positions that carry loss, and
    from the stored log-probabilities (the compact codec's are within 1/1024 nat of what was captured, each).

    Args:
        blocks_url: the domain's store of blocks, which alone says which positions carry loss. Without it, all do.

    Raises:
        StoreMissingError: no complete store of targets (of blocks) there, an imported one that does not know it, or
            blocks other than those that the targets are of.
    """
    return perplexity_of(require_complete(url, "targets"), url, blocks_url)


def perplexity_of(manifest: Manifest, url: str, blocks_url: str | None = None) -> float:
    """`teacher_perplexity` of a complete store whose manifest is at hand."""
    shards = manifest.splits["validation"].shards
    if not shards:
        raise StoreMissingError(f"the targets at {url} are of no validation block, so there is no teacher's perplexity")
    blocks = None if blocks_url is None else open_blocks(blocks_url, "validation")
    if blocks is not None and blocks.marked:
        mean = _mean_with_loss(open_targets(url, "validation"), blocks)
    elif all("true_logprob_sum" in shard.facts for shard in shards):
        positions = manifest.splits["validation"].blocks * manifest.dims["seq_len"]
        mean = manifest.total("true_logprob_sum", "validation") / positions
    else:
        mean = float(np.mean(open_targets(url, "validation").true_logprobs(), dtype=np.float64))
    if np.isnan(mean):
        raise StoreMissingError(
            f"the targets at {url} do not give the probability of every true token of the validation blocks, so the "
            f"teacher's perplexity is not known; validate on documents that the teacher reads, or on files that hold "
            f"`true_logprobs`"
        )
    if not -_MOST_NATS <= mean <= 1e-3:
        raise StoreDamagedError(
            f"the targets at {url} give the true tokens of the validation blocks a mean log-probability of {mean:.3g}, "
            f"which is no perplexity; check the teacher's weights and `teacher.dtype`, and capture the domain again "
            f"(`ddk cache CONFIG --force`)"
        )
    return float(np.exp(-mean))


def _mean_with_loss(targets: TargetView, blocks: BlockView) -> float:
    """Mean log-probability of the true tokens at the positions that carry loss; NaN where one is unknown.

    Raises:
        StoreMissingError: the stores are not of the same blocks.
    """
    wanted, found = targets.manifest.inputs.get("blocks"), blocks.manifest.fingerprint
    if len(targets) != len(blocks) or targets.seq_len != blocks.seq_len or wanted not in (None, found):
        raise StoreMissingError(
            f"the targets at {targets.url} are not of the blocks at {blocks.url}; correct the URL of the blocks"
        )
    total, positions = 0.0, 0
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        chosen = np.arange(first, min(first + _BLOCKS_AT_ONCE, len(blocks)))
        true_BL, mask_BL = targets.true_logprobs(chosen), blocks.loss_mask(chosen)
        # Chosen, not multiplied: −inf or NaN within a prompt must not count either.
        counted = true_BL if mask_BL is None else true_BL[mask_BL]
        total, positions = total + float(counted.sum(dtype=np.float64)), positions + counted.size
    return total / positions


def distortion(manifest: Manifest, split: Split | None = None) -> Distortion | None:
    """What the codec lost, over one split or both, as measured while the shards were encoded; None where nothing."""
    chosen = SPLITS if split is None else (split,)
    facts = [shard.facts.get("distortion") for part in chosen for shard in manifest.splits[part].shards]
    found = [Distortion.from_json(fact) for fact in facts if fact is not None]
    return sum(found[1:], start=found[0]) if found else None


class TargetWriter:
    """Writes one store of targets, or completes one that was left unfinished.

    Args:
        url: the store's folder.
        inputs: everything that determines the store's bytes.
        dims: see `storage.stores.manifest.Manifest.dims`.
        form: what is kept of a position, and how.

    Raises:
        UserError: the form cannot hold k tokens a position.
    """

    def __init__(self, url: str, inputs: Mapping[str, Any], dims: Mapping[str, int], form: TargetFormat) -> None:
        form.check(dims["k"])
        self._writer = StoreWriter(url, "targets", inputs, dims, form)
        self._form = form
        self._vocab_size = dims["vocab_size"]

    @property
    def manifest(self) -> Manifest:
        return self._writer.manifest

    @property
    def complete(self) -> bool:
        return self._writer.manifest.complete

    def committed(self, split: Split) -> dict[int, ShardRecord]:
        """The shards that count, by number."""
        return self._writer.committed(split)

    def is_missing(self, split: Split, shard: int) -> bool:
        """Whether nobody has committed the shard, nor completed the store, up to now."""
        return self._writer.is_missing(split, shard)

    def completed_by_another(self) -> bool:
        """Whether the store is complete by now; looks again."""
        return self._writer.completed_by_another()

    def write_shard(
        self, split: Split, shard: int, targets: SparseTargets, facts: Mapping[str, Any] | None = None
    ) -> ShardRecord:
        """Encode, write and commit one shard, with the sums that are taken over it and what else is to be kept."""
        arrays, lost = encode(targets, self._form, self._vocab_size)
        taken: dict[str, Any] = {
            **(facts or {}),
            "tail_mass_sum": float(targets.tail_mass_BL.sum(dtype=np.float64)),
        }
        true_sum = float(targets.true_logprobs_BL.sum(dtype=np.float64))
        if not np.isnan(true_sum):  # where an imported cache does not say; JSON knows no NaN
            taken["true_logprob_sum"] = true_sum
        if lost is not None:
            taken["distortion"] = lost.as_json()
        return self._writer.write_shard(split, shard, arrays, taken)

    def finish(self, facts: Mapping[str, Any] | None = None) -> Manifest:
        """Declare the store complete.

        Raises:
            ValueError: a shard is not committed.
        """
        return self._writer.finish(facts)
