"""Fits a law to runs of a root, and writes it with its page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from ddk.errors import UserError
from ddk.laws.fitting import Law, fit_all
from ddk.laws.forms import FORMS, FormName
from ddk.laws.points import DomainPoints, by_domain
from ddk.laws.quality import best_form, bias_by_size, qualities, resampled_all
from flows.config import check_name
from storage.runs.reports import LawFolder
from tasks.predicting.page import render_law
from tasks.predicting.plots import fit_figure
from tasks.predicting.points import read_points
from tasks.predicting.record import LawRecord, StoredPoint, stored_law
from tasks.reporting.plots import DARK, LIGHT, as_png
from tasks.showing.formats import percent

_MOST_BIAS = 0.01
"""Of a law for one student, as a share of the loss: the runs that are predicted best are off by less than a percent."""


def fit_law(
    root: str, name: str, patterns: Sequence[str], *, form: str = "dcpt", all_points: bool = False
) -> tuple[LawRecord, dict[str, str]]:
    """Fit a law to the runs whose names match, and write it.

    Args:
        form: one of `ddk.laws.forms.FORMS`, or 'auto': the one that predicts unseen mixtures and lengths best.

    Returns:
        The law, and the URL of each of its files by name.

    Raises:
        UserError: no runs, runs that cannot be under one law, or too few of them; see `tasks.predicting.points`.
    """
    check_name(name)
    if form not in (*FORMS, "auto"):
        raise UserError(f"--form is '{form}'; it is one of {', '.join(FORMS)}, or auto")
    found = read_points(root, patterns, all_points=all_points)
    points, workers = by_domain(found.points), os.cpu_count() or 1
    chosen: FormName = best_form(points, workers=workers) if form == "auto" else form  # type: ignore[assignment]
    laws = fit_all(points, chosen, workers=workers)
    good = qualities(points, laws, workers=workers)
    drawn = resampled_all(points, laws, workers=workers)
    record = LawRecord(
        name=name,
        form=chosen,
        sized=next(iter(laws.values())).sized,
        domains=tuple(laws),
        laws={
            domain: stored_law(law, good[domain], drawn[domain], found.teacher[domain], found.start[domain])
            for domain, law in laws.items()
        },
        points=tuple(
            StoredPoint(
                run=point.run,
                parameters=point.parameters,
                tokens=point.tokens,
                shares=dict(point.shares),
                losses=dict(point.losses),
            )
            for point in found.points
        ),
        stores={domain: dict(stores) for domain, stores in found.stores.items()},
        tokens_per_step=found.tokens_per_step,
        notes=(*found.notes, *size_notes(points, laws)),
    )
    light, dark = ({"fit.png": as_png(fit_figure(record, theme=theme))} for theme in (LIGHT, DARK))
    files = {**light, "index.html": render_law(record, light, dark).encode()}
    return record, LawFolder(root, name).write(record.model_dump(mode="json"), files)


def size_notes(points: Mapping[str, DomainPoints], laws: Mapping[str, Law]) -> list[str]:
    """Where the students' sizes do not explain how their losses differ."""
    bias, size, domain = max(
        (
            (bias, size, domain)
            for domain, law in laws.items()
            if law.sized
            for size, bias in bias_by_size(points[domain], law).items()
        ),
        key=lambda one: abs(one[0]),
        default=(0.0, 0.0, ""),
    )
    if abs(bias) < _MOST_BIAS:
        return []
    return [
        f"The sizes do not lie on one law: for the student of {size:,.0f} parameters it is {percent(abs(bias))} too "
        f"{'high' if bias > 0 else 'low'} on '{domain}'. One law holds for students that were trained alike before. "
        f"Fit each size by itself: choose its runs with --runs."
    ]
