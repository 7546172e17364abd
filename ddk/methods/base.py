"""What a method is: a choice of loss and of mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ddk.mixture import MixtureConfig
from ddk.values import DomainGap, Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One interval of the run that is over."""

    step: int
    """Optimizer steps done at its start."""
    gaps: Sequence[DomainGap]
    """Measured at its start, one a domain."""
    mixture: Mixture
    """That it was trained under."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known at the start of an interval, by domain."""

    student_ppl: Mapping[str, float]
    """ℓ_S, measured now: exp(mean cross-entropy per token, natural log)."""
    teacher_ppl: Mapping[str, float]
    """ℓ_T."""
    reference_ppl: Mapping[str, float]
    """ℓ_ref, of the model whose loss 'excess loss' exceeds: a finished run's student, or the teacher."""
    sizes: Mapping[str, int]
    """Train blocks."""
    past: Sequence[Interval] = ()
    """The intervals so far, oldest first; none before any training."""
    progress: float = 0.0
    """Share of the run's optimizer steps that are done, in [0, 1]."""

    @property
    def previous(self) -> Mixture | None:
        """The mixture of the interval that has just ended; None before any training."""
        return self.past[-1].mixture if self.past else None


def measured(
    past: Sequence[Interval],
    gaps: Sequence[DomainGap],
    sizes: Mapping[str, int],
    reference: Mapping[str, float] | None,
    progress: float,
) -> Measured:
    """What is known, from the gaps measured now; the reference is the teacher where none is given."""
    teacher_ppl = {gap.domain: gap.teacher_ppl for gap in gaps}
    return Measured(
        student_ppl={gap.domain: gap.student_ppl for gap in gaps},
        teacher_ppl=teacher_ppl,
        reference_ppl=teacher_ppl if reference is None else reference,
        sizes=sizes,
        past=past,
        progress=progress,
    )


class NextMixture(Protocol):
    def __call__(self, now: Measured, config: MixtureConfig) -> Mixture:
        """The mixture after a measurement."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    next_mixture: NextMixture
    follows_gap: bool
    """Whether the mixture depends on what is measured; if not, `mixture.weights` may set it."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `LossConfig` that the method fixes, whatever the configuration says."""
    reads_reference: bool = False
    """Whether the mixture depends on `Measured.reference_ppl`."""
    smoothing: str | None = None
    """Field of `MixtureConfig` with the α of its floor, for a method that can follow accuracies too."""
    needs_teacher: bool = False
    """Whether the teacher itself takes part in training (`ddk.ted.student`), not only its stored targets."""

    @property
    def reads_targets(self) -> bool:
        """Whether the loss has a divergence from the teacher (where the configuration gives it a weight)."""
        return self.loss.get("gamma") != 0.0
