"""The forms of the law: the loss of one domain by the student's size N, the tokens D, and the shares r of the domains.

    dcpt         E + A/N^α + B·r^η/D^β + C/(r + ε)^γ      D-CPT Law (Que et al. 2024, arXiv 2406.01375, 'L3')
    own_tokens   E + A/N^α + B/(n₀ + (r + t)·D)^β         a power law in the domain's own tokens r·D, to which the
                                                          others add a share t, counted on from n₀ before the run
    forgetting   … + F·(1 − r)^φ·(1 − exp(−D/τ))          the same, and what the others' tokens D·(1 − r) make a
                                                          student forget that knew the domain before: ours
    exponential  E + A/N^α + exp(Σ_j t_j·r_j)/D^β         Data Mixing Laws (Ye et al. 2024, arXiv 2403.16952), whose
                                                          fall with D is a power law; reads the shares of all domains
    power        E + A/N^α + B/D^β                        Chinchilla's, which does not know r: what the others must beat

r is the domain's own share, every constant is positive (but the t_j of 'exponential'). N and D are in units that the
fit chooses. Without more than one N the second term is left out.

Every form is a sum of positive coefficients times columns that depend on the exponents: with the exponents fixed, the
coefficients that fit best are those of a non-negative least squares problem. `ddk.laws.fitting` starts from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
FormName = Literal["dcpt", "own_tokens", "forgetting", "exponential", "power"]
_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
_ALPHAS = (0.1, 0.4, 1.0)
CHINCHILLA_ALPHA = 0.34
"""α of Hoffmann et al. (2022), taken where there are two sizes, which determine A alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Where a law is evaluated, n places."""

    parameters: Vector
    """N in the fit's units, [n]."""
    tokens: Vector
    """D in the fit's units, [n]."""
    shares: Vector
    """[n, m]"""
    own: int
    """The domain's column in `shares`."""

    @property
    def r(self) -> Vector:
        return self.shares[:, self.own]


class Form(Protocol):
    """One form. Its free constants are `exponents` (those that columns depend on) and a coefficient for each column."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names, in the order of the columns; without A."""
        ...

    def exponents(self, domains: int) -> tuple[str, ...]:
        """Names, without α."""
        ...

    def bounds(self, domains: int) -> list[tuple[float, float]]:
        """Of each exponent."""
        ...

    def grid(self, domains: int) -> Iterator[tuple[float, ...]]:
        """Exponents to start from."""
        ...

    def columns(self, exponents: Vector, at: Inputs) -> tuple[list[Vector], list[list[Vector | None]]]:
        """The columns, [n] each; and for each exponent the derivatives of all columns, None for 0."""
        ...


def _ones(at: Inputs) -> Vector:
    return np.ones_like(at.tokens)


class Dcpt:
    coefficients = ("E", "B", "C")

    def exponents(self, domains: int) -> tuple[str, ...]:
        return ("beta", "eta", "gamma", "epsilon")

    def bounds(self, domains: int) -> list[tuple[float, float]]:
        return [(0.01, 3.0), (0.01, 3.0), (0.01, 3.0), (1e-3, 1.0)]

    def grid(self, domains: int) -> Iterator[tuple[float, ...]]:
        yield from itertools.product(_EXPONENTS, (0.1, 0.5, 1.0), (0.1, 0.5, 1.0), (0.01, 0.1, 0.5))

    def columns(self, exponents: Vector, at: Inputs) -> tuple[list[Vector], list[list[Vector | None]]]:
        beta, eta, gamma, epsilon = exponents
        r, tokens = np.maximum(at.r, 1e-12), at.tokens
        second, third = r**eta * tokens**-beta, (at.r + epsilon) ** -gamma
        return [_ones(at), second, third], [
            [None, -second * np.log(tokens), None],
            [None, second * np.log(r), None],
            [None, None, -third * np.log(at.r + epsilon)],
            [None, None, -gamma * third / (at.r + epsilon)],
        ]


