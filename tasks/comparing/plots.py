"""The curves of a comparison: the ratio against tokens (the paper's Figure 3), and the mixtures, in small panels.

    ratio_figure     a panel for the mean, one for the largest ratio, one a domain; a line for each variant
    domains_figure   a panel for each variant; a line for each domain
    mixture_figure   likewise, the sampling probabilities
    time_figure      of runs over time: the largest ratio and the mean of the ratios at each run's end
    frontier_figure  the largest ratio against the geometric mean of the perplexities, a point for each variant

A line is the mean over the seeds, its band goes from the smallest to the largest of them. Equal comparisons give equal
bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any

import matplotlib.dates as mdates
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from storage.runs.mixtures import MixtureRecord
from tasks.comparing.data import ComparedRun, Comparison, FrontierPoint, Measure, frontier
from tasks.reporting.plots import (
    COLOURS,
    DASHES,
    DPI,
    FONT,
    LIGHT,
    LOG_FROM,
    MARKERS,
    MARKERS_UNTIL,
    Theme,
    as_png,
    drawable,
    dress,
    logarithmic,
)

MOST_PANELS = 24
"""Variants with a panel of their own; of more, the first have one."""
_COLUMNS = 3
_LEGEND_COLUMNS = 4
_TITLE_LENGTH = 34
_NEAR = 1.6
"""Where a ratio comes this far down, the panel shows 1 as well."""

Value = Callable[[MixtureRecord], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One quantity of one variant at every measurement that all of its seeds have."""

    tokens: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


Panels = Mapping[str, Mapping[str, Curve]]
"""By the panel's title, then by the line's label."""


def curve(comparison: Comparison, variant: str, value: Value) -> Curve | None:
    """None where no run of the variant is finished, or none has this value."""
    by_run = [
        {record.tokens_seen: found for record in run.records if (found := value(record)) is not None}
        for run in comparison.of(variant)
    ]
    shared = sorted(set.intersection(*map(set, by_run))) if by_run else []
    if not shared:
        return None
    columns = [[run[tokens] for run in by_run] for tokens in shared]
    return Curve(
        tokens=tuple(shared),
        mean=tuple(math.fsum(column) / len(column) for column in columns),
        low=tuple(map(min, columns)),
        high=tuple(map(max, columns)),
    )


def ratio_panels(comparison: Comparison) -> Panels:
    measures = {
        "mean of the domains": Measure(name="ratio"),
        "largest of the domains": Measure(name="worst_ratio"),
        **{domain: Measure(name="ratio", domain=domain) for domain in comparison.domains},
    }
    variants = [variant.name for variant in comparison.variants]
    return {title: _curves(comparison, variants, _at(measure)) for title, measure in measures.items()}


def domains_panels(comparison: Comparison) -> Panels:
    def ratio(domain: str) -> Value:
        return _at(Measure(name="ratio", domain=domain))

    return _by_variant(comparison, ratio)


def mixture_panels(comparison: Comparison) -> Panels:
    def probability(domain: str) -> Value:
        return lambda record: record.probabilities.get(domain)

    return _by_variant(comparison, probability)


def _at(measure: Measure) -> Value:
    return lambda record: measure.at(record, 1)


def _curves(comparison: Comparison, variants: Sequence[str], value: Value) -> dict[str, Curve]:
    found = {variant: curve(comparison, variant, value) for variant in variants}
    return {variant: one for variant, one in found.items() if one is not None}


def _by_variant(comparison: Comparison, value: Callable[[str], Value]) -> Panels:
    panels = {
        variant.name: {
            domain: one
            for domain in comparison.domains
            if (one := curve(comparison, variant.name, value(domain))) is not None
        }
        for variant in comparison.variants[:MOST_PANELS]
    }
    return {title: lines for title, lines in panels.items() if lines}


def ratio_figure(comparison: Comparison, *, theme: Theme = LIGHT) -> Figure:
    return panels_figure(ratio_panels(comparison), "student / teacher perplexity", theme, caught_up=True)


def domains_figure(comparison: Comparison, *, theme: Theme = LIGHT) -> Figure:
    return panels_figure(domains_panels(comparison), "student / teacher perplexity", theme, caught_up=True, shared=True)


