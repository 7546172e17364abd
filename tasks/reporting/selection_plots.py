"""Histograms of the scores by which a run's blocks were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tasks.reporting.plots import COLOURS, DPI, FONT, LIGHT, Theme, as_png, drawable

_COLUMNS = 3
_MOST_PANELS = 12


def selections_plot(selections: Sequence[Mapping[str, Any]], *, theme: Theme = LIGHT) -> bytes:
    """PNG of `selections_figure`."""
    return as_png(selections_figure(selections, theme=theme))


def selections_figure(selections: Sequence[Mapping[str, Any]], *, theme: Theme = LIGHT) -> Figure:
    """A histogram for each domain: blocks by their score, the kept ones in colour."""
    shown = selections[:_MOST_PANELS]
    columns = 1 if theme.narrow else min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    width = 4.4 if theme.narrow else 0.6 + 3.2 * max(columns, 2)
    figure = Figure(figsize=(width, 0.4 + 2.3 * rows), dpi=DPI, facecolor=theme.ground)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if place >= len(shown):
            axes.set_axis_off()
            continue
        one = shown[place]
        edges = np.array(one["edges"])
        axes.set_facecolor(theme.ground)
        for counts, colour in ((one["all"], theme.grid), (one["kept"], COLOURS[0])):
            axes.stairs(counts, edges, fill=True, color=colour)
        axes.tick_params(colors=theme.ink, labelsize=8, labelfontfamily=FONT)
        for spine in axes.spines.values():
            spine.set_color(theme.ink)
        axes.set_title(drawable(str(one["domain"])), color=theme.ink, fontsize=9, fontfamily=FONT, parse_math=False)
        axes.set_xlabel("score", color=theme.ink, fontsize=8, fontfamily=FONT)
    figure.supylabel("blocks", color=theme.ink, fontsize=9, fontfamily=FONT)
    return figure
