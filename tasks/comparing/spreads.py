"""Means, spreads and paired differences over seeds, for a comparison of runs. Pure functions of numbers.

Runs with the same seed draw their blocks with the same random generator, so differences between two methods are paired
by seed, and the effect of the seed cancels out. The interval is Student's t interval of the mean of these differences.
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

    Example: t_quantile(0.95, 2) = 4.3027.

    Raises:
        ValueError: the confidence is not in (0, 1), or there is no degree of freedom.
    """
    from scipy import stats  # a second, which `ddk --help` need not take

    if not 0.0 < confidence < 1.0 or degrees < 1:
        raise ValueError(f"no t quantile for confidence {confidence} and {degrees} degrees of freedom")
    return float(stats.t.ppf((1.0 + confidence) / 2, degrees))
