"""One law over several domains, which predicts a domain that is new to it from the beginning of one run.

Of a new domain three numbers are known after the first interval of a run: the student's loss before training k₁, its
loss k₂ after D₀ tokens of which the domain had the share r₀, and the teacher's loss L_T, which is in the cache. The law
goes through the first two, and towards the third:

    L(D, r) = L_T + (k₁ − L_T)/(1 + s·((r + t)·D)^β) + F·(1 − r)^φ·(1 − exp(−D/τ)),     s so that L(D₀, r₀) = k₂

What the student has left to learn from the teacher shrinks with the domain's own tokens, to which the others' add a
share t; the last term is what these make it forget (`ddk.laws.forms`). β, t, F, φ and τ are shared by all domains and
fitted to those that are known; s is a domain's own, and is not fitted.

D-CPT Law's own extension (Que et al. 2024, arXiv 2406.01375, 'Cross-Domain') predicts a loss from constants that all
domains share and a term F/K^μ of the domain's learnability, made of k₁ and its first fall. It places the whole level of
a domain by K, and for each student of ours it was worse than to say that the loss stays at k₂ (docs/predicting.md).
That is why it is not kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from ddk.errors import UserError
from ddk.laws.fitting import DELTA, POLISHED, huber
from ddk.laws.forms import forgotten
from ddk.laws.points import DomainPoints, Vector

_FEWEST_DOMAINS = 4
_BOUNDS = ((0.05, 3.0), (1e-4, 10.0), (1e-5, 3.0), (0.1, 6.0), (1e-3, 1e2))
"""Of β, t, F, φ, τ."""
_GRID = ((0.3, 1.0), (0.03, 0.3), (0.01, 0.3), (1.0, 3.0), (0.1, 1.0))
_LEFT = 0.05
"""Share of k₁ − L_T that is left after the first interval, at least: below it, s would follow from noise."""
_LEAST = 0.01
"""Nats between k₁ and what the loss goes towards, at least: a student may begin below its teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What is known of a domain at the start of one run."""

    first: float
    """k₁: the loss before any training, in nats per token."""
    after: float
    """k₂: the loss at the first measurement after it."""
    tokens: float
    """D₀: tokens of all domains before that measurement."""
    share: float
    """r₀: the domain's share of them."""
    teacher: float
    """L_T: the teacher's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossLaw:
    """Fitted constants, D and τ in `unit` tokens."""

    constants: tuple[float, ...]
    """β, t, F, φ, τ"""
    unit: float

    def losses(self, tokens: Vector, share: Vector, beginning: Beginning) -> Vector:
        """Predicted losses [n] of a domain with this beginning, at D tokens [n] and its share r [n]."""
        known = _columns([beginning], np.zeros(len(tokens), dtype=np.int64))
        return _losses(np.array(self.constants), tokens, share, known, self.unit)


def fit_across(points: Mapping[str, DomainPoints], beginnings: Mapping[str, Beginning]) -> CrossLaw:
    """One law to the points of all domains: the mean Huber loss of ln L̂ − ln L, by L-BFGS from a grid of starts.

    Raises:
        UserError: there are too few domains, or students of several sizes.
    """
    if len(points) < _FEWEST_DOMAINS:
        raise UserError(
            f"a law across domains needs at least {_FEWEST_DOMAINS} domains, and the runs have {len(points)}"
        )
    if any(len(one.sizes) > 1 for one in points.values()):
        raise UserError("a law across domains is fitted to one size of student; choose runs of one with --runs")
    unit = float(np.exp(np.mean([np.log(one.tokens).mean() for one in points.values()])))
    tokens = np.concatenate([one.tokens for one in points.values()])
    share = np.concatenate([one.own for one in points.values()])
    losses = np.concatenate([one.losses for one in points.values()])
    domain = np.repeat(np.arange(len(points)), [len(one.tokens) for one in points.values()])
    known = _columns([beginnings[name] for name in points], domain)

    def distance(logarithms: Vector) -> float:
        return huber(np.log(_losses(np.exp(logarithms), tokens, share, known, unit) / losses)) / DELTA**2

    starts = sorted((np.log(start) for start in itertools.product(*_GRID)), key=distance)
    found = [minimize(distance, one, method="L-BFGS-B", bounds=np.log(_BOUNDS)) for one in starts[:POLISHED]]
    best = min(found, key=lambda one: float(one.fun))
    return CrossLaw(constants=tuple(np.exp(best.x).tolist()), unit=unit)


def _columns(beginnings: list[Beginning], domain: npt.NDArray[np.int64]) -> dict[str, Vector]:
    """What is known of the domain of each place, [n] each."""
    return {
        name: np.array([getattr(one, name) for one in beginnings], dtype=np.float64)[domain]
        for name in Beginning.__slots__
    }


def _losses(constants: Vector, tokens: Vector, share: Vector, known: Mapping[str, Vector], unit: float) -> Vector:
    beta, t, most, phi, tau = constants
    towards = np.minimum(known["teacher"], known["first"] - _LEAST)
    whole = known["first"] - towards
    at_first = most * forgotten(known["tokens"] / unit, known["share"], tau, phi)
    left = np.clip((known["after"] - at_first - towards) / whole, _LEFT, 1.0)
    speed = (1.0 / left - 1.0) / ((known["share"] + t) * known["tokens"] / unit) ** beta
    learnt = speed * ((share + t) * tokens / unit) ** beta
    return np.asarray(towards + whole / (1.0 + learnt) + most * forgotten(tokens / unit, share, tau, phi))
