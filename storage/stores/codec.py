"""Encodes targets as the arrays of a store, and decodes them.

    exact     ids and float32 log-probabilities as they were captured
    compact   ids in ascending order as differences, probabilities on a grid of their square roots
              (`storage.stores.compact`)

Both store the same quantities for a position; `TargetFormat` says which optional ones. The compact codec is lossy; the
loss is measured while a shard is encoded (`Distortion`), and `ddk inspect` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from ddk.errors import UserError
from ddk.section import Section
from ddk.values import SampledTokens, SparseTargets
from storage.stores import compact

Arrays = dict[str, np.ndarray[Any, Any]]
MOST_DRAWS = 65534
"""So that a draw's count fits its array."""
MOST_TEMPERATURES = 64


class CodecConfig(Section):
    """How the captured targets are stored."""

    name: Literal["compact", "exact"] = "compact"
    """'compact' (ids as differences, probabilities on a grid) or 'exact' (float32, about three times the size)."""
    levels: int = Field(default=254, ge=16, le=65534)
    """With 'compact': number of steps of the square root of a probability between 0 and 1. Halving it saves about
    one bit for each stored token, and quadruples the distortion. From 255 on, a code takes two bytes before
    compression."""
    keep_mass: float = Field(default=1.0, gt=0.0, le=1.0)
    """With 'compact': share of the stored tokens' probability that is kept. The least probable tokens beyond it are
    dropped, and their probability is added to the tail. 1 drops only tokens that the grid rounds to 0."""


class TargetFormat(BaseModel):
    """What a store keeps of every position, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codec: CodecConfig
    entropy: bool
    draws: int = Field(ge=0, le=MOST_DRAWS)
    """Random draws a position; 0 for none."""
    temperatures: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = Field(max_length=MOST_TEMPERATURES)
    """Other than 1, at which the tail's mass is stored."""

    def check(self, k: int) -> None:
        """That so many tokens a position can be stored.

        Raises:
            UserError: they cannot.
        """
        if self.codec.name == "compact" and k > compact.MOST_KEPT:
            raise UserError(
                f"the compact codec keeps at most {compact.MOST_KEPT:,} tokens a position, and k is {k:,}; "
                f"lower teacher.k, or set teacher.codec.name: exact"
            )


PLAIN = TargetFormat(codec=CodecConfig(name="exact"), entropy=False, draws=0, temperatures=())
"""The top k as they were captured, and nothing besides."""

UNKNOWN_TRUE_LOGPROB = math.inf
"""In the exact codec's `true_logprobs`, where an imported cache does not say: no log-probability is positive, and NaN
means 'never written'."""
SAMPLE_EVERY = 16
"""The distortion is measured on every 16th position of a block: on all, it would cost as much as the encoding."""
BINS_PER_OCTAVE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Distortion:
    """Kullback-Leibler divergence of what is stored from what was captured, KL(captured ‖ stored), in nats.

    Over the captured tokens and one bucket for all others; a captured token that was dropped has its equal share of
    the stored tail.
    """

    count: int
    """Positions measured."""
    total: float
    largest: float
    histogram: Mapping[int, int]
    """Positions by ⌊4·log₂ KL⌋, so that a percentile is known within 19%."""

    @classmethod
    def of(cls, divergences: npt.NDArray[np.float64]) -> Distortion:
        bins = np.floor(BINS_PER_OCTAVE * np.log2(np.maximum(divergences, 2.0**-60))).astype(int)
        values, counts = np.unique(bins, return_counts=True)
        return cls(
            count=divergences.size,
            total=float(divergences.sum()),
            largest=float(divergences.max(initial=0.0)),
            histogram={int(v): int(c) for v, c in zip(values, counts, strict=True)},
        )

    def __add__(self, other: Distortion) -> Distortion:
        merged = dict(self.histogram)
        for value, count in other.histogram.items():
            merged[value] = merged.get(value, 0) + count
        return Distortion(
            count=self.count + other.count,
            total=self.total + other.total,
            largest=max(self.largest, other.largest),
            histogram=dict(sorted(merged.items())),
        )

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    def percentile(self, percent: float) -> float:
        """An upper bound of the percentile, at most 19% above it."""
        wanted, seen = self.count * percent / 100, 0
        for value, count in sorted(self.histogram.items()):
            seen += count
            if seen >= wanted:
                return float(min(2.0 ** ((value + 1) / BINS_PER_OCTAVE), self.largest))
        return 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain data; JSON has only text for keys."""
        histogram = {str(value): count for value, count in self.histogram.items()}
        return {"count": self.count, "total": self.total, "largest": self.largest, "histogram": histogram}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Distortion:
        histogram = {int(value): count for value, count in data["histogram"].items()}
        return cls(count=data["count"], total=data["total"], largest=data["largest"], histogram=histogram)


def encode(targets: SparseTargets, form: TargetFormat, vocab_size: int) -> tuple[Arrays, Distortion | None]:
    """The arrays to store for some blocks, by name, and their distortion (compact only).

    Raises:
        ValueError: the targets lack what the format keeps, or hold something else besides.
    """
    given = (targets.entropy_BL is not None, targets.sampled is not None, tuple(targets.tail_mass_at))
    if given != (form.entropy, form.draws > 0, form.temperatures):
        raise ValueError(
            f"targets with (entropy, draws, temperatures) {given} for a store of "
            f"{(form.entropy, form.draws > 0, form.temperatures)}"
        )
    if form.codec.name == "exact":
        return _encode_exact(targets), None
    grid = compact.Grid(levels=form.codec.levels, keep_mass=form.codec.keep_mass, vocab_size=vocab_size)
    arrays, lost = compact.encode(targets, grid, SAMPLE_EVERY)
    return arrays, Distortion.of(lost)


def decode(arrays: Arrays, form: TargetFormat, k: int, vocab_size: int) -> SparseTargets:
    """The targets [n, …] of arrays [n, …], one row a block.

    Raises:
        ValueError: the arrays hold what no encoder writes: ids that are no tokens, codes beyond the grid.
    """
    if form.codec.name == "exact":
        if any(no_tokens(arrays[name], vocab_size) for name in ("ids", "drawn_ids") if name in arrays):
            raise ValueError("it holds ids that are no tokens")
        return _decode_exact(arrays, form)
    grid = compact.Grid(levels=form.codec.levels, keep_mass=form.codec.keep_mass, vocab_size=vocab_size)
    return compact.decode(arrays, grid, k, form.temperatures, entropy=form.entropy)


def no_tokens(ids: npt.NDArray[np.int32], vocab_size: int) -> list[int]:
    """The rows of ids [n, …] that hold one that is no token's: an index beyond a table is read from somewhere else."""
    unsigned = ids.view(np.uint32)  # where a negative number is a large one
    if not ids.size or int(unsigned.max()) < vocab_size:
        return []
    return [int(row) for row in np.flatnonzero((unsigned >= vocab_size).reshape(len(ids), -1).any(-1))]


