"""Means, spreads and paired differences over seeds, for a comparison of runs. Pure functions of numbers.

Runs of one seed draw their blocks by the same generator, so that a difference between two methods is taken seed by
seed: what a seed does to both cancels out. The interval is Student's t interval of the mean of these differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
Verdict = Literal["better", "worse", "no difference shown", "one seed, no interval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Some seeds' values of one quantity."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation (n − 1 below the sum); None with one value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Values minus the baseline's, over the seeds that both have. Lower values are the better ones."""

    n: int
    """Pairs."""
    mean: float
    low: float | None
    """End of the interval; None with one pair."""
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """What the interval says: a side of 0, or that it holds 0."""
        if self.low is None or self.high is None:
            return "one seed, no interval"
        if self.high < 0.0:
            return "better"
        return "worse" if self.low > 0.0 else "no difference shown"


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(n=1, mean=mean, sd=None)
    # Equal values have no spread, also where their mean is off by a rounding.
    same = min(values) == max(values)
    squares = 0.0 if same else math.fsum((value - mean) ** 2 for value in values)
    return Spread(n=len(values), mean=values[0] if same else mean, sd=math.sqrt(squares / (len(values) - 1)))


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """The mean of `values` − `baseline` over their common seeds, with its t interval; None without a common seed.

    Args:
        values, baseline: by seed.
        confidence: of the interval, in (0, 1).
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return None
    found = spread([values[seed] - baseline[seed] for seed in seeds])
    if found.sd is None:
        return Difference(n=1, mean=found.mean, low=None, high=None)
    half = t_quantile(confidence, found.n - 1) * found.sd / math.sqrt(found.n)
    return Difference(n=found.n, mean=found.mean, low=found.mean - half, high=found.mean + half)


def t_quantile(confidence: float, degrees: int) -> float:
    """t such that Student's t with so many degrees of freedom lies within ±t with this probability.

    From P(|T| > t) = I_x(ν/2, 1/2) with x = ν/(ν + t²), I the regularised incomplete beta function (Abramowitz and
    Stegun 26.7.1), inverted by bisection. Example: t_quantile(0.95, 2) = 4.3027.

    Raises:
        ValueError: the confidence is not in (0, 1), or there is no degree of freedom.
    """
    if not 0.0 < confidence < 1.0 or degrees < 1:
        raise ValueError(f"no t quantile for confidence {confidence} and {degrees} degrees of freedom")
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if incomplete_beta(degrees / 2, 0.5, middle) < 1.0 - confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees * (1.0 - middle) / middle)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, for a, b > 0 and x in [0, 1]."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):  # where the fraction converges slowly, that of 1 − x does not
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / (a * _beta_fraction(a, b, x))


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d_1/(1 + d_2/(1 + …)) of Abramowitz and Stegun 26.5.8, from its end.

    300 terms are more than enough for x below (a + 1)/(a + b + 2).
    """
    value = 1.0
    for m in range(300, 0, -1):
        value = 1.0 + _beta_coefficient(a, b, x, m) / value
    return value


def _beta_coefficient(a: float, b: float, x: float, index: int) -> float:
    m, odd = divmod(index, 2)
    if odd:
        return -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
    return m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
