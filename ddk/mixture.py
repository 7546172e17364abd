"""Equations 1 and 2 of the paper, which turn perplexities into the next sampling mixture; also fixed mixtures.

r is the paper's domain discrepancy factor, ℓ_S and ℓ_T the perplexities of student and teacher on a domain's
validation set. Everything is computed in log space: a ratio of 800 does not overflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from ddk.section import MOST_STEPS, Section
from ddk.values import DomainGap, Mixture

GapMeasure = Literal["ratio", "log"]
"""How far a student lags on a domain: ℓ_S/ℓ_T as in the paper, or ln ℓ_S − ln ℓ_T, in nats."""

Followed = Literal["gap", "accuracy", "both"]
"""What a mixture follows: the gap of the perplexities, the weakness that benchmarks measured by concept, or both."""

NamedWeights = Literal["equal", "proportional"]
"""A fixed mixture that needs no numbers: every domain equally often, or each by its number of blocks."""


class MixtureConfig(Section):
    """Which domains the sampler draws from, and how it follows the gap."""

    interval: int = Field(default=1000, ge=1, le=MOST_STEPS)
    """Number of optimizer steps under one mixture (the paper's K)."""
    evaluation: Literal["inline", "scheduled"] = "inline"
    """Who measures the gap. With 'inline', the training itself measures it after each interval. With 'scheduled', the
    flow `rebalance` measures it on another worker and its own schedule; the training then takes the newest mixture at
    the start of each interval without waiting for one, and measures the gap only before its first step and after its
    last."""
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Smoothing coefficient α of Eq. 2: every domain keeps at least (1 − α)/N."""
    gap: GapMeasure = "ratio"
    """Gap that Eq. 1 and Eq. 2 (methods ddk and ddk_no_smoothing) exponentiate: 'ratio' is the paper's ℓ_S/ℓ_T; 'log'
    is ln ℓ_S − ln ℓ_T, in nats. Near a ratio of 1 both give the same mixtures. At ratios of 2 and more, 'ratio'
    concentrates the mixture on few domains, and at very large ratios on a single one; 'log' does not."""
    follow: Followed = "gap"
    """What the mixture follows (methods ddk and ddk_retain): 'gap', the perplexities, as the method says; 'accuracy',
    the concepts that are weak in the benchmarks of `accuracy_run`, level by level along the domains' paths; 'both',
    the gap's mixture, tilted towards the weak concepts. See docs/training.md."""
    accuracy_run: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """With `follow: accuracy` or `both`: a run in the same root that `ddk eval` has asked questions with a path. What
    it stored is read when training starts; no benchmark is run in training."""
    accuracy_model: Literal["student", "before"] = "student"
    """Whose accuracy it is: that run's distilled student, or its student before distillation."""
    accuracy_temperature: float = Field(default=0.25, ge=1e-3, le=1e3)
    """Difference in accuracy τ by which a concept must be weaker than its sibling to be drawn e times as much. Smaller
    values follow the weakest concepts more closely."""
    retain_alpha: float = Field(default=0.8, ge=0.0, le=1.0)
    """With ddk_retain, in place of `alpha`: every domain keeps at least (1 − α)/N."""
    retain_temperature: float = Field(default=0.4, ge=1e-3, le=1e3)
    """With ddk_retain: gap τ, in nats, by which a domain must lag further to be drawn e times as much. Smaller values
    follow the largest gap more closely."""
    retain_weight: float = Field(default=3.5, ge=0.0, le=1e3)
    """With ddk_retain: weight κ of what the student has lost since the start of the run. At the end of the run, the
    domain on which it has lost most is drawn exp(κ) times as much as if it had lost nothing, before normalisation; the
    others in proportion to their losses. 0 lets domains be forgotten."""
    retain_tolerance: float = Field(default=0.015, ge=1e-6, le=1e3)
    """With ddk_retain: loss f₀, in nats, from which the domain that lost most has that whole weight; smaller losses
    have less."""
    initial: Literal["gap", "proportional"] = "gap"
    """Mixture of the first interval, for methods that follow the gap: 'gap' is the method's own (Eq. 1; uniform with
    cpt_doremi); 'proportional' draws uniformly over all blocks, as Algorithm 1 of the paper does before its first
    update."""
    level: int | None = Field(default=None, ge=1, le=100)
    """Number of parts of the domains' paths at which the mixture is kept. With 1, Eq. 1 and Eq. 2 treat `math/algebra`
    and `math/geometry` as one domain `math`, whose leaves are drawn in proportion to their numbers of blocks. If empty,
    every leaf has its own probability. Gaps are always measured and reported for each leaf."""
    weights: NamedWeights | dict[str, float] | None = None
    """Mixture of the methods that do not follow the gap (kd, cpt, minillm, ddk_equal, ted): 'equal', 'proportional' (to
    the domains' numbers of blocks), or a positive weight for each domain (cut to `level`). Default: the method's
    own."""
    stop_ratio: float | None = Field(default=None, ge=0.0)
    """Stop early once the largest ℓ_S/ℓ_T of all domains (or leaves, at any `level`) is at most this ratio, e.g. 1.05.
    By default, training never stops early."""
    domain_stop_ratio: float | None = Field(default=None, ge=0.0)
    """A domain (or leaf, at any `level`) whose ℓ_S/ℓ_T is at most this ratio keeps no more than the floor (1 − α)/N,
    until its ratio rises above it again. The others share what it leaves. For methods that follow the gap. By default,
    a domain that has caught up is drawn as the method says."""
    doremi_step: float = Field(default=1.0, ge=0.0, le=1e6)
    """With cpt_doremi: step size η of the domain weights, per nat of excess loss."""
    doremi_smoothing: float = Field(default=1e-3, ge=0.0, le=1.0)
    """With cpt_doremi: smoothing c, with which every domain keeps at least c/N."""
    reference_run: str | None = Field(default=None, min_length=1)
    """With cpt_doremi: a finished run in the same root, on the same domains, whose student is the reference. Default:
    the teacher is the reference."""

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_are_positive(cls, weights: Any) -> Any:
        if isinstance(weights, Mapping):
            for domain, weight in weights.items():
                number = isinstance(weight, int | float) and not isinstance(weight, bool)
                if not (number and math.isfinite(weight) and weight > 0.0):
                    raise ValueError(f"the weight of '{domain}' is {weight}; it must be a positive number")
        elif weights not in (None, "equal", "proportional"):
            raise ValueError("it must be 'equal', 'proportional', or a weight for each domain")
        return weights


def initial_mixture(
    student_ppl: Mapping[str, float], teacher_ppl: Mapping[str, float], gap: GapMeasure = "ratio"
) -> Mixture:
    """Eq. 1: r_0[i] = exp(ℓ_S[i]/ℓ_T[i]) / Σ_j exp(ℓ_S[j]/ℓ_T[j]).

    Args:
        student_ppl: perplexity exp(mean cross-entropy per token) by domain.
        teacher_ppl: likewise; the same domains.
        gap: 'log' puts ln ℓ_S − ln ℓ_T in the place of the ratio, so that r_0[i] is in proportion to the ratio itself.

    Raises:
        ValueError: domains differ, there are none, or a perplexity is not a positive finite number.
    """
    return _softmax(_gaps(student_ppl, teacher_ppl, gap))


def update_mixture(
    mixture: Mixture | Mapping[str, float],
    student_ppl: Mapping[str, float],
    teacher_ppl: Mapping[str, float],
    alpha: float,
    gap: GapMeasure = "ratio",
) -> Mixture:
    """Eq. 2: ψ[i] = r_t[i] · exp(ℓ_S[i]/ℓ_T[i]); r_{t+1}[i] = α · ψ[i]/Σ_j ψ[j] + (1 − α)/N.

    Args:
        mixture: r_t, the mixture of the interval that has just ended.
        student_ppl: measured now, by domain.
        teacher_ppl: likewise.
        alpha: smoothing coefficient in [0, 1].
        gap: 'log' puts ln ℓ_S − ln ℓ_T in the place of the ratio, so that ψ[i] = r_t[i] · ℓ_S[i]/ℓ_T[i].

    Raises:
        ValueError: as `initial_mixture`; also an `alpha` outside [0, 1], or other domains in the mixture.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    old = mixture if isinstance(mixture, Mixture) else Mixture(probabilities=mixture)
    return exponentiated_mixture(old, _gaps(student_ppl, teacher_ppl, gap), alpha)


def exponentiated_mixture(old: Mixture, rise: Mapping[str, float], share: float) -> Mixture:
    """ψ[i] = old[i] · exp(rise[i]); share · ψ[i]/Σ_j ψ[j] + (1 − share)/N.

    Args:
        rise: by domain, finite, of any size.
        share: in [0, 1]; the rest is spread equally.

    Raises:
        ValueError: the domains differ.
    """
    if set(old.domains) != set(rise):
        raise ValueError(f"the mixture has domains {sorted(old.domains)}, the perplexities {sorted(rise)}")
    log_psi = {domain: math.log(r) + rise[domain] if r > 0.0 else -math.inf for domain, r in old.probabilities.items()}
    psi = _softmax(log_psi).probabilities
    uniform = 1.0 / len(psi)
    return weighted_mixture({domain: share * psi[domain] + (1.0 - share) * uniform for domain in psi})


def equal_mixture(domains: Iterable[str]) -> Mixture:
    """The same probability for every domain."""
    return weighted_mixture(dict.fromkeys(domains, 1.0))


def proportional_mixture(sizes: Mapping[str, int]) -> Mixture:
    """Each domain by its number of blocks: uniform over the corpus."""
    return weighted_mixture({domain: float(size) for domain, size in sizes.items()})


def fixed_mixture(weights: NamedWeights | Mapping[str, float], sizes: Mapping[str, int]) -> Mixture:
    """The mixture of `MixtureConfig.weights`.

    Args:
        sizes: train blocks by domain.

    Raises:
        ValueError: weights by hand that are not of exactly these domains.
    """
    if weights == "equal":
        return equal_mixture(sizes)
    if weights == "proportional":
        return proportional_mixture(sizes)
    if missing := sorted(set(sizes) - set(weights)):
        raise ValueError(f"domain '{missing[0]}' has no weight; give one to each of {', '.join(sorted(sizes))}")
    if unknown := sorted(set(weights) - set(sizes)):
        raise ValueError(f"there is no domain '{unknown[0]}'; the domains are {', '.join(sorted(sizes))}")
    return weighted_mixture({domain: float(weights[domain]) for domain in sizes})


def weighted_mixture(weights: Mapping[str, float]) -> Mixture:
    """Probabilities in proportion to weights, which are not negative and not all 0."""
    total = math.fsum(weights.values())
    return Mixture(probabilities={domain: weight / total for domain, weight in weights.items()})


def one_domain_alone(mixture: Mixture, ratios: Mapping[str, float], config: MixtureConfig) -> str | None:
    """What to say of a mixture that draws from one domain as good as alone, because the ratios lie so far apart.

    exp of a ratio leaves nothing to domains whose ratio is less by 5 and more. A student cut out of its teacher, or of
    random weights, lags by factors of thousands in every domain, and is better off with all of them.

    Args:
        ratios: ℓ_S/ℓ_T by domain.

    Returns:
        A sentence without its full stop; None where several domains are drawn, or the ratio is not what is followed.
    """
    if len(ratios) < 2 or config.gap != "ratio" or config.follow == "accuracy":
        return None
    domain = max(mixture.probabilities, key=mixture.probabilities.__getitem__)
    if mixture.probabilities[domain] < 0.99 or domain not in ratios:
        return None
    others = max(ratio for name, ratio in ratios.items() if name != domain)
    if ratios[domain] <= others:
        return None
    return (
        f"the first interval draws from '{domain}' alone: its ratio is {ratios[domain]:.3g}, and that of every other "
        f"domain at most {others:.3g}. For a student so far behind set mixture.gap: log, and mixture.initial: "
        f"proportional to begin with all domains"
    )


def capped_mixture(mixture: Mixture, most: Mapping[str, float]) -> Mixture:
    """The mixture in which some domains have at most the given probability; the others share the rest in proportion.

    Where no other domain is drawn, nobody could take the rest, and the mixture stays as it is.

    Example: of a 0.6, b 0.3, c 0.1, with a at most 0.2: a 0.2, b 0.6, c 0.2.

    Args:
        most: the largest probability, by domain that is capped.
    """
    kept = {domain: min(p, most[domain]) for domain, p in mixture.probabilities.items() if domain in most}
    others = math.fsum(p for domain, p in mixture.probabilities.items() if domain not in most)
    if others <= 0.0:
        return mixture
    free = 1.0 - math.fsum(kept.values())
    return Mixture(
        probabilities={
            domain: kept[domain] if domain in kept else p / others * free for domain, p in mixture.probabilities.items()
        }
    )


def caught_up(gaps: Sequence[DomainGap], stop_ratio: float | None) -> bool:
    """Whether the stop criterion holds: every domain's ℓ_S/ℓ_T is at or below `stop_ratio`."""
    return stop_ratio is not None and all(gap.ratio <= stop_ratio for gap in gaps)


def check_perplexities(**by_model: Mapping[str, float]) -> None:
    """That the models' perplexities are of the same domains, and numbers.

    Args:
        by_model: perplexities by domain, under the model's name: `student=…, teacher=…`.

    Raises:
        ValueError: domains differ, there are none, or a perplexity is not a positive finite number.
    """
    domains = [set(perplexities) for perplexities in by_model.values()]
    if not domains[0] or any(one != domains[0] for one in domains):
        raise ValueError(
            f"{' and '.join(by_model)} need perplexities of the same domains, at least one; "
            + ", ".join(f"the {who} has {sorted(perplexities)}" for who, perplexities in by_model.items())
        )
    for who, perplexities in by_model.items():
        for domain, value in perplexities.items():
            if not (math.isfinite(value) and value > 0.0):
                raise ValueError(f"the {who}'s perplexity on '{domain}' is {value}; it must be positive and finite")


def _gaps(student_ppl: Mapping[str, float], teacher_ppl: Mapping[str, float], gap: GapMeasure) -> dict[str, float]:
    check_perplexities(student=student_ppl, teacher=teacher_ppl)
    if gap == "log":
        return {domain: math.log(student_ppl[domain]) - math.log(teacher_ppl[domain]) for domain in student_ppl}
    return {domain: student_ppl[domain] / teacher_ppl[domain] for domain in student_ppl}


def _softmax(logits: Mapping[str, float]) -> Mixture:
    largest = max(logits.values())
    return weighted_mixture({domain: math.exp(value - largest) for domain, value in logits.items()})
