"""The pictures of a law: how it fits, and one for each kind of answer.

    fit_figure        a panel for each domain: measured losses and the law's curves, by the domain's share
    shares_figure     a mixture beside equal sampling, and the ratios that both are predicted to end with
    tokens_figure     the largest ratio against tokens
    sizes_figure      an objective against the student's size, at fixed FLOPs

Equal laws give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ddk.laws.points import DomainPoints
from tasks.predicting.record import LawRecord
from tasks.reporting.plots import COLOURS, DPI, FONT, LIGHT, MARKERS, Theme, drawable, dress

MOST_PANELS = 12
_COLUMNS = 3
_LINES = 5
"""Mixtures that are drawn in a panel; more would hide each other."""


def fit_figure(record: LawRecord, *, theme: Theme = LIGHT) -> Figure:
    """Points and curves, domain by domain; of the largest student where there are several sizes."""
    points = record.domain_points()
    shown = record.domains[:MOST_PANELS]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = _figure(theme, 0.6 + 3.2 * max(columns, 2), 0.6 + 2.6 * rows)
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if place >= len(shown):
            axes.set_axis_off()
            continue
        _fit_panel(axes, record, points[shown[place]], theme)
    figure.supylabel("loss in nats per token", color=theme.ink, fontsize=9, fontfamily=FONT)
    return figure


def _fit_panel(axes: Axes, record: LawRecord, points: DomainPoints, theme: Theme) -> None:
    law, largest = record.law(points.domain), max(record.sizes)
    _dress(axes, theme, drawable(points.domain))
    labels = np.array(points.mixtures)
    chosen = sorted(set(labels[points.parameters == largest]), key=lambda label: float(points.own[labels == label][-1]))
    for number, label in enumerate(_few(chosen)):
        here = (labels == label) & (points.parameters == largest)
        order = np.argsort(points.tokens[here])
        tokens, losses, shares = (one[here][order] for one in (points.tokens, points.losses, points.shares))
        line = np.geomspace(tokens[0], max(tokens[-1], tokens[0] * 1.01), 40)
        axes.plot(
            line,
            law.losses(largest, line, shares[-1]),
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.3,
            label=f"{100 * float(points.own[here][order][-1]):.0f}%",
        )
        axes.plot(
            tokens,
            losses,
            linestyle="",
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.2,
            color=COLOURS[number % len(COLOURS)],
        )
    axes.set_xlabel("tokens", fontsize=8)
    legend = axes.legend(frameon=False, labelcolor=theme.ink, prop=FontProperties(family=FONT, size=7), title="share")
    legend.get_title().set(color=theme.ink, fontsize=7, fontfamily=FONT)


def shares_figure(
    mixtures: Mapping[str, Mapping[str, float]], ratios: Mapping[str, Mapping[str, float]], *, theme: Theme = LIGHT
) -> Figure:
    """Two rows of bars: the shares of each mixture, and the ratios that it is predicted to end with."""
    domains = list(next(iter(mixtures.values())))
    figure = _figure(theme, max(5.6, 1.8 + 0.7 * len(domains)), 4.6)
    for axes, values, title in zip(
        figure.subplots(2, 1),
        (mixtures, ratios),
        ("share of the tokens (%)", "predicted student / teacher"),
        strict=True,
    ):
        _dress(axes, theme, title)
        width = 0.8 / len(values)
        for number, (name, by_domain) in enumerate(values.items()):
            heights = [by_domain[domain] for domain in domains]
            places = np.arange(len(domains)) + (number - (len(values) - 1) / 2) * width
            axes.bar(places, heights, width, color=COLOURS[number], label=name)
        axes.set_xticks(range(len(domains)), [drawable(domain, 14) for domain in domains], fontsize=8)
        if values is mixtures:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
            axes.legend(frameon=False, labelcolor=theme.ink, prop=FontProperties(family=FONT, size=8))
    return figure


def tokens_figure(
    tokens: Sequence[float],
    worst: Sequence[float],
    band: Sequence[tuple[float, float]] | None,
    *,
    known: float,
    ratio: float | None,
    theme: Theme = LIGHT,
) -> Figure:
    """The largest ratio against tokens; behind `known` tokens the law is extended beyond its points (dashed)."""
    figure = _figure(theme, 6.4, 4.0)
    axes = figure.add_subplot()
    _dress(axes, theme, "largest predicted student / teacher perplexity")
    axes.set_xscale("log")
    inside = np.array(tokens) <= known * 1.0001
    axes.plot(np.array(tokens)[inside], np.array(worst)[inside], color=COLOURS[0], linewidth=1.7)
    from_last = np.arange(len(tokens)) >= max(0, int(inside.sum()) - 1)
    axes.plot(np.array(tokens)[from_last], np.array(worst)[from_last], color=COLOURS[0], linewidth=1.7, linestyle="--")
    if band is not None:
        low, high = zip(*band, strict=True)
        axes.fill_between(tokens, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    if ratio is not None:
        axes.axhline(ratio, color=theme.ink, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xlabel("tokens (dashed: beyond the runs)")
    return figure


def sizes_figure(
    along: Sequence[tuple[float, float, float]], what: str, known: Sequence[float], *, theme: Theme = LIGHT
) -> Figure:
    """The objective against N at fixed FLOPs; dotted lines at the sizes that were run."""
    figure = _figure(theme, 6.4, 4.0)
    axes = figure.add_subplot()
    _dress(axes, theme, what)
    axes.set_xscale("log")
    axes.plot([size for size, _, _ in along], [value for _, _, value in along], color=COLOURS[0], linewidth=1.7)
    for size in known:
        axes.axvline(size, color=theme.ink, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.set_xlabel("parameters without embeddings (dotted: sizes that were run)")
    return figure


def _figure(theme: Theme, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.ground)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    return figure


def _dress(axes: Axes, theme: Theme, title: str) -> None:
    axes.set_facecolor(theme.ground)
    dress(axes, theme)
    axes.tick_params(which="both", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_title(title, color=theme.ink, fontsize=9, fontfamily=FONT, parse_math=False)


def _few(labels: Sequence[str]) -> list[str]:
    """At most `_LINES`, the ends included."""
    if len(labels) <= _LINES:
        return list(labels)
    return [labels[at] for at in sorted({round(one) for one in np.linspace(0, len(labels) - 1, _LINES)})]
