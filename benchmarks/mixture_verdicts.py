"""How bench_mixtures.py judges a rule, by one comparison of it with equal sampling and with DDK at several α.

A rule that nobody pays for has, against equal sampling and paired by seed, a smaller largest ratio (by half of what DDK
gains), a geometric mean of the perplexities that is no worse (by 0.5%), and leaves no domain more than 1% above where
it began. It also lies beyond what DDK itself reaches with another α: DDK's frontier runs through equal sampling and
α = 0.1 to 0.75, straight from point to point, in the plane of both logarithms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ddk.values import REGRESSION
from tasks.comparing.data import ComparedRun, Comparison, Measure, by_seed
from tasks.comparing.spreads import Difference, paired_difference

EQUAL = "equal"
DDK = "ddk 0.5"
"""The paper's."""
FRONTIER = (EQUAL, "ddk 0.1", "ddk 0.25", DDK, "ddk 0.75")
WORST, PERPLEXITY = Measure(name="worst_ratio"), Measure(name="perplexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One of the four by which a rule is judged."""

    what: str
    by_seed: Mapping[int, float]
    unit: str
    limit: float
    relation: Literal["<", ">"]

    @property
    def interval(self) -> Difference | None:
        """The mean over the seeds with its 95% interval; None without a seed."""
        return paired_difference(self.by_seed, dict.fromkeys(self.by_seed, 0.0))


def figures(comparison: Comparison, rule: str) -> Iterator[Figure]:
    """All four."""
    yield Figure(
        what="share of DDK's gain in the largest ratio",
        by_seed=shares_of_gain(comparison, rule),
        unit="",
        limit=0.5,
        relation=">",
    )
    yield Figure(
        what="geometric mean against equal sampling",
        by_seed={seed: percent(d) for seed, d in log_differences(comparison, rule).items()},
        unit="%",
        limit=0.5,
        relation="<",
    )
    yield Figure(
        what="largest rise of a domain above its start",
        by_seed={run.seed: max(rises(run).values()) for run in comparison.of(rule)},
        unit="%",
        limit=100 * REGRESSION,
        relation="<",
    )
    yield Figure(
        what="geometric mean against DDK's frontier",
        by_seed=beyond(comparison, rule),
        unit="%",
        limit=0.0,
        relation="<",
    )


def percent(logarithm: float) -> float:
    """ln 1.01 → 1."""
    return 100 * math.expm1(logarithm)


def shares_of_gain(comparison: Comparison, rule: str) -> dict[int, float]:
    """By seed: 0 is equal sampling's largest ratio, 1 is DDK's."""
    own, equal, ddk = (by_seed(comparison, name, WORST) for name in (rule, EQUAL, DDK))
    shared = own.keys() & equal.keys() & ddk.keys()
    return {seed: (equal[seed] - own[seed]) / (equal[seed] - ddk[seed]) for seed in sorted(shared)}


def log_differences(comparison: Comparison, rule: str) -> dict[int, float]:
    """ln of the geometric means of the perplexities: the rule's minus equal sampling's, by seed."""
    own, equal = by_seed(comparison, rule, PERPLEXITY), by_seed(comparison, EQUAL, PERPLEXITY)
    return {seed: math.log(own[seed]) - math.log(equal[seed]) for seed in sorted(own.keys() & equal.keys())}


def rises(run: ComparedRun) -> dict[str, float]:
    """By domain, the change of the perplexity from its start to its end, in percent."""
    last = run.last.perplexities
    return {
        domain: 100 * (last[domain].student / both.student - 1) for domain, both in run.records[0].perplexities.items()
    }


def beyond(comparison: Comparison, rule: str) -> dict[int, float]:
    """By seed, the geometric mean against the smallest that DDK's frontier has at the rule's largest ratio, in percent.

    Below 0 the rule lies beyond the frontier, which runs through those of its points that have been run. Where the
    rule's largest ratio is smaller (or larger) than any of the frontier's, it is compared with the frontier's end
    there.
    """
    ran = [name for name in FRONTIER if comparison.of(name)]
    worst = {name: by_seed(comparison, name, WORST) for name in (*ran, rule)}
    mean = {name: by_seed(comparison, name, PERPLEXITY) for name in (*ran, rule)}
    found = {}
    for seed in sorted(set.intersection(*(set(values) for values in worst.values()))) if len(ran) > 1 else ():
        points = [(math.log(worst[name][seed]), math.log(mean[name][seed])) for name in ran]
        found[seed] = percent(math.log(mean[rule][seed]) - lowest(points, math.log(worst[rule][seed])))
    return found


def lowest(points: Sequence[tuple[float, float]], at: float) -> float:
    """The smallest y at x = `at` of the line through the points in their order; `at` is moved to the line's ends."""
    at = min(max(at, min(x for x, _ in points)), max(x for x, _ in points))
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if min(x0, x1) <= at <= max(x0, x1):
            found.append(min(y0, y1) if x0 == x1 else y0 + (at - x0) / (x1 - x0) * (y1 - y0))
    return min(found)
