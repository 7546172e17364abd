"""The methods that a run can be trained by: each is a choice of loss and of mixture.

    ddk               CE + γ·KL, mixture by Eq. 1 and then Eq. 2 (the paper's method)
    ddk_no_smoothing  the same loss, mixture by Eq. 1 at every interval (the paper's ablation)
    kd                the same loss, every domain drawn equally often, whatever the gap
    cpt               cross-entropy alone (γ = 0), every domain drawn equally often; no targets are read

Adding one is one entry of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ddk.loss import LossConfig
from ddk.mixture import (
    MixtureConfig,
    equal_mixture,
    initial_mixture,
    proportional_mixture,
    update_mixture,
)
from ddk.types import DomainGap, Mixture

MethodName = Literal["ddk", "ddk_no_smoothing", "kd", "cpt"]


class NextMixture(Protocol):
    def __call__(self, previous: Mixture | None, gaps: Sequence[DomainGap], config: MixtureConfig) -> Mixture:
        """The mixture after a measurement; `previous` is None at the first, before any training."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    next_mixture: NextMixture
    reads_targets: bool = True
    """Whether the loss has a KL term."""
    follows_gap: bool = True
    """Whether the mixture depends on the measured gap."""


def _smoothed(previous: Mixture | None, gaps: Sequence[DomainGap], config: MixtureConfig) -> Mixture:
    student, teacher = _perplexities(gaps)
    if previous is None:
        return initial_mixture(student, teacher)
    return update_mixture(previous, student, teacher, config.alpha)


def _unsmoothed(previous: Mixture | None, gaps: Sequence[DomainGap], config: MixtureConfig) -> Mixture:
    return initial_mixture(*_perplexities(gaps))


def _equal(previous: Mixture | None, gaps: Sequence[DomainGap], config: MixtureConfig) -> Mixture:
    return equal_mixture([gap.domain for gap in gaps])


METHODS: Mapping[MethodName, Method] = {
    "ddk": Method(next_mixture=_smoothed),
    "ddk_no_smoothing": Method(next_mixture=_unsmoothed),
    "kd": Method(next_mixture=_equal, follows_gap=False),
    "cpt": Method(next_mixture=_equal, follows_gap=False, reads_targets=False),
}


def effective_loss(method: MethodName, loss: LossConfig) -> LossConfig:
    """The loss that a method trains with: γ = 0 where it reads no targets."""
    return loss if METHODS[method].reads_targets else loss.model_copy(update={"gamma": 0.0})


def mixture_after(
    method: MethodName,
    previous: Mixture | None,
    gaps: Sequence[DomainGap],
    config: MixtureConfig,
    sizes: Mapping[str, int],
) -> Mixture:
    """The mixture of the next interval.

    Args:
        previous: that of the interval that has just ended; None before the first.
        gaps: measured now, one a domain.
        sizes: train blocks by domain, for `initial: proportional`.
    """
    chosen = METHODS[method]
    if previous is None and chosen.follows_gap and config.initial == "proportional":
        return proportional_mixture(sizes)
    return chosen.next_mixture(previous, gaps, config)


def _perplexities(gaps: Sequence[DomainGap]) -> tuple[dict[str, float], dict[str, float]]:
    return {gap.domain: gap.student_ppl for gap in gaps}, {gap.domain: gap.teacher_ppl for gap in gaps}
