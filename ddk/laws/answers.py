"""What fitted laws answer before a run: the best mixture, the tokens that a ratio takes, the student's size.

All take one law a domain, of the same domains, and the teacher's losses; all numbers are of one student at the end of a
run with a fixed mixture. Losses in nats per token; the gap of a domain is its loss minus the teacher's, ln(ℓ_S/ℓ_T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize

from ddk.errors import UserError
from ddk.laws.fitting import Law
from ddk.laws.points import Vector

Laws = Mapping[str, Law]
_LEAST = 1e-4
"""Share that every domain keeps, where nothing asks for more."""
_BISECTIONS = 80
_TIE = 1e-3
"""Weight of the mean loss beside the largest gap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where a student ends, as the laws have it."""

    losses: Mapping[str, float]
    ratios: Mapping[str, float]
    """ℓ_S/ℓ_T by domain."""

    @property
    def worst(self) -> float:
        return max(self.ratios.values())

    @property
    def mean(self) -> float:
        """Mean loss over domains: ln of the geometric mean of the perplexities."""
        return math.fsum(self.losses.values()) / len(self.losses)


def outcome(
    laws: Laws, teacher: Mapping[str, float], parameters: float, tokens: float, mixture: Mapping[str, float]
) -> Outcome:
    """The losses at the end of a run under one mixture."""
    losses = dict(zip(laws, _losses(laws, parameters, tokens, _vector(laws, mixture)).tolist(), strict=True))
    return Outcome(losses=losses, ratios={domain: math.exp(loss - teacher[domain]) for domain, loss in losses.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is made small: 'worst' the largest gap, 'mean' the mean loss, or the loss of `domain` alone."""

    kind: str
    domain: str | None = None
    tolerance: float | None = None
    """With a domain: share by which the losses of the others may exceed `limits`."""

    @classmethod
    def parse(cls, text: str, domains: Sequence[str], tolerance: float | None) -> Objective:
        """'worst', 'mean', or the name of a domain.

        Raises:
            UserError: none of them.
        """
        if text in ("worst", "mean"):
            if tolerance is not None:
                raise UserError("--tolerance goes with a domain as the --objective: it bounds the losses of the others")
            return cls(kind=text)
        if text not in domains:
            raise UserError(
                f"--objective is '{text}'; it is 'worst', 'mean', or one of the domains {', '.join(domains)}"
            )
        return cls(kind="domain", domain=text, tolerance=tolerance)

    def value(self, losses: Vector, gaps: Vector, domains: Sequence[str]) -> float:
        if self.kind == "worst":
            return float(gaps.max())
        if self.kind == "mean":
            return float(losses.mean())
        return float(losses[list(domains).index(str(self.domain))])


def best_mixture(
    laws: Laws,
    teacher: Mapping[str, float],
    parameters: float,
    tokens: float,
    objective: Objective,
    *,
    start: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
    anywhere: bool = False,
) -> dict[str, float]:
    """The mixture whose run ends best.

    Args:
        start: losses that `objective.tolerance` is relative to (of the student before the run).
        most: tokens that a domain may be drawn at most (its blocks times the epochs that are allowed).
        anywhere: whether shares may lie outside what the laws were fitted to.

    Raises:
        UserError: no mixture keeps to the limits.
    """
    domains = list(laws)
    goal = np.array([teacher[domain] for domain in domains])
    low, high = _bounds(laws, tokens, most or {}, anywhere)
    level = _level(objective, domains, start)

    def losses(shares: Vector) -> Vector:
        return _losses(laws, parameters, tokens, shares)

    found: list[tuple[float, Vector]] = []
    for first in _starts(low, high):
        shares = _minimum(objective, losses, goal, level, first, low, high, domains)
        here = losses(shares)
        broken = level is not None and bool(np.any(here > level * (1 + 1e-4)))
        found.append((math.inf if broken else objective.value(here, here - goal, domains), shares))
    value, shares = min(found, key=lambda one: one[0])
    if not math.isfinite(value):
        raise UserError(
            f"no mixture keeps the losses of the other domains within {100 * (objective.tolerance or 0):g}% of their "
            f"start at {tokens:.3g} tokens; allow more with --tolerance, or more --tokens"
        )
    return dict(zip(domains, (shares / shares.sum()).tolist(), strict=True))


def tokens_until(
    laws: Laws,
    teacher: Mapping[str, float],
    parameters: float,
    ratio: float,
    mixture: Callable[[float], Mapping[str, float]],
) -> float | None:
    """Tokens D after which the largest ℓ_S/ℓ_T is at most `ratio`; None where the laws never come there.

    Args:
        mixture: that a run of D tokens has.
    """

    def above(tokens: float) -> bool:
        return outcome(laws, teacher, parameters, tokens, mixture(tokens)).worst > ratio

    span = next(iter(laws.values())).span.tokens
    low, high = span[0] * 1e-3, span[1] * 1e4
    if above(high):
        return None
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if above(middle) else (low, middle)
        if high / low < 1.001:
            break
    return high


