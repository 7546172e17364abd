"""The two plots of a run, as in the paper's Figure 3: the gap and the mixture against tokens seen.

Drawn with matplotlib's objects alone (no pyplot), so that nothing global changes and a flow may draw in any
thread. A domain has the same colour, line and marker in both plots. Equal records give equal bytes.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from tasks.reporting.records import IntervalRecord, domains_of

FONT = "DejaVu Sans"  # comes with matplotlib: the same letters on every machine
DPI = 140
LEGEND_ROWS = 20
LABEL_LENGTH = 24
NARROW_LABEL_LENGTH = 36
KEPT_PICTURES = 16
"""A report's page has at most twelve, of some 20 kB."""
P = ParamSpec("P")
LOG_FROM = 10.0
"""Ratios that span more than this factor are drawn on a logarithmic axis."""

# Okabe and Ito's colours, which people with any colour blindness tell apart; their yellow and black, which one of
# the two grounds swallows, are replaced by Tol's wine and a middle grey. After eight domains the line style
# changes too: 8 × 5 combinations serve 40 domains.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#AA4466", "#808080")
DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX*"
MARKERS_UNTIL = 40
"""Versions; with more, markers would cover the lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """Colours of everything but the curves, and the shape of the plot."""

    ground: str
    ink: str
    grid: str
    narrow: bool = False
    """Upright, with the legend below the axes, for a phone; else wide, with the legend at the right."""

    def labels(self, domains: Iterable[str]) -> list[str]:
        """The domains' names as the legend has room for them."""
        return [drawable(domain, NARROW_LABEL_LENGTH if self.narrow else LABEL_LENGTH) for domain in domains]

    def legend_columns(self, labels: Sequence[str]) -> int:
        if self.narrow:
            return 2 if max(map(len, labels)) <= NARROW_LABEL_LENGTH // 2 else 1
        return -(-len(labels) // LEGEND_ROWS)

    def inches(self, labels: Sequence[str]) -> tuple[float, float]:
        """Width and height that leave the axes their size, however long the legend is."""
        columns = self.legend_columns(labels)
        return (4.4, 3.9 + 0.2 * -(-len(labels) // columns)) if self.narrow else (5.6 + 2.4 * columns, 4.4)


LIGHT = Theme(ground="#ffffff", ink="#24292f", grid="#d9dee3")
DARK = Theme(ground="#171b21", ink="#d5dae0", grid="#363d47")


def drawn_once(plot: Callable[P, bytes]) -> Callable[P, bytes]:
    """Keeps the newest pictures, since a run's artifact, its report's files and the report's page show the same ones.

    Args:
        plot: whose arguments say with their `repr` everything that it draws, as dataclasses of numbers and texts do.
    """

    @functools.wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        words = repr((plot.__name__, args, sorted(kwargs.items())))
        return _draw(_Picture(words, lambda: plot(*args, **kwargs)))

    return drawn


@dataclass(frozen=True, slots=True)
class _Picture:
    words: str
    draw: Callable[[], bytes] = field(compare=False)


@functools.lru_cache(maxsize=KEPT_PICTURES)
def _draw(picture: _Picture) -> bytes:
    return picture.draw()


@drawn_once
def ratio_plot(
    records: Sequence[IntervalRecord], *, theme: Theme = LIGHT, domains: Sequence[str] | None = None
) -> bytes:
    """PNG of `ratio_figure`."""
    return as_png(ratio_figure(records, theme=theme, domains=domains))


@drawn_once
def mixture_plot(records: Sequence[IntervalRecord], *, theme: Theme = LIGHT) -> bytes:
    """PNG of `mixture_figure`."""
    return as_png(mixture_figure(records, theme=theme))


def ratio_figure(
    records: Sequence[IntervalRecord], *, theme: Theme = LIGHT, domains: Sequence[str] | None = None
) -> Figure:
    """ℓ_S/ℓ_T of every domain against tokens seen, with a line at 1. One Line2D a domain, in `domains_of` order.

    Args:
        domains: only these, in this order.

    Raises:
        ValueError: as `domains_of`.
    """
    chosen = domains_of(records) if domains is None else domains
    ratios = {domain: [record.gap(domain).ratio for record in records] for domain in chosen}
    figure, axes = _canvas(ratios, theme)
    _curves(figure, axes, records, ratios, theme, drawstyle="default")
    axes.axhline(1.0, color=theme.ink, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1.5, gid="caught-up")
    axes.set_ylabel("student / teacher perplexity (1 = caught up)")
    drawn = [ratio for values in ratios.values() for ratio in values if math.isfinite(ratio) and ratio > 0] + [1.0]
    if max(drawn) / min(drawn) > LOG_FROM:
        logarithmic(axes)
    return figure


def mixture_figure(records: Sequence[IntervalRecord], *, theme: Theme = LIGHT) -> Figure:
    """Sampling probability of every domain against tokens seen: a step at each version, which holds until the next.

    Raises:
        ValueError: as `domains_of`.
    """
    probabilities = {
        domain: [record.mixture.probabilities[domain] for record in records] for domain in domains_of(records)
    }
    figure, axes = _canvas(probabilities, theme)
    _curves(figure, axes, records, probabilities, theme, drawstyle="steps-post")
    axes.set_ylabel("sampling probability (%)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_ylim(bottom=0.0)
    return figure


def _canvas(domains: Iterable[str], theme: Theme) -> tuple[Figure, Axes]:
    """An empty figure, large enough for the legend outside the axes."""
    figure = Figure(figsize=theme.inches(theme.labels(domains)), dpi=DPI, facecolor=theme.ground)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)  # inches
    axes = figure.add_subplot(facecolor=theme.ground)
    dress(axes, theme)
    axes.set_xlabel("tokens seen by the student")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if theme.narrow else 7, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def dress(axes: Axes, theme: Theme) -> None:
    """Grid, spines, letters and colours of axes whose x is a number of tokens."""
    axes.grid(visible=True, color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    axes.tick_params(which="both", colors=theme.ink, labelsize=9, labelfontfamily=FONT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=10, fontfamily=FONT)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _curves(
    figure: Figure,
    axes: Axes,
    records: Sequence[IntervalRecord],
    values: dict[str, list[float]],
    theme: Theme,
    *,
    drawstyle: str,
) -> None:
    """One line a domain (points that are not finite are left out), and their legend at the right."""
    tokens, labels = [record.tokens_seen for record in records], theme.labels(values)
    lines = [
        axes.plot(
            tokens,
            [value if math.isfinite(value) else math.nan for value in curve],
            color=COLOURS[place % len(COLOURS)],
            linestyle=DASHES[place // len(COLOURS) % len(DASHES)],
            marker=MARKERS[place % len(MARKERS)] if len(records) <= MARKERS_UNTIL else "",
            markersize=4.0,
            linewidth=1.7,
            drawstyle=drawstyle,
            zorder=2 + place / 1000,
        )[0]
        for place, curve in enumerate(values.values())
    ]
    if tokens[0] == tokens[-1]:
        # A run that has only been measured: an axis of ±0.05 tokens would show nonsense as its ticks.
        axes.set_xlim(tokens[0] - 1, tokens[0] + 1)
        axes.set_xticks([tokens[0]])
    legend = figure.legend(
        lines,
        labels,
        loc="outside lower center" if theme.narrow else "outside right upper",
        ncols=theme.legend_columns(labels),
        frameon=False,
        labelcolor=theme.ink,
        prop=FontProperties(family=FONT, size=8.5),
        handlelength=3.0,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a domain may be called 'a$b$'


def logarithmic(axes: Axes) -> None:
    """Powers of ten and 2 and 5 between them, written as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def drawable(text: str, length: int = LABEL_LENGTH) -> str:
    """`text` in at most `length` letters (its middle left out), and without what the font cannot draw.

    'web\\n' → 'webU+000A': a missing glyph would be a box, the same for every domain in that script.
    """
    glyphs = get_font(findfont(FONT)).get_charmap()
    spelled = "".join(
        letter if letter.isprintable() and ord(letter) in glyphs else f"U+{ord(letter):04X}" for letter in text
    )
    half = length // 2
    return spelled if len(spelled) <= length else f"{spelled[: half - 1]}…{spelled[-half:]}"


def as_png(figure: Figure) -> bytes:
    """The figure in 128 colours, two fifths of the bytes of full colour, and without metadata (date, version)."""
    canvas, out = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    image = Image.fromarray(pixels).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(out, format="PNG")
    return out.getvalue()
