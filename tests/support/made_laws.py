"""Points of runs that follow a law that is known, for tests of what is fitted to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ddk.laws.points import Point

Truth = Callable[[float, float, float], float]
"""Loss by N, D and the domain's own share."""


def dcpt(e: float, b: float, c: float) -> Truth:
    """D-CPT Law with the exponents of this project's liking."""
    return lambda n, d, r: e + 40.0 / n**0.3 + b * r**0.4 / d**0.3 + c / (r + 0.1) ** 0.5


def own(e: float, b: float, start: float) -> Truth:
    """A power law in the domain's own tokens."""
    return lambda n, d, r: e + b / (start + r * d) ** 0.35


def points(
    truths: Mapping[str, Truth],
    mixtures: Sequence[Sequence[float]],
    *,
    sizes: Sequence[float] = (1e6,),
    tokens: Sequence[float] = (1e6, 2e6, 4e6, 8e6),
    noise: float = 0.0,
) -> list[Point]:
    """A run for each size and mixture, measured after each number of tokens.

    Args:
        noise: standard deviation of ln L.
    """
    return list(_points(truths, mixtures, sizes, tokens, noise))


def _points(
    truths: Mapping[str, Truth],
    mixtures: Sequence[Sequence[float]],
    sizes: Sequence[float],
    tokens: Sequence[float],
    noise: float,
) -> Iterator[Point]:
    generator = np.random.default_rng(0)
    for size in sizes:
        for number, mixture in enumerate(mixtures):
            shares = dict(zip(truths, mixture, strict=True))
            for count in tokens:
                yield Point(
                    run=f"n{size:g}-m{number}",
                    parameters=size,
                    tokens=count,
                    shares=shares,
                    losses={
                        domain: truth(size, count, shares[domain]) * math.exp(generator.normal(0.0, noise))
                        for domain, truth in truths.items()
                    },
                )


TWO = [(share, 1.0 - share) for share in (0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9)]
THREE = [
    *((1 / 3, 1 / 3, 1 / 3), (0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.2, 0.2, 0.6)),
    *((0.1, 0.3, 0.6), (0.6, 0.1, 0.3), (0.3, 0.6, 0.1)),
]
"""Mixtures of two and of three domains, whose shares sum to 1."""
