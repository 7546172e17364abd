"""Fits a law to the points of one domain.

The objective is the mean Huber loss of ln L̂ − ln L (δ = 0.01, as for Data Mixing Laws), minimised by L-BFGS-B from the
best of a grid of starts: for every choice of exponents the coefficients come from a non-negative least squares problem.
For 'dcpt' the paper asks that the loss falls with the domain's share; a penalty holds the fit to that over the range of
the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize, nnls

from ddk.errors import UserError
from ddk.laws.forms import CHINCHILLA_ALPHA, FORMS, FormName, Inputs, Shape
from ddk.laws.points import DomainPoints, Vector, check_enough

_In = TypeVar("_In")
_Out = TypeVar("_Out")
DELTA = 0.01
POLISHED = 4
"""Starts that L-BFGS goes on from."""
_PENALTY = 1e6
_PLACES = 12
"""Shares at which the sign condition is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What the points reach over: smallest and largest."""

    parameters: tuple[float, float]
    tokens: tuple[float, float]
    share: tuple[float, float]
    """Of the domain itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A fitted law of one domain."""

    domain: str
    domains: tuple[str, ...]
    form: FormName
    sized: bool
    """Whether it has a term in N; else it holds for the one size of its points."""
    theta: tuple[float, ...]
    """The constants as `Shape` has them, N and D in `units`."""
    units: tuple[float, float]
    span: Span

    @property
    def shape(self) -> Shape:
        return Shape(self.form, len(self.domains), self.sized)

    def losses(self, parameters: Vector | float, tokens: Vector | float, shares: Vector) -> Vector:
        """Predicted losses, in nats per token.

        Args:
            parameters: N, without embeddings, [n] or one.
            tokens: D, [n] or one.
            shares: [n, m], or [m] for one mixture; of `domains`, in their order.
        """
        rows = np.atleast_2d(np.asarray(shares, dtype=np.float64))
        count = max(len(rows), np.size(parameters), np.size(tokens))
        at = Inputs(
            parameters=np.broadcast_to(np.asarray(parameters, dtype=np.float64) / self.units[0], count),
            tokens=np.broadcast_to(np.asarray(tokens, dtype=np.float64) / self.units[1], count),
            shares=np.broadcast_to(rows, (count, rows.shape[1])),
            own=self.domains.index(self.domain),
        )
        return self.shape.losses(np.array(self.theta), at)

    @property
    def constants(self) -> dict[str, float]:
        """By name, for N in parameters and D in tokens (n₀ and τ in tokens too)."""
        shape, (size, tokens) = self.shape, self.units
        count = len(shape.coefficients)
        found = dict(zip(shape.coefficients, np.exp(self.theta[:count]).tolist(), strict=True))
        found |= dict(zip(shape.exponents, self.theta[count:], strict=True))
        for name in {"B", "k"} & set(found):
            found[name] *= tokens ** found["beta"]
        if "A" in found:
            found["A"] *= size ** found["alpha"]
        for name in {"n0", "tau"} & set(found):
            found[name] *= tokens
        return found

    def outside(self, parameters: float, tokens: float, share: float) -> list[str]:
        """In words, where a place lies outside what the law was fitted to; empty inside."""
        said: list[str] = []
        asked = {"parameters": parameters, "tokens": tokens, "share": share}
        for name, value in asked.items():
            low, high = getattr(self.span, name)
            if not low * (1 - 1e-6) - 1e-9 <= value <= high * (1 + 1e-6) + 1e-9:
                said.append(f"{name} {value:.4g} (fitted to {low:.4g} to {high:.4g})")
        return said


def fit(points: DomainPoints, form: FormName, *, polished: int = POLISHED) -> Law:
    """The law of this form that fits the points best.

    Args:
        polished: how many of the grid's best starts L-BFGS goes on from.

    Raises:
        UserError: the points do not determine one.
    """
    check_enough(points)
    problem = _Problem.of(points, form)
    return problem.law(problem.best(problem.starts()[:polished]))


def refit(law: Law, points: DomainPoints, weights: Vector) -> Law:
    """The law again with each point counted so often, from where it stands: one resampling of a bootstrap."""
    problem = _Problem.of(points, law.form, units=law.units, weights=weights, sized=law.sized)
    return problem.law(problem.best([np.array(law.theta)]))


def fit_all(points: Mapping[str, DomainPoints], form: FormName, *, workers: int = 1) -> dict[str, Law]:
    """A law for each domain, side by side.

    Raises:
        UserError: as `fit`.
    """
    for one in points.values():
        check_enough(one)
    return dict(zip(points, side_by_side(partial(_fit, form=form), list(points.values()), workers), strict=True))


def _fit(points: DomainPoints, form: FormName) -> Law:
    return fit(points, form)


def side_by_side(work: Callable[[_In], _Out], on: Sequence[_In], workers: int) -> list[_Out]:
    """`work` on each, in as many processes."""
    if workers <= 1 or len(on) <= 1:
        return [work(one) for one in on]
    with ProcessPoolExecutor(min(workers, len(on)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(work, on))


def huber(residuals: Vector, weights: Vector | None = None) -> float:
    """Mean Huber loss of residuals of ln L."""
    small = np.abs(residuals) <= DELTA
    each = np.where(small, 0.5 * residuals**2, DELTA * (np.abs(residuals) - 0.5 * DELTA))
    return float(np.average(each, weights=weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    points: DomainPoints
    shape: Shape
    units: tuple[float, float]
    at: Inputs
    logs: Vector
    """ln L, [n]"""
    weights: Vector
    """[n], of mean 1"""
    edge: Inputs | None
    """Where the loss must fall with the share: `_PLACES` shares at the first D, then at the last."""

    @classmethod
    def of(
        cls,
        points: DomainPoints,
        form: FormName,
        *,
        units: tuple[float, float] | None = None,
        weights: Vector | None = None,
        sized: bool | None = None,
    ) -> _Problem:
        units = units or (_middle(points.parameters), _middle(points.tokens))
        own = points.domains.index(points.domain)
        weights = np.ones(len(points.losses)) if weights is None else weights
        sized = len(points.sizes) > 1 if sized is None else sized
        return cls(
            points=points,
            shape=Shape(form, len(points.domains), sized, CHINCHILLA_ALPHA if len(points.sizes) == 2 else None),
            units=units,
            at=Inputs(
                parameters=points.parameters / units[0],
                tokens=points.tokens / units[1],
                shares=points.shares,
                own=own,
            ),
            logs=np.log(points.losses),
            weights=weights / weights.mean(),
            edge=_edge(points, units, own) if form == "dcpt" else None,
        )

    def starts(self) -> list[Vector]:
        """The best of the grid."""
        kept = sorted(self._grid(), key=lambda found: found[0])[:POLISHED]
        return [theta for _, theta in kept]

    def _grid(self) -> Iterator[tuple[float, Vector]]:
        scale = 1.0 / self.points.losses
        for exponents in self.shape.grid():
            columns, _ = self.shape.columns(exponents, self.at)
            coefficients, distance = nnls(columns * scale[:, None], np.ones_like(scale))
            yield float(distance), np.concatenate([np.log(np.maximum(coefficients, 1e-6)), exponents])

    def best(self, starts: Sequence[Vector]) -> Vector:
        found = [
            minimize(
                self.objective, start, jac=True, method="L-BFGS-B", bounds=self.shape.bounds, options={"maxiter": 500}
            )
            for start in starts
        ]
        best = min(found, key=lambda one: float(one.fun) if math.isfinite(one.fun) else math.inf)
        if not math.isfinite(best.fun):
            raise UserError(
                f"no law of the form '{self.shape.form}' fits domain '{self.points.domain}'; look at its losses with "
                f"`ddk inspect`, or take another --form ({', '.join(FORMS)})"
            )
        return np.asarray(best.x)

    def objective(self, theta: Vector) -> tuple[float, Vector]:
        losses, slopes = self.shape.losses_and_slopes(theta, self.at)
        residuals = np.log(losses) - self.logs
        bent = np.clip(residuals, -DELTA, DELTA)
        value = huber(residuals, self.weights)
        gradient = (self.weights * bent / losses) @ slopes / len(losses)
        if self.edge is None:
            return value / DELTA**2, gradient / DELTA**2
        penalty, by_theta = self._penalty(theta, self.edge)
        return value / DELTA**2 + penalty, gradient / DELTA**2 + by_theta

    def _penalty(self, theta: Vector, edge: Inputs) -> tuple[float, Vector]:
        """The squares of the rises of the loss from one share to the next."""
        losses, slopes = self.shape.losses_and_slopes(theta, edge)
        rises = np.diff(losses.reshape(2, _PLACES), axis=1)
        by_theta = np.diff(slopes.reshape(2, _PLACES, -1), axis=1)
        over = np.maximum(rises, 0.0)
        return _PENALTY * float(np.sum(over**2)), 2.0 * _PENALTY * np.einsum("dp,dpt->t", over, by_theta)

    def law(self, theta: Vector) -> Law:
        return Law(
            domain=self.points.domain,
            domains=self.points.domains,
            form=self.shape.form,
            sized=self.shape.sized,
            theta=tuple(theta.tolist()),
            units=self.units,
            span=Span(
                parameters=_ends(self.points.parameters),
                tokens=_ends(self.points.tokens),
                share=_ends(self.points.own),
            ),
        )


def _edge(points: DomainPoints, units: tuple[float, float], own: int) -> Inputs:
    low, high = _ends(points.own)
    places = np.linspace(max(low, 1e-3), max(high, 2e-3), _PLACES)
    shares = np.zeros((2 * _PLACES, len(points.domains)))
    shares[:, own] = np.tile(places, 2)
    ends = np.repeat(np.array(_ends(points.tokens)) / units[1], _PLACES)
    return Inputs(parameters=np.ones(2 * _PLACES), tokens=ends, shares=shares, own=own)


def _ends(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _middle(values: npt.NDArray[np.float64]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))
