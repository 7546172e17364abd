"""Equations 1 and 2 of the paper: from perplexities to the next sampling mixture.

r is the paper's domain discrepancy factor, ℓ_S and ℓ_T the perplexities of student and teacher on a domain's
validation set. Everything is computed in log space: a ratio of 800 does not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ddk.types import DomainGap, Mixture


class MixtureConfig(BaseModel):
    """How the sampling mixture follows the gap."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    interval: int = Field(default=1000, ge=1)
    """Optimizer steps under one mixture (the paper's K)."""
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Smoothing coefficient α of Eq. 2: every domain keeps at least (1 − α)/N."""
    initial: Literal["gap", "proportional"] = "gap"
    """Mixture of the first interval: 'gap' follows Eq. 1; 'proportional' draws uniformly over all blocks, as
    Algorithm 1 of the paper does before its first update."""
    stop_ratio: float | None = Field(default=None, ge=0.0)
    """Stop early once the largest ℓ_S/ℓ_T of all domains is at or below this ratio, e.g. 1.05. Never by default."""


def initial_mixture(student_ppl: Mapping[str, float], teacher_ppl: Mapping[str, float]) -> Mixture:
    """Eq. 1: r_0[i] = exp(ℓ_S[i]/ℓ_T[i]) / Σ_j exp(ℓ_S[j]/ℓ_T[j]).

    Args:
        student_ppl: perplexity exp(mean cross-entropy per token) by domain.
        teacher_ppl: likewise; the same domains.

    Raises:
        ValueError: domains differ, there are none, or a perplexity is not a positive finite number.
    """
    return _softmax(_ratios(student_ppl, teacher_ppl))


def update_mixture(
    mixture: Mixture | Mapping[str, float],
    student_ppl: Mapping[str, float],
    teacher_ppl: Mapping[str, float],
    alpha: float,
) -> Mixture:
    """Eq. 2: ψ[i] = r_t[i] · exp(ℓ_S[i]/ℓ_T[i]); r_{t+1}[i] = α · ψ[i]/Σ_j ψ[j] + (1 − α)/N.

    Args:
        mixture: r_t, the mixture of the interval that has just ended.
        student_ppl: measured now, by domain.
        teacher_ppl: likewise.
        alpha: smoothing coefficient in [0, 1].

    Raises:
        ValueError: as `initial_mixture`; also an `alpha` outside [0, 1], or other domains in the mixture.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    old = mixture if isinstance(mixture, Mixture) else Mixture(probabilities=mixture)
    ratios = _ratios(student_ppl, teacher_ppl)
    if set(old.domains) != set(ratios):
        raise ValueError(f"the mixture has domains {sorted(old.domains)}, the perplexities {sorted(ratios)}")
    log_psi = {
        domain: math.log(r) + ratios[domain] if r > 0.0 else -math.inf for domain, r in old.probabilities.items()
    }
    psi = _softmax(log_psi).probabilities
    uniform = 1.0 / len(psi)
    return _normalised({domain: alpha * psi[domain] + (1.0 - alpha) * uniform for domain in psi})


def equal_mixture(domains: Sequence[str]) -> Mixture:
    """The same probability for every domain."""
    return _normalised(dict.fromkeys(domains, 1.0))


def proportional_mixture(sizes: Mapping[str, int]) -> Mixture:
    """Each domain by its number of blocks: uniform over the corpus."""
    return _normalised({domain: float(size) for domain, size in sizes.items()})


def caught_up(gaps: Sequence[DomainGap], stop_ratio: float | None) -> bool:
    """Whether the stop criterion holds: every domain's ℓ_S/ℓ_T is at or below `stop_ratio`."""
    return stop_ratio is not None and all(gap.ratio <= stop_ratio for gap in gaps)


def _ratios(student_ppl: Mapping[str, float], teacher_ppl: Mapping[str, float]) -> dict[str, float]:
    if set(student_ppl) != set(teacher_ppl) or not student_ppl:
        raise ValueError(
            f"student and teacher need perplexities of the same domains, at least one; "
            f"the student has {sorted(student_ppl)}, the teacher {sorted(teacher_ppl)}"
        )
    for who, perplexities in (("student", student_ppl), ("teacher", teacher_ppl)):
        for domain, value in perplexities.items():
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"the {who}'s perplexity on '{domain}' is {value}; it must be positive and finite")
    return {domain: student_ppl[domain] / teacher_ppl[domain] for domain in student_ppl}


def _softmax(logits: Mapping[str, float]) -> Mixture:
    largest = max(logits.values())
    return _normalised({domain: math.exp(value - largest) for domain, value in logits.items()})


def _normalised(weights: Mapping[str, float]) -> Mixture:
    total = math.fsum(weights.values())
    return Mixture(probabilities={domain: weight / total for domain, weight in weights.items()})