def divergences(captured: SparseTargets, stored: SparseTargets, vocab_size: int) -> npt.NDArray[np.float64]:
    """KL(captured ‖ stored) of every position, [B · L]; see `Distortion`."""
    k = captured.ids_BLK.shape[2]
    ids, kept_ids = (t.ids_BLK.reshape(-1, k) for t in (captured, stored))
    log_p, log_q = (t.logprobs_BLK.reshape(-1, k).astype(np.float64) for t in (captured, stored))
    tail_p, tail_q = (t.tail_mass_BL.reshape(-1).astype(np.float64) for t in (captured, stored))
    in_q = log_q > -np.inf
    others = np.maximum(vocab_size - in_q.sum(-1), 1)
    share = np.maximum(tail_q, 1e-30) / others
    # Both in the order of ids, entries that are none last: then the kept ones can be found by searching.
    found = _aligned(ids, kept_ids, in_q, log_q)
    log_q_at = np.where(np.isnan(found), np.log(share)[:, None], found)
    p = np.exp(log_p)
    inside = np.where(p > 0, p * (np.where(p > 0, log_p, 0.0) - log_q_at), 0.0).sum(-1)
    outside_share = np.maximum(share * (vocab_size - k), 1e-30)
    outside = np.where(tail_p > 0, tail_p * np.log(np.maximum(tail_p, 1e-300) / outside_share), 0.0)
    return np.asarray(np.maximum(inside + outside, 0.0))


def _aligned(
    ids_PK: np.ndarray[Any, Any], kept_ids_PK: np.ndarray[Any, Any], in_q_PK: Any, log_q_PK: Any
) -> npt.NDArray[np.float64]:
    """log q of each captured id, NaN where it was dropped."""
    rows, k = ids_PK.shape
    base = np.arange(rows)[:, None] * (int(ids_PK.max(initial=0)) + 2)
    kept = np.where(in_q_PK, kept_ids_PK + base, -1).ravel()
    order = np.argsort(kept, kind="stable")
    wanted = (ids_PK + base).ravel()
    place = np.minimum(np.searchsorted(kept, wanted, sorter=order), kept.size - 1)
    hit = kept[order[place]] == wanted
    return np.where(hit, log_q_PK.ravel()[order[place]], np.nan).reshape(rows, k)


def _encode_exact(targets: SparseTargets) -> Arrays:
    true = targets.true_logprobs_BL
    arrays: Arrays = {
        "ids": targets.ids_BLK,
        "logprobs": targets.logprobs_BLK,
        "tail_mass": targets.tail_mass_BL,
        "true_logprobs": np.where(np.isnan(true), np.float32(UNKNOWN_TRUE_LOGPROB), true),
    }
    if targets.entropy_BL is not None:
        arrays["entropy"] = targets.entropy_BL
    if targets.tail_mass_at:
        arrays["tail_mass_at"] = np.stack(list(targets.tail_mass_at.values()), axis=-1)
    if targets.sampled is not None:
        arrays |= {"drawn_ids": targets.sampled.ids_BLN, "drawn_counts": targets.sampled.counts_BLN}
    return arrays


def _decode_exact(arrays: Arrays, form: TargetFormat) -> SparseTargets:
    true = arrays["true_logprobs"]
    sampled = None
    if form.draws:
        sampled = SampledTokens(ids_BLN=arrays["drawn_ids"], counts_BLN=arrays["drawn_counts"])
    return SparseTargets(
        ids_BLK=arrays["ids"],
        logprobs_BLK=arrays["logprobs"],
        tail_mass_BL=arrays["tail_mass"],
        true_logprobs_BL=np.where(true == UNKNOWN_TRUE_LOGPROB, np.float32(np.nan), true),
        entropy_BL=arrays.get("entropy"),
        sampled=sampled,
        tail_mass_at={t: arrays["tail_mass_at"][..., m] for m, t in enumerate(form.temperatures)},
    )
