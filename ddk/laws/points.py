"""What a law is fitted to: the losses of students of known size, after known tokens of a known mixture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ddk.errors import UserError

Vector = npt.NDArray[np.float64]
FEWEST = 8
"""Points of a domain that a fit asks for."""
_ROUNDED = 2
"""Digits to which shares are one ratio: runs with other seeds draw a little differently."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement of one run."""

    run: str
    parameters: float
    """N, of the student, without embeddings."""
    tokens: float
    """D, positions trained on so far; positive."""
    shares: Mapping[str, float]
    """r by domain: its part of these tokens."""
    losses: Mapping[str, float]
    """Cross-entropy on each domain's validation blocks, in nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPoints:
    """The points of one domain, as arrays of n entries."""

    domain: str
    domains: tuple[str, ...]
    """All m, in the order of `shares`."""
    parameters: Vector
    """[n]"""
    tokens: Vector
    """[n]"""
    shares: Vector
    """[n, m]"""
    losses: Vector
    """[n]"""
    runs: tuple[str, ...]
    """The run of each point."""

    @property
    def own(self) -> Vector:
        """The domain's own share, [n]."""
        return self.shares[:, self.domains.index(self.domain)]

    @property
    def sizes(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.parameters.tolist())))

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(sorted(set(np.round(self.own, _ROUNDED).tolist())))

    @property
    def mixtures(self) -> tuple[str, ...]:
        """For each point a label of its run's mixture: the rounded shares at the run's last point."""
        last: dict[str, int] = {}
        for row, run in enumerate(self.runs):
            if run not in last or self.tokens[row] > self.tokens[last[run]]:
                last[run] = row
        labels = {run: " ".join(f"{share:.{_ROUNDED}f}" for share in self.shares[row]) for run, row in last.items()}
        return tuple(labels[run] for run in self.runs)

    def only(self, chosen: npt.NDArray[np.bool_]) -> DomainPoints:
        """The points that are chosen, [n] of bool."""
        return DomainPoints(
            domain=self.domain,
            domains=self.domains,
            parameters=self.parameters[chosen],
            tokens=self.tokens[chosen],
            shares=self.shares[chosen],
            losses=self.losses[chosen],
            runs=tuple(run for run, kept in zip(self.runs, chosen, strict=True) if kept),
        )


def by_domain(points: Sequence[Point]) -> dict[str, DomainPoints]:
    """The points as arrays, domain by domain.

    Raises:
        UserError: there are none, they are of different domains, or a number is none that a law can be fitted to; the
            run is named.
    """
    if not points:
        raise UserError("there is no measurement to fit a law to; train some runs first, or see `ddk law design`")
    domains = tuple(sorted(points[0].losses))
    for point in points:
        _check(point, domains, points[0].run)
    shares = np.array([[point.shares[domain] for domain in domains] for point in points])
    return {
        domain: DomainPoints(
            domain=domain,
            domains=domains,
            parameters=np.array([point.parameters for point in points], dtype=np.float64),
            tokens=np.array([point.tokens for point in points], dtype=np.float64),
            shares=shares,
            losses=np.array([point.losses[domain] for point in points]),
            runs=tuple(point.run for point in points),
        )
        for domain in domains
    }


def _check(point: Point, domains: tuple[str, ...], first: str) -> None:
    if set(point.losses) != set(domains) or set(point.shares) != set(domains):
        raise UserError(
            f"run '{point.run}' has the domains {', '.join(sorted(point.losses))}, run '{first}' "
            f"{', '.join(domains)}; fit one law to runs with the same domains (choose them with --runs)"
        )
    for domain, loss in point.losses.items():
        if not (math.isfinite(loss) and loss > 0.0):
            raise UserError(
                f"run '{point.run}' has the loss {loss} on '{domain}' after {point.tokens:.0f} tokens; a law is "
                f"fitted to positive finite losses: leave the run out with --runs"
            )
    if not (point.tokens > 0 and point.parameters > 0 and math.isfinite(point.tokens * point.parameters)):
        raise UserError(f"run '{point.run}' has {point.tokens} tokens and {point.parameters} parameters at a point")
    if abs(math.fsum(point.shares.values()) - 1.0) > 1e-6 or min(point.shares.values()) < 0.0:
        raise UserError(f"the shares of run '{point.run}' after {point.tokens:.0f} tokens are no parts of 1")


def check_enough(points: DomainPoints) -> None:
    """That a law can be told from these points.

    Raises:
        UserError: too few points, runs, lengths or ratios; it says of what, and how to get more.
    """
    runs = Counter(points.runs)
    here = f"domain '{points.domain}'"
    if len(points.losses) < FEWEST:
        raise UserError(
            f"{here} has {len(points.losses)} measurements in {len(runs)} runs; a law needs at least {FEWEST}: take "
            f"more runs in with --runs, or make them with `ddk law design`"
        )
    if len(points.ratios) < 2:
        raise UserError(
            f"{here} has the share {points.ratios[0]:.2f} in every run; a law needs at least two ratios: add runs "
            f"with other mixture.weights, or make them with `ddk law design`"
        )
    if len(set(points.tokens.tolist())) < 3:
        raise UserError(
            f"the runs of {here} were measured after {len(set(points.tokens.tolist()))} different numbers of tokens; a "
            f"law needs at least three: add longer or shorter runs, or make them with `ddk law design`"
        )
