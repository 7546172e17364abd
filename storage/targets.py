"""Teacher targets of a domain, as stored: opening a store, and writing one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ddk.types import SPLITS, SparseTargets, Split
from storage.codec import Distortion, TargetFormat, encode
from storage.errors import StoreMissingError
from storage.manifest import Manifest, ShardRecord, StoreWriter, require_complete
from storage.views import TargetView


def open_targets(url: str, split: Split = "train") -> TargetView:
    """A read-only view of one domain's teacher targets.

    Args:
        url: `<root>/targets/<fingerprint>/<domain>.zarr`.

    Raises:
        StoreMissingError: no complete store of targets there.
    """
    return TargetView(url, split)


def teacher_perplexity(url: str) -> float:
    """ℓ_T of the domain: exp(−mean log-probability of the true token) over its validation blocks.

    From the sums that were taken while the shards were captured, in float64, before anything was rounded; a store of
    format 1 has none, and is read.

    Raises:
        StoreMissingError: no complete store of targets there, or an imported one that does not know it.
    """
    return perplexity_of(require_complete(url, "targets"), url)


def perplexity_of(manifest: Manifest, url: str) -> float:
    """`teacher_perplexity` of a complete store whose manifest is at hand."""
    shards = manifest.splits["validation"].shards
    if all("true_logprob_sum" in shard.facts for shard in shards):
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
    return float(np.exp(-mean))


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
        dims: see `storage.manifest.Manifest.dims`.
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