class OwnTokens:
    coefficients = ("E", "B")

    def exponents(self, domains: int) -> tuple[str, ...]:
        return ("beta", "n0", "t")

    def bounds(self, domains: int) -> list[tuple[float, float]]:
        return [(0.01, 3.0), (1e-4, 1e3), (1e-6, 10.0)]

    def grid(self, domains: int) -> Iterator[tuple[float, ...]]:
        yield from itertools.product(_EXPONENTS, (0.01, 0.1, 1.0), (0.01, 0.1, 0.5))

    def columns(self, exponents: Vector, at: Inputs) -> tuple[list[Vector], list[list[Vector | None]]]:
        beta, n0, t = exponents
        seen = n0 + (at.r + t) * at.tokens
        column = seen**-beta
        return [_ones(at), column], [
            [None, -column * np.log(seen)],
            [None, -beta * column / seen],
            [None, -beta * column / seen * at.tokens],
        ]


def forgotten(tokens: Vector, share: Vector, tau: float, phi: float) -> Vector:
    """(1 − r)^φ·(1 − exp(−D/τ)), [n]: what D tokens, of which a domain had the share r, make a student forget of it, as
    a part of the limit."""
    return np.asarray(np.maximum(1.0 - share, 1e-12) ** phi * (1.0 - np.exp(-tokens / tau)))


class Forgetting:
    """`own_tokens`, and a loss that other domains' tokens add up to a limit, soon after the run began.

    Seen in runs whose students were pre-trained on the domain: its loss rises first, the more so the smaller its share,
    and falls afterwards. No form without this term has a loss that rises with D.
    """

    coefficients = ("E", "B", "F")

    def exponents(self, domains: int) -> tuple[str, ...]:
        return (*OwnTokens().exponents(domains), "tau", "phi")

    def bounds(self, domains: int) -> list[tuple[float, float]]:
        return [*OwnTokens().bounds(domains), (1e-3, 1e2), (0.1, 6.0)]

    def grid(self, domains: int) -> Iterator[tuple[float, ...]]:
        yield from itertools.product((0.1, 0.3, 1.0), (0.01, 0.1, 1.0), (0.01, 0.5), (0.05, 0.5), (1.0, 3.0))

    def columns(self, exponents: Vector, at: Inputs) -> tuple[list[Vector], list[list[Vector | None]]]:
        tau, phi = exponents[3:]
        columns, slopes = OwnTokens().columns(exponents[:3], at)
        others = np.maximum(1.0 - at.r, 1e-12)
        left = np.exp(-at.tokens / tau)
        column = forgotten(at.tokens, at.r, tau, phi)
        return [*columns, column], [
            *([*slope, None] for slope in slopes),
            [None, None, -(others**phi) * left * at.tokens / tau**2],
            [None, None, column * np.log(others)],
        ]


class Exponential:
    coefficients = ("E", "k")

    def exponents(self, domains: int) -> tuple[str, ...]:
        return ("beta", *(f"t{number}" for number in range(domains)))

    def bounds(self, domains: int) -> list[tuple[float, float]]:
        return [(0.01, 3.0), *[(-20.0, 20.0)] * domains]

    def grid(self, domains: int) -> Iterator[tuple[float, ...]]:
        generator = np.random.default_rng(0)
        for beta in _EXPONENTS:
            yield (beta, *[0.0] * domains)
            for _ in range(7):
                yield (beta, *generator.normal(0.0, 1.0, domains))

    def columns(self, exponents: Vector, at: Inputs) -> tuple[list[Vector], list[list[Vector | None]]]:
        beta, effects = exponents[0], exponents[1:]
        # Shares sum to 1, so that k takes up what is common to all t_j: only their differences count.
        column = np.exp((at.shares - 1.0 / at.shares.shape[1]) @ effects) * at.tokens**-beta
        return [_ones(at), column], [
            [None, -column * np.log(at.tokens)],
            *([None, column * (at.shares[:, j] - 1.0 / at.shares.shape[1])] for j in range(len(effects))),
        ]