def sizes_at(
    laws: Laws,
    teacher: Mapping[str, float],
    flops: float,
    objective: Objective,
    mixture: Mapping[str, float],
    *,
    places: int = 41,
) -> list[tuple[float, float, float]]:
    """(N, D, the objective's value) along C = 6·N·D, over the sizes that the laws know and a factor of two beyond.

    Raises:
        UserError: the laws know one size only.
    """
    first = next(iter(laws.values()))
    if not first.sized:
        raise UserError(
            f"the law knows one size, {first.span.parameters[0]:.4g} parameters; to weigh size against tokens it needs "
            f"runs of students of other sizes (`ddk law design --students A,B,C`)"
        )
    low, high = first.span.parameters
    goal = np.array([teacher[domain] for domain in laws])
    found: list[tuple[float, float, float]] = []
    for parameters in np.geomspace(low / 2, high * 2, places).tolist():
        tokens = flops / (6.0 * parameters)
        losses = _losses(laws, parameters, tokens, _vector(laws, mixture))
        found.append((parameters, tokens, objective.value(losses, losses - goal, list(laws))))
    return found


def _losses(laws: Laws, parameters: float, tokens: float, shares: Vector) -> Vector:
    return np.array([float(law.losses(parameters, tokens, shares)[0]) for law in laws.values()])


def _vector(laws: Laws, mixture: Mapping[str, float]) -> Vector:
    if set(mixture) != set(laws):
        raise UserError(f"the mixture is of {', '.join(sorted(mixture))}, the law of {', '.join(sorted(laws))}")
    return np.array([mixture[domain] for domain in laws])


def _bounds(laws: Laws, tokens: float, most: Mapping[str, float], anywhere: bool) -> tuple[Vector, Vector]:
    low = np.array([_LEAST if anywhere else max(_LEAST, law.span.share[0]) for law in laws.values()])
    high = np.array([1.0 if anywhere else law.span.share[1] for law in laws.values()])
    for at, domain in enumerate(laws):
        if domain in most and most[domain] / tokens < high[at]:
            high[at] = most[domain] / tokens
            low[at] = min(low[at], high[at])
    if low.sum() > 1.0 or high.sum() < 1.0:
        raise UserError(
            f"no mixture of {tokens:.3g} tokens keeps every domain between the smallest and the largest share that it "
            f"may have ({', '.join(f'{d} {a:.2f} to {b:.2f}' for d, a, b in zip(laws, low, high, strict=True))}); "
            f"allow more epochs, take fewer tokens, or leave the range of the runs with --anywhere"
        )
    return low, high


def _level(objective: Objective, domains: Sequence[str], start: Mapping[str, float] | None) -> Vector | None:
    """The losses that must not be exceeded; infinite for the objective's own domain."""
    if objective.kind != "domain" or objective.tolerance is None:
        return None
    if start is None:
        raise ValueError("a tolerance is relative to the losses at the start")
    return np.array(
        [math.inf if domain == objective.domain else start[domain] * (1.0 + objective.tolerance) for domain in domains]
    )


def _starts(low: Vector, high: Vector) -> list[Vector]:
    """The middle, and for each domain as much of it as may be; all sum to 1."""
    room = high - low
    spare = 1.0 - low.sum()
    if spare <= 0.0 or room.sum() <= 0.0:
        return [low]
    found = [low + room * spare / room.sum()]
    for at in range(len(low)):
        taken = min(room[at], 0.6 * spare)
        rest = np.where(np.arange(len(low)) == at, 0.0, room)
        if rest.sum() >= spare - taken > 0.0:
            found.append(low + rest * (spare - taken) / rest.sum() + np.where(np.arange(len(low)) == at, taken, 0.0))
    return found


def _minimum(
    objective: Objective,
    losses: Callable[[Vector], Vector],
    goal: Vector,
    level: Vector | None,
    first: Vector,
    low: Vector,
    high: Vector,
    domains: Sequence[str],
) -> Vector:
    """By SLSQP. 'worst' becomes smooth with the largest gap as a variable of its own, which no gap may exceed."""
    count = len(first)
    worst = objective.kind == "worst"

    def value(x: Vector) -> float:
        # Where the worst domain has all that it may have, the others' shares would be arbitrary: their mean decides.
        if worst:
            return float(x[-1]) + _TIE * float(losses(x[:count]).mean())
        here = losses(x)
        return objective.value(here, here - goal, domains)

    constraints: list[LinearConstraint | NonlinearConstraint] = [
        LinearConstraint(np.array([[*np.ones(count), *([0.0] if worst else [])]]), 1.0, 1.0)
    ]
    if worst:
        constraints.append(NonlinearConstraint(lambda x: x[-1] - (losses(x[:count]) - goal), 0.0, np.inf))
    if level is not None:
        bound = np.isfinite(level)
        constraints.append(NonlinearConstraint(lambda x: (level - losses(x[:count]))[bound], 0.0, np.inf))
    bounds = [*zip(low.tolist(), high.tolist(), strict=True), *([(-50.0, 50.0)] if worst else [])]
    at = np.append(first, (losses(first) - goal).max()) if worst else first
    done = minimize(value, at, method="SLSQP", bounds=bounds, constraints=constraints, options={"maxiter": 300})
    return np.clip(np.asarray(done.x)[:count], low, high)
