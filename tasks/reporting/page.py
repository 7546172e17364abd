"""A run on one self-contained HTML page, and the same tables for a terminal.

The page holds its plots as data URIs, runs no script and loads nothing, so that it can be mailed, put on S3 or
opened years later. The template is `templates/report.html.j2`; every value that it shows is escaped by jinja2.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jinja2
from markupsafe import Markup

from ddk.values import worst_gap
from tasks.reporting.costs import cost_lines
from tasks.reporting.overtraining import all_alarms, epoch_limit_of, too_often
from tasks.reporting.plots import DARK, LIGHT, mixture_plot, ratio_plot
from tasks.reporting.records import (
    IntervalRecord,
    Row,
    RunSummary,
    domains_of,
    flat_settings,
    gap_table,
    regressions,
    render_rows,
)
from tasks.reporting.selection_plots import selections_plot
from tasks.reporting.tree import overview, rollup_rows, tree_table, weakest
from tasks.showing.formats import count, duration, number_or_unknown, percent, ppl, ratio


def render_page(summary: RunSummary, records: Sequence[IntervalRecord], evaluation: Markup | None = None) -> str:
    """The whole report as one HTML document, for a finished run or one still going.

    Args:
        evaluation: sections with the benchmarks' scores.

    Raises:
        ValueError: as `tasks.reporting.records.domains_of`.
    """
    rows, table, shown, few = render_rows(records), tree_table(records), overview(records), weakest(records)
    leaves = domains_of(records)
    template = environment().get_template("report.html.j2")
    return template.render(
        run=summary,
        costs=cost_lines(summary.costs),
        selections=_images(selections_plot, summary.selections) if summary.selections else None,
        evaluation=evaluation,
        settings=list(flat_settings(summary.settings)),
        table=[{**row, "depth": row["domain"].count("/") if len(table) > len(leaves) else 0} for row in table],
        leaves=leaves,
        regressions=regressions(gap_table(records)),
        too_often=too_often(records),
        alarms=all_alarms(records),
        limit=epoch_limit_of(summary.settings),
        with_epochs=any(record.train_blocks for record in records),
        with_kl=any(record.kl for record in records),
        worst_before=worst_gap(records[0].gaps),
        worst_after=worst_gap(records[-1].gaps),
        intervals=_by_domain([*rows, *rollup_rows(records)], table),
        versions=len(records),
        plots=[
            {
                "title": "Gap",
                "alt": _alt("Line plot of student over teacher perplexity", len(shown[0].gaps)),
                "caption": "Perplexity of the student divided by the teacher's, on each domain's validation blocks. "
                f"At 1 (dotted) the student has caught up.{_rolled_up(shown, records)}",
                **_images(ratio_plot, shown),
            },
            *(
                [
                    {
                        "title": f"Gap of the {len(few)} weakest",
                        "alt": _alt("Line plot of student over teacher perplexity", len(few)),
                        "caption": f"The same, of the {len(leaves)} leaves for those whose gap is largest now.",
                        **_images(partial(ratio_plot, domains=few), records),
                    }
                ]
                if few
                else []
            ),
            {
                "title": "Mixture",
                "alt": _alt("Step plot of sampling probability", len(shown[0].gaps)),
                "caption": "Probability that a training block is drawn from a domain; it changes where the gap was "
                f"measured and holds until the next measurement.{_rolled_up(shown, records)}",
                **_images(mixture_plot, shown),
            },
        ],
    )


def _alt(what: str, lines: int) -> str:
    return (
        f"{what} against tokens seen, a line for each of {lines} domains. The numbers are in the tables of this page."
    )


def _rolled_up(shown: Sequence[IntervalRecord], records: Sequence[IntervalRecord]) -> str:
    if domains_of(shown) == domains_of(records):
        return ""
    return f" The {len(records[0].gaps)} leaves are rolled up to {len(shown[0].gaps)} domains."


def _by_domain(rows: Sequence[Row], table: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each domain, in the table's order."""
    found: dict[str, list[Row]] = {row["domain"]: [] for row in table}
    for row in rows:
        found[row["domain"]].append(row)
    return found


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _images(plot: Callable[..., bytes], records: Sequence[Any]) -> dict[str, str]:
    """The plot in both themes, for a wide screen and for a phone."""
    return {
        f"{shape}_{name}": data_uri(plot(records, theme=replace(theme, narrow=shape == "narrow")))
        for shape in ("wide", "narrow")
        for name, theme in (("light", LIGHT), ("dark", DARK))
    }


def environment(*packages: str) -> jinja2.Environment:
    """Jinja2 with escaping on; `PackageLoader` finds a template in a checkout, a wheel and an editable install.

    Args:
        packages: that have templates of their own, besides those of this one.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in (*packages, "tasks.reporting")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ppl": ppl, "ratio": ratio, "percent": percent, "count": count, "duration": duration}
    environment.filters["number"] = number_or_unknown
    return environment