class Power:
    coefficients = ("E", "B")

    def exponents(self, domains: int) -> tuple[str, ...]:
        return ("beta",)

    def bounds(self, domains: int) -> list[tuple[float, float]]:
        return [(0.01, 3.0)]

    def grid(self, domains: int) -> Iterator[tuple[float, ...]]:
        yield from ((beta,) for beta in (0.05, *_EXPONENTS))

    def columns(self, exponents: Vector, at: Inputs) -> tuple[list[Vector], list[list[Vector | None]]]:
        column = at.tokens ** -exponents[0]
        return [_ones(at), column], [[None, -column * np.log(at.tokens)]]


FORMS: dict[FormName, Form] = {
    "dcpt": Dcpt(),
    "own_tokens": OwnTokens(),
    "forgetting": Forgetting(),
    "exponential": Exponential(),
    "power": Power(),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A form for a number of domains, with or without the term in N: the free constants as one vector θ.

    θ holds ln of every coefficient, then the exponents; with N, ln A and α come last of each.
    """

    form: FormName
    domains: int
    sized: bool
    alpha: float | None = None
    """A fixed α, where the sizes do not determine one."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        return (*FORMS[self.form].coefficients, *(("A",) if self.sized else ()))

    @property
    def exponents(self) -> tuple[str, ...]:
        return (*FORMS[self.form].exponents(self.domains), *(("alpha",) if self.sized else ()))

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Of θ."""
        own = FORMS[self.form].bounds(self.domains)
        alpha = (0.01, 3.0) if self.alpha is None else (self.alpha, self.alpha)
        return [(-30.0, 10.0)] * len(self.coefficients) + own + ([alpha] if self.sized else [])

    def grid(self) -> Iterator[Vector]:
        """Exponents to start from, α included."""
        alphas = [()] if not self.sized else [(alpha,) for alpha in _ALPHAS] if self.alpha is None else [(self.alpha,)]
        for exponents, alpha in itertools.product(FORMS[self.form].grid(self.domains), alphas):
            yield np.array([*exponents, *alpha])

    def columns(self, exponents: Vector, at: Inputs) -> tuple[Vector, Sequence[Sequence[Vector | None]]]:
        """[n, coefficients], and the derivatives by each exponent."""
        if not self.sized:
            columns, slopes = FORMS[self.form].columns(exponents, at)
            return np.stack(columns, axis=1), slopes
        columns, slopes = FORMS[self.form].columns(exponents[:-1], at)
        size = at.parameters ** -exponents[-1]
        by_alpha: list[Vector | None] = [*[None] * len(columns), -size * np.log(at.parameters)]
        return np.stack([*columns, size], axis=1), [*([*slope, None] for slope in slopes), by_alpha]

    def losses(self, theta: Vector, at: Inputs) -> Vector:
        """Predicted losses, [n]."""
        columns, _ = self.columns(theta[len(self.coefficients) :], at)
        return np.asarray(columns @ np.exp(theta[: len(self.coefficients)]))

    def losses_and_slopes(self, theta: Vector, at: Inputs) -> tuple[Vector, Vector]:
        """Predicted losses [n], and their derivatives by θ [n, len(θ)]."""
        count = len(self.coefficients)
        weights = np.exp(theta[:count])
        columns, slopes = self.columns(theta[count:], at)
        parts = columns * weights
        by_exponent = np.zeros((len(at.tokens), len(slopes)))
        for number, slope in enumerate(slopes):
            for column, derivative in enumerate(slope):
                if derivative is not None:
                    by_exponent[:, number] += weights[column] * derivative
        return parts.sum(axis=1), np.concatenate([parts, by_exponent], axis=1)
