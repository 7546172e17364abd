"""The values that pass between the stages. All are frozen; none knows where it is stored.

Shape letters, here and everywhere: B blocks in a batch, N blocks in a store, L predictions in a block (`seq_len`),
K stored teacher entries for a position, V tokens of the tokenizer, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """Random draws, with replacement, from the teacher's full distribution at every position of some blocks."""

    ids_BLN: Int32Array
    """Distinct token ids, ascending; 0 behind the last of them."""
    counts_BLN: Int32Array
    """How often each was drawn, which sums to the number of draws; 0 behind the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseTargets:
    """The stored part of the teacher's distribution at every position of some blocks.

    Position j of a block predicts the block's token j + 1. Entries are in descending order of probability. A position
    may keep fewer than K: the entries behind the last have log-probability −inf and id 0, and stand for no token.
    """

    ids_BLK: Int32Array
    """Token ids of the K most probable tokens."""
    logprobs_BLK: Float32Array
    """Their log-probabilities under the teacher's full distribution (natural log, temperature 1)."""
    tail_mass_BL: Float32Array
    """Probability outside the kept entries, in [0, 1]."""
    true_logprobs_BL: Float32Array
    """Log-probability of the token that does come next; NaN where an imported cache does not say."""
    entropy_BL: Float32Array | None = None
    """Entropy of the teacher's full distribution, in nats; None where the source does not give it."""
    sampled: SampledTokens | None = None
    """None where none were drawn."""
    tail_mass_at: Mapping[float, Float32Array] = field(default_factory=dict)
    """[B, L] by temperature T: the mass outside the kept entries of softmax(logits / T)."""

    def __post_init__(self) -> None:
        blocks, positions, _ = self.ids_BLK.shape
        optional = {"entropy": self.entropy_BL, **{f"tail_mass at {t}": a for t, a in self.tail_mass_at.items()}}
        for name, shape, wanted in (
            ("logprobs", self.logprobs_BLK.shape, self.ids_BLK.shape),
            ("tail_mass", self.tail_mass_BL.shape, (blocks, positions)),
            ("true_logprobs", self.true_logprobs_BL.shape, (blocks, positions)),
            *((name, array.shape, (blocks, positions)) for name, array in optional.items() if array is not None),
        ):
            if shape != wanted:
                raise ValueError(
                    f"{name} has shape {shape}; beside ids of shape {self.ids_BLK.shape} it must be {wanted}"
                )

    def __len__(self) -> int:
        return len(self.ids_BLK)

    # The names without shape letters, for readers outside this project.
    @property
    def ids(self) -> Int32Array:
        return self.ids_BLK

    @property
    def logprobs(self) -> Float32Array:
        return self.logprobs_BLK

    @property
    def tail_mass(self) -> Float32Array:
        return self.tail_mass_BL

    @property
    def true_logprobs(self) -> Float32Array:
        return self.true_logprobs_BL

    @property
    def entropy(self) -> Float32Array | None:
        return self.entropy_BL


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainGap:
    """How far the student lags the teacher on one domain's validation blocks."""

    domain: str
    student_ppl: float
    """exp(mean cross-entropy per token, natural log)."""
    teacher_ppl: float

    @property
    def ratio(self) -> float:
        """ℓ_S/ℓ_T: 1 where the student has caught up."""
        return self.student_ppl / self.teacher_ppl


def worst_gap(gaps: Iterable[DomainGap]) -> DomainGap:
    """The one with the largest ratio; of equals the first. One that could not be measured (NaN) counts as the largest.

    Raises:
        ValueError: there is none.
    """
    return min(gaps, key=lambda gap: worst_first(gap.ratio))


def worst_first(ratio: float) -> float:
    """A sort key that puts the largest ratio first, and before it what could not be measured (NaN)."""
    return -math.inf if math.isnan(ratio) else -ratio


REGRESSION = 0.01
"""A perplexity that has risen by more than this share has regressed. Over 8,000 validation positions, a rise of half as
much is not told from the noise of the measurement."""


def has_regressed(before: float, after: float) -> bool:
    """Whether a student's perplexity has ended above where it began, by more than `REGRESSION`."""
    return after > (1.0 + REGRESSION) * before


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A probability for each domain (the paper's domain discrepancy factor r). Sums to 1."""

    probabilities: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.probabilities:
            raise ValueError("a mixture needs at least one domain")
        for domain, probability in self.probabilities.items():
            if not (math.isfinite(probability) and 0.0 <= probability <= 1.0):
                raise ValueError(f"the probability of domain '{domain}' is {probability}; it must lie in [0, 1]")
        total = math.fsum(self.probabilities.values())
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"the probabilities of a mixture must sum to 1; these sum to {total!r}")
        object.__setattr__(self, "probabilities", MappingProxyType(dict(self.probabilities)))

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.probabilities)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """How a model answered some questions."""

    right: float
    """Sum of the answers' scores, each in [0, 1]: the number of right ones where an answer is right or wrong."""
    asked: int

    def __post_init__(self) -> None:
        if not (self.asked >= 1 and 0.0 <= self.right <= self.asked):
            raise ValueError(f"{self.right} right answers to {self.asked} questions are no tally")

    @property
    def accuracy(self) -> float:
        return self.right / self.asked

    def __add__(self, other: Tally) -> Tally:
        return Tally(right=self.right + other.right, asked=self.asked + other.asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One block that a training step reads."""

    domain: str
    index: int
    """Row of the block in the domain's train split."""


class BlockReader(Protocol):
    """Token blocks of one domain and split; what a store's view, or a list in a test, must offer."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Int32Array:
        """Tokens [n, L + 1] int32 of the given blocks, in the given order."""
        ...


class TargetReader(Protocol):
    """Teacher targets of one domain and split."""

    @property
    def k(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> SparseTargets:
        """Targets of the given blocks, in the given order."""
        ...
