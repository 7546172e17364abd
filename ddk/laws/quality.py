"""How good a law is: how it fits, and what counts, how it predicts what it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from ddk.errors import UserError
from ddk.laws.fitting import Law, fit, huber, refit, side_by_side
from ddk.laws.forms import FORMS, FormName
from ddk.laws.points import DomainPoints, Vector

LAST = 2 / 3
"""Of the largest D: points beyond it are the held-out length."""
RESAMPLED = 200
_POLISHED = 2
"""Starts of a fit to a part of the points: there are many such fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors |L̂ − L|/L on points that the fit has not seen."""

    points: int
    median: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Of one law."""

    r2: float
    """`r_squared` on the points of the fit."""
    huber: float
    """Mean Huber loss of ln L̂ − ln L there."""
    ratio: Errors | None
    """Each mixture predicted from the others; None where the others would not determine a law."""
    length: Errors | None
    """The last third of the tokens predicted from the first two."""
    size: Errors | None
    """Each size predicted from the others; None with fewer than three sizes."""


def r_squared(points: DomainPoints, law: Law) -> float:
    """1 − Σ(L̂ − L)²/Σ(L − mean L)²; 0 where all losses are the same."""
    predicted = law.losses(points.parameters, points.tokens, points.shares)
    spread = float(np.sum((points.losses - points.losses.mean()) ** 2))
    return 1.0 - float(np.sum((predicted - points.losses) ** 2)) / spread if spread > 0.0 else 0.0


def quality(points: DomainPoints, law: Law) -> Quality:
    """Of a law on the points that it was fitted to."""
    predicted = law.losses(points.parameters, points.tokens, points.shares)
    return Quality(
        r2=r_squared(points, law),
        huber=huber(np.log(predicted) - np.log(points.losses)),
        ratio=held_out(points, law.form, _by_mixture(points)),
        length=held_out(points, law.form, iter([points.tokens > LAST * points.tokens.max()])),
        size=held_out(points, law.form, _by_size(points)) if len(points.sizes) > 2 else None,
    )


def bias_by_size(points: DomainPoints, law: Law) -> dict[float, float]:
    """By N, the mean of L̂/L − 1 on the points of the fit: how far the law is off for a student as a whole.

    Near 0 where the students differ in nothing but their size. One that was trained for longer before, or cut out of a
    larger model, has a loss that its size does not explain.
    """
    errors = law.losses(points.parameters, points.tokens, points.shares) / points.losses - 1.0
    return {size: float(errors[points.parameters == size].mean()) for size in points.sizes}


def held_out(points: DomainPoints, form: FormName, folds: Iterator[npt.NDArray[np.bool_]]) -> Errors | None:
    """Errors on each fold of a fit to the rest; a fold whose rest determines no law is left out."""
    errors: list[float] = []
    for fold in folds:
        if not fold.any() or fold.all():
            continue
        try:
            law = fit(points.only(~fold), form, polished=_POLISHED)
        except UserError:
            continue
        there = points.only(fold)
        errors += (np.abs(law.losses(there.parameters, there.tokens, there.shares) / there.losses - 1.0)).tolist()
    if not errors:
        return None
    return Errors(points=len(errors), median=float(np.median(errors)), largest=float(np.max(errors)))


def qualities(points: Mapping[str, DomainPoints], laws: Mapping[str, Law], *, workers: int = 1) -> dict[str, Quality]:
    """`quality` for each domain, side by side."""
    pairs = [(points[domain], law) for domain, law in laws.items()]
    return dict(zip(laws, side_by_side(_quality, pairs, workers), strict=True))


def _quality(pair: tuple[DomainPoints, Law]) -> Quality:
    return quality(*pair)


def resampled(points: DomainPoints, law: Law, *, times: int = RESAMPLED, seed: int = 0) -> list[Law]:
    """The law fitted again to runs drawn with replacement: a bootstrap over runs, for intervals.

    With fewer than two runs there is nothing to draw, and the list is empty.
    """
    names = sorted(set(points.runs))
    if len(names) < 2:
        return []
    rows = np.array([names.index(run) for run in points.runs])
    generator = np.random.default_rng(seed)
    found: list[Law] = []
    for _ in range(times):
        counts = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))
        found.append(refit(law, points, counts[rows].astype(np.float64)))
    return found


def resampled_all(
    points: Mapping[str, DomainPoints], laws: Mapping[str, Law], *, times: int = RESAMPLED, workers: int = 1
) -> dict[str, list[Law]]:
    """`resampled` for each domain, side by side; the same runs are drawn for all."""
    pairs = [(points[domain], law) for domain, law in laws.items()]
    return dict(zip(laws, side_by_side(partial(_resampled, times=times), pairs, workers), strict=True))


def _resampled(pair: tuple[DomainPoints, Law], times: int) -> list[Law]:
    return resampled(*pair, times=times)


def best_form(points: Mapping[str, DomainPoints], *, workers: int = 1) -> FormName:
    """The form with the smallest error on mixtures and lengths that it has not seen.

    The mean over domains of the medians; a form that cannot be held to that (too few runs) comes last.
    """
    forms: list[FormName] = list(FORMS)
    found = side_by_side(_unseen, [(one, form) for form in forms for one in points.values()], workers)
    means = {form: float(np.mean(found[at * len(points) : (at + 1) * len(points)])) for at, form in enumerate(forms)}
    return min(forms, key=lambda form: means[form])


def _unseen(pair: tuple[DomainPoints, FormName]) -> float:
    points, form = pair
    try:
        done = quality(points, fit(points, form))
    except UserError:
        return float("inf")
    errors = [one.median for one in (done.ratio, done.length) if one is not None]
    return float(np.mean(errors)) if errors else float("inf")


def _by_mixture(points: DomainPoints) -> Iterator[npt.NDArray[np.bool_]]:
    labels = points.mixtures
    for label in dict.fromkeys(labels):
        yield np.array([one == label for one in labels])


def _by_size(points: DomainPoints) -> Iterator[npt.NDArray[np.bool_]]:
    for size in points.sizes:
        yield points.parameters == size


def interval(values: Vector, confidence: float = 0.95) -> tuple[float, float]:
    """The quantiles that leave out the same share at both ends."""
    low, high = np.quantile(values, [(1.0 - confidence) / 2, (1.0 + confidence) / 2])
    return float(low), float(high)