def mixture_figure(comparison: Comparison, *, theme: Theme = LIGHT) -> Figure:
    return panels_figure(mixture_panels(comparison), "sampling probability (%)", theme, steps=True, shared=True)


def plots(comparison: Comparison, *, theme: Theme = LIGHT) -> dict[str, bytes]:
    """PNG files by their names; none where no run is finished."""
    figures: dict[str, Callable[..., Figure]] = {
        "frontier.png": frontier_figure,
        "ratio.png": ratio_figure,
        "domains.png": domains_figure,
        "mixture.png": mixture_figure,
    }
    if not any(comparison.of(variant.name) for variant in comparison.variants):
        return {}
    if comparison.over_time and len(runs_in_time(comparison)) > 1:
        figures = {"time.png": time_figure, **figures}
    return {name: as_png(figure(comparison, theme=theme)) for name, figure in figures.items()}


def runs_in_time(comparison: Comparison) -> list[ComparedRun]:
    """The finished runs of which it is known when they ended, oldest first."""
    return sorted(
        (run for run in comparison.runs if run.counts and run.ended is not None), key=lambda run: run.ended or 0
    )


def time_figure(comparison: Comparison, *, theme: Theme = LIGHT) -> Figure:
    """The largest ratio and the mean of the ratios at each run's end, against the day on which it ended."""
    runs = runs_in_time(comparison)
    days = [(run.ended or 0.0) / 86400.0 for run in runs]  # as matplotlib counts them
    figure = Figure(figsize=(7.4, 4.2), dpi=DPI, facecolor=theme.ground)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches
    axes = figure.add_subplot(facecolor=theme.ground)
    dress(axes, theme)
    lines = {"largest of the domains": Measure(name="worst_ratio"), "mean of the domains": Measure(name="ratio")}
    values: list[float] = []
    for place, (label, measure) in enumerate(lines.items()):
        found = [measure.of(run) or math.nan for run in runs]
        values += found
        axes.plot(days, found, color=COLOURS[place], marker=MARKERS[place], label=label, gid=label)
    locator = mdates.AutoDateLocator(tz=UTC)  # type: ignore[no-untyped-call, unused-ignore]
    axes.xaxis.set_major_locator(locator)
    formatter = mdates.ConciseDateFormatter(locator, tz=UTC)  # type: ignore[no-untyped-call, unused-ignore]
    axes.xaxis.set_major_formatter(formatter)
    axes.set_xlabel("end of the run (UTC)")
    axes.set_ylabel("student / teacher perplexity")
    if min(values) < _NEAR:
        axes.axhline(1.0, color=theme.ink, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5, gid="caught-up")
    axes.legend(frameon=False, labelcolor=theme.ink, prop=FontProperties(family=FONT, size=8))
    return figure


