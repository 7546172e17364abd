"""One law over several domains, which predicts a domain that is new to it from the beginning of one run.

D-CPT Law's extension (Que et al. 2024, arXiv 2406.01375, section 'Cross-Domain'): the constants are shared by all
domains, and what is a domain's own is its learnability K,

    L(N, D, r, K) = E + A/N^α + B·r^η/D^β + C/(r + ε)^γ + F/K^μ,    K = w/k₁ + (1 − w)·k₂

k₁ is the loss before any training and k₂ its fall from there to the first measurement, over ln of the tokens: an easy
domain begins with a small loss and falls fast, so that K is large. Both are known after the first measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from ddk.errors import UserError
from ddk.laws.points import DomainPoints, Vector

_FEWEST_DOMAINS = 4
_BOUNDS = ((0.01, 3.0), (0.01, 3.0), (0.01, 3.0), (1e-3, 1.0), (0.01, 3.0), (0.0, 1.0))
"""Of β, η, γ, ε, μ, w."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What is known of a domain at the start of one run."""

    first: float
    """k₁: the loss before any training, in nats."""
    fall: float
    """k₂: (k₁ − loss after the first interval)/ln(1 + tokens of the interval in units of the fit)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossLaw:
    """Fitted constants, D in `unit` tokens."""

    coefficients: tuple[float, ...]
    """E, B, C, F"""
    exponents: tuple[float, ...]
    """β, η, γ, ε, μ, w"""
    unit: float

    def losses(self, tokens: Vector, share: Vector, beginning: Beginning) -> Vector:
        """Predicted losses [n] of a domain with this beginning, at D tokens [n] and its share r [n]."""
        columns = _columns(np.array(self.exponents), tokens / self.unit, share, *_both(beginning, len(tokens)))
        return np.asarray(columns @ np.array(self.coefficients))


def beginning(first: float, after: float, tokens: float, unit: float) -> Beginning:
    """From the loss before any training and that after so many tokens."""
    return Beginning(first=first, fall=(first - after) / math.log1p(tokens / unit))


def unit_of(points: Mapping[str, DomainPoints]) -> float:
    """Tokens that D is counted in: the geometric mean over the points."""
    return float(np.exp(np.mean([np.log(one.tokens).mean() for one in points.values()])))


def fit_across(points: Mapping[str, DomainPoints], beginnings: Mapping[str, Beginning]) -> CrossLaw:
    """One law to the points of all domains.

    Raises:
        UserError: there are too few domains, or students of several sizes.
    """
    if len(points) < _FEWEST_DOMAINS:
        raise UserError(
            f"a law across domains needs at least {_FEWEST_DOMAINS} domains, and the runs have {len(points)}"
        )
    if any(len(one.sizes) > 1 for one in points.values()):
        raise UserError("a law across domains is fitted to one size of student; choose runs of one with --runs")
    unit = unit_of(points)
    tokens = np.concatenate([one.tokens for one in points.values()]) / unit
    share = np.concatenate([one.own for one in points.values()])
    losses = np.concatenate([one.losses for one in points.values()])
    first, fall = (
        np.concatenate([np.full(len(one.tokens), getattr(beginnings[domain], name)) for domain, one in points.items()])
        for name in ("first", "fall")
    )

    def distance(exponents: Vector) -> float:
        columns = _columns(exponents, tokens, share, first, fall) / losses[:, None]
        return float(nnls(columns, np.ones(len(losses)))[1])

    starts = [
        np.array([beta, eta, gamma, 0.1, mu, w])
        for beta in (0.1, 0.5)
        for eta in (0.1, 0.5)
        for gamma in (0.2, 0.6)
        for mu in (0.3, 1.0)
        for w in (0.3, 0.9)
    ]
    best = min(
        (minimize(distance, one, method="L-BFGS-B", bounds=_BOUNDS) for one in sorted(starts, key=distance)[:4]),
        key=lambda found: float(found.fun),
    )
    columns = _columns(best.x, tokens, share, first, fall) / losses[:, None]
    coefficients, _ = nnls(columns, np.ones(len(losses)))
    return CrossLaw(coefficients=tuple(coefficients.tolist()), exponents=tuple(best.x.tolist()), unit=unit)


def _columns(exponents: Vector, tokens: Vector, share: Vector, first: Vector, fall: Vector) -> Vector:
    beta, eta, gamma, epsilon, mu, w = exponents
    learnability = np.maximum(w / first + (1.0 - w) * fall, 1e-6)
    return np.stack(
        [
            np.ones_like(tokens),
            np.maximum(share, 1e-12) ** eta * tokens**-beta,
            (share + epsilon) ** -gamma,
            learnability**-mu,
        ],
        axis=1,
    )


def _both(known: Beginning, count: int) -> tuple[Vector, Vector]:
    return np.full(count, known.first), np.full(count, known.fall)
