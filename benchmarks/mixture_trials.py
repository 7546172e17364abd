"""Rules that were tried and are no methods of the product: what they are, so that bench_mixtures.py can run them again.

    velocity   r ∝ r·exp(V), V_i = (g_i − g*_i)/(g_i at the start − g*_i), not capped at 1 (after Velocitune,
               arXiv 2411.14318): a domain that has come less far than others towards its goal is drawn more
    slope      (1 − ε)·slope + ε·softmax(g/τ): what a token brings on a domain, as measured over the last interval
               (after ADO, arXiv 2410.11820), beside a weight on the domains that lag
    kept slope half of what a token brings, and half of ddk_retain's mixture: (1 − ε)·slope + ε·retain

g_i = ln ℓ_S[i] − ln ℓ_T[i]. The goal g*_i is the gap that a power law through the run so far foretells for the last
step; before there are four measurements, 0.4 of the first gap. Both keep (1 − α)/N for every domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy.optimize import curve_fit

from ddk.methods.base import Measured
from ddk.methods.retain import DDK_RETAIN
from ddk.mixture import MixtureConfig, equal_mixture, exponentiated_mixture, weighted_mixture
from ddk.values import Mixture

ENOUGH, FIRST_GOAL = 4, 0.4
EPSILON, TEMPERATURE = 0.5, 0.25


def velocity(now: Measured, config: MixtureConfig) -> Mixture:
    gaps = _gaps(now)
    if now.previous is None:
        return equal_mixture(gaps)
    first = {gap.domain: math.log(gap.ratio) for gap in now.past[0].gaps}
    goals = {domain: _goal(now, domain, first[domain]) for domain in gaps}
    speed = {d: (gaps[d] - goals[d]) / max(1e-6, first[d] - goals[d]) for d in gaps}
    return exponentiated_mixture(now.previous, speed, config.alpha)


def slope(now: Measured, config: MixtureConfig) -> Mixture:
    gaps = _gaps(now)
    rise = {domain: gap / TEMPERATURE for domain, gap in gaps.items()}
    return _sloped(now, exponentiated_mixture(equal_mixture(gaps), rise, config.alpha), config.alpha)


def kept_slope(now: Measured, config: MixtureConfig) -> Mixture:
    return _sloped(now, DDK_RETAIN.next_mixture(now, config), config.retain_alpha)


def _sloped(now: Measured, lagging: Mixture, alpha: float) -> Mixture:
    """Half by slope, half by the mixture that is given."""
    if now.previous is None:
        return lagging
    before = {gap.domain: math.log(gap.student_ppl) for gap in now.past[-1].gaps}
    gains = {
        domain: max(0.0, before[domain] - math.log(ppl)) / now.previous.probabilities[domain]
        for domain, ppl in now.student_ppl.items()
    }
    total = math.fsum(gains.values())
    share = {domain: gain / total if total > 0.0 else 1.0 / len(gains) for domain, gain in gains.items()}
    uniform = (1.0 - alpha) / len(gains)
    return weighted_mixture(
        {d: (1.0 - EPSILON) * (alpha * share[d] + uniform) + EPSILON * lagging.probabilities[d] for d in gains}
    )


TRIALS: Mapping[str, Callable[[Measured, MixtureConfig], Mixture]] = {
    "velocity": velocity,
    "slope": slope,
    "kept slope": kept_slope,
}


def _gaps(now: Measured) -> dict[str, float]:
    return {domain: math.log(ppl) - math.log(now.teacher_ppl[domain]) for domain, ppl in now.student_ppl.items()}


def _goal(now: Measured, domain: str, first: float) -> float:
    """The gap at the last step by L(n) = E + B·(1 + n)^−β, n the blocks' shares so far; below the first gap."""
    losses = [math.log(gap.student_ppl) for one in now.past for gap in one.gaps if gap.domain == domain]
    losses.append(math.log(now.student_ppl[domain]))
    if len(losses) < ENOUGH:
        return FIRST_GOAL * first
    drawn = np.cumsum([0.0, *(one.mixture.probabilities[domain] for one in now.past)])
    last = drawn[-1] / max(now.progress, 1e-6)
    try:
        (floor, rise, beta), _ = curve_fit(
            lambda n, e, b, beta: e + b * (1.0 + n) ** -beta,
            drawn,
            np.array(losses),
            p0=(0.8 * losses[-1], 0.2 * losses[0], 0.5),
            bounds=([0.0, 0.0, 0.05], [20.0, 20.0, 3.0]),
        )
    except RuntimeError:  # no fit
        return FIRST_GOAL * first
    expected = float(floor + rise * (1.0 + last) ** -beta) - math.log(now.teacher_ppl[domain])
    return min(expected, 0.95 * first)