def frontier_figure(comparison: Comparison, *, theme: Theme = LIGHT) -> Figure:
    """Both aims of a mixture at once: a variant further down and further left is better in both.

    A ring is drawn around a variant that leaves domains worse than they were. The bars are the intervals of the paired
    differences from the baseline, which has none itself.
    """
    points = frontier(comparison)
    rows = -(-len(points) // 2)
    figure = Figure(figsize=(7.4, 4.6 + 0.22 * rows), dpi=DPI, facecolor=theme.ground)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches
    axes = figure.add_subplot(facecolor=theme.ground)
    dress(axes, theme)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel("perplexity (geometric mean of the domains)")
    axes.set_ylabel("largest student / teacher perplexity")
    handles: list[Any] = []
    for place, point in enumerate(points):
        colour = COLOURS[place % len(COLOURS)]
        handles.append(
            axes.errorbar(
                point.perplexity,
                point.worst_ratio,
                xerr=_lengths(point.perplexity, point.perplexity_interval),
                yerr=_lengths(point.worst_ratio, point.worst_ratio_interval),
                color=colour,
                marker=MARKERS[place % len(MARKERS)],
                markersize=6,
                linewidth=1.0,
                linestyle="",
                zorder=3 + place / 1000,
            )
        )
        if point.regressed:
            axes.plot(
                *(point.perplexity, point.worst_ratio),
                *("o",),
                markersize=14,
                markerfacecolor="none",
                markeredgecolor=colour,
                gid=f"regressed {point.variant}",
            )
    legend = figure.legend(
        handles,
        [_frontier_label(point) for point in points],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        labelcolor=theme.ink,
        prop=FontProperties(family=FONT, size=8),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _lengths(middle: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Of both arms of an error bar; the mean of paired differences may lie beside the mean of all runs."""
    if interval is None:
        return None
    return [[max(0.0, middle - interval[0])], [max(0.0, interval[1] - middle)]]


def _frontier_label(point: FrontierPoint) -> str:
    worse = f" (worse than before: {', '.join(point.regressed)})" if point.regressed else ""
    return drawable(f"{point.variant}{worse}", 2 * _TITLE_LENGTH)


def panels_figure(
    panels: Panels, ylabel: str, theme: Theme, *, caught_up: bool = False, steps: bool = False, shared: bool = False
) -> Figure:
    """Small panels, three in a row, with one legend below.

    Args:
        caught_up: draw a dotted line at 1, where the curves come near it.
        steps: a value holds until the next one.
        shared: all panels have the same y axis.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    legend_rows = -(-len(labels) // _LEGEND_COLUMNS)
    figure = Figure(
        figsize=(0.6 + 3.2 * max(columns, 2), 0.4 + 2.5 * rows + 0.25 * legend_rows), dpi=DPI, facecolor=theme.ground
    )
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    grid = figure.subplots(rows, columns, squeeze=False, sharey=shared)
    handles: dict[str, Line2D] = {}
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_axis_off()
            continue
        title, lines = list(panels.items())[place]
        handles |= _panel(axes, title, lines, labels, theme, steps)
        if place + columns >= len(panels):  # nothing below it
            axes.set_xlabel("tokens seen by the student", fontsize=8)
        _scale(axes, list(panels.values()) if shared else [lines], theme, caught_up, steps)
    figure.supylabel(ylabel, color=theme.ink, fontsize=9, fontfamily=FONT)
    legend = figure.legend(
        [handles[label] for label in labels],
        [drawable(label, _TITLE_LENGTH) for label in labels],
        loc="outside lower center",
        ncols=min(_LEGEND_COLUMNS, len(labels)),
        frameon=False,
        labelcolor=theme.ink,
        prop=FontProperties(family=FONT, size=8),
        handlelength=3.0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _panel(
    axes: Axes, title: str, lines: Mapping[str, Curve], labels: Sequence[str], theme: Theme, steps: bool
) -> dict[str, Line2D]:
    """Draw one panel; returns its lines by their labels."""
    axes.set_facecolor(theme.ground)
    dress(axes, theme)
    axes.tick_params(which="both", labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    axes.set_title(drawable(title, _TITLE_LENGTH), color=theme.ink, fontsize=9, fontfamily=FONT, parse_math=False)
    drawn = {}
    for label, one in lines.items():
        place = labels.index(label)
        colour = COLOURS[place % len(COLOURS)]
        drawn[label] = axes.plot(
            one.tokens,
            one.mean,
            color=colour,
            linestyle=DASHES[place // len(COLOURS) % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)] if len(one.tokens) <= MARKERS_UNTIL // 2 else "",
            markersize=2.8,
            linewidth=1.4,
            drawstyle="steps-post" if steps else "default",
            zorder=2 + place / 1000,
        )[0]
        axes.fill_between(
            one.tokens, one.low, one.high, color=colour, alpha=0.15, linewidth=0, step="post" if steps else None
        )
    return drawn


def _scale(axes: Axes, panels: Sequence[Mapping[str, Curve]], theme: Theme, caught_up: bool, steps: bool) -> None:
    """The y axis around what is drawn in these panels: curves far above 1 are not squeezed by a line at 1."""
    values = [value for lines in panels for one in lines.values() for value in (*one.low, *one.high)]
    low, high = min(values), max(values)
    if steps:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        axes.set_ylim(0.0, 1.06 * high or 1.0)  # of all panels: whoever sets a limit ends the axes' own scaling
        return
    if caught_up and low < _NEAR:
        axes.axhline(1.0, color=theme.ink, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5, gid="caught-up")
        low = min(low, 1.0)
    if high / low > LOG_FROM:
        logarithmic(axes)
        return
    margin = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - margin, high + margin)
