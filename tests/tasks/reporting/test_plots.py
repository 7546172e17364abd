"""The figures are judged by their data and labels; the bytes only for being a PNG, always the same."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from tasks.reporting.plots import (
    DARK,
    LABEL_LENGTH,
    LIGHT,
    drawable,
    mixture_figure,
    mixture_plot,
    ratio_figure,
    ratio_plot,
)

TOKENS = [0, 4608, 9216]


def curves(figure):
    """The domains' lines: all but the one at 1."""
    return [line for line in figure.axes[0].get_lines() if line.get_gid() != "caught-up"]


def legend_labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_ratio_curves_hold_the_measured_ratios(records):
    figure = ratio_figure(records)
    assert [list(line.get_xdata()) for line in curves(figure)] == [TOKENS] * 3
    assert [list(line.get_ydata()) for line in curves(figure)] == [[3.0, 2.5, 2.0], [4.0, 2.0, 1.5], [1.5, 1.25, 1.0]]
    assert legend_labels(figure) == ["math", "code", "web"]
    (reference,) = [line for line in figure.axes[0].get_lines() if line.get_gid() == "caught-up"]
    assert set(reference.get_ydata()) == {1.0}


def test_mixture_is_a_step_that_starts_at_its_version(records):
    figure = mixture_figure(records)
    for line, domain in zip(curves(figure), ("math", "code", "web"), strict=True):
        assert line.get_drawstyle() == "steps-post"
        assert list(line.get_xdata()) == TOKENS
        assert list(line.get_ydata()) == [record.mixture.probabilities[domain] for record in records]


def test_axes_are_labelled_with_their_units(records):
    ratio_axes, mixture_axes = ratio_figure(records).axes[0], mixture_figure(records).axes[0]
    assert ratio_axes.get_xlabel() == mixture_axes.get_xlabel() == "tokens seen by the student"
    assert ratio_axes.get_ylabel() == "student / teacher perplexity (1 = caught up)"
    assert mixture_axes.get_ylabel() == "sampling probability (%)"
    assert mixture_axes.yaxis.get_major_formatter()(0.25, None) == "25"
    format_tokens = ratio_axes.xaxis.get_major_formatter()
    assert [format_tokens(value) for value in (0, 500_000, 1.5e6, 2e9)] == ["0", "500k", "1.5M", "2G"]


def test_a_domain_looks_the_same_in_both_plots(records):
    def looks(figure):
        return [(to_hex(line.get_color()), line.get_linestyle(), line.get_marker()) for line in curves(figure)]

    assert looks(ratio_figure(records)) == looks(mixture_figure(records))


@pytest.mark.parametrize(("start", "scale"), [(9.0, "linear"), (11.0, "log")])
def test_log_scale_where_ratios_span_more_than_ten(make_records, start, scale):
    assert ratio_figure(make_records({"a": [start, 1.0]})).axes[0].get_yscale() == scale


def test_log_scale_counts_the_line_at_one(make_records):
    assert ratio_figure(make_records({"a": [30.0, 20.0]})).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("theme", [LIGHT, replace(DARK, narrow=True)], ids=["wide", "narrow"])
@pytest.mark.parametrize("count", [1, 8, 40])
def test_up_to_forty_domains_are_told_apart(make_records, count, theme):
    records = make_records({f"a_rather_long_domain_name_{place:02d}": [2.0 + place, 1.5] for place in range(count)})
    figure = ratio_figure(records, theme=theme)
    looks = {(line.get_color(), repr(line._dash_pattern)) for line in curves(figure)}
    assert len(looks) == count
    assert len(set(legend_labels(figure))) == count
    FigureCanvasAgg(figure).draw()
    axes, legend = figure.axes[0].get_window_extent(), figure.legends[0].get_window_extent()
    assert not axes.overlaps(legend)
    assert axes.width > 0.4 * figure.bbox.width
    assert axes.height > 150
    for edge in (legend.x0, figure.bbox.x1 - legend.x1, legend.y0, figure.bbox.y1 - legend.y1):
        assert edge >= 0, "the legend is cut off"


def test_one_version_is_drawn_at_its_only_point(make_records):
    figure = ratio_figure(make_records({"a": [2.0], "b": [3.0]}))
    assert list(figure.axes[0].get_xticks()) == [0]
    assert [list(line.get_ydata()) for line in curves(figure)] == [[2.0], [3.0]]


def test_an_infinite_perplexity_is_left_out(make_records):
    records = make_records({"a": [math.inf, 2.0], "b": [3.0, 2.0]})
    first = curves(ratio_figure(records))[0].get_ydata()
    assert math.isnan(first[0])
    assert first[1] == 2.0
    assert ratio_plot(records)


@pytest.mark.parametrize("plot", [ratio_plot, mixture_plot])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_png_has_the_same_bytes_each_time_and_no_metadata(records, plot, theme):
    png = plot(records, theme=theme)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png is plot(list(records), theme=theme), "drawn once"
    assert png == plot.__wrapped__(records, theme=theme), "and drawn again it is the same"
    assert png != plot(records[:-1], theme=theme)
    with Image.open(io.BytesIO(png)) as image:
        assert image.width > 900
        assert not image.info.keys() & {"Software", "Creation Time", "date"}


def test_themes_differ(records):
    assert ratio_plot(records, theme=LIGHT) != ratio_plot(records, theme=DARK)


def test_names_that_matplotlib_would_misread_are_drawn_as_they_are(make_records):
    # '_a' would be left out of the legend, '$a$b$' read as broken mathematics, '书' be an empty box with a warning.
    records = make_records({"_a": [2.0], "$a$b$": [2.0], "书": [2.0]})
    assert legend_labels(ratio_figure(records)) == ["_a", "$a$b$", "U+4E66"]
    assert ratio_plot(records)


def test_drawable_keeps_both_ends_of_a_long_name():
    assert drawable("x\n") == "xU+000A"
    long = drawable("languages_python_from_the_stack_v1")
    assert long == "languages_p…the_stack_v1"
    assert len(long) == LABEL_LENGTH


def test_no_records_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="the mixture history is empty"):
        ratio_figure([])
