"""A run on one page: HTML that needs nothing but itself, and the same tables for a terminal.

The page holds its plots as data URIs, runs no script and loads nothing, so that it can be mailed, put on S3 or
opened years later. The template is `templates/report.html.j2`; every value that it shows is escaped by jinja2.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace

import jinja2
from rich.table import Table
from rich.text import Text

from tasks.formats import count, duration, percent, ppl, ratio
from tasks.report_data import (
    IntervalRecord,
    RunSummary,
    domains_of,
    flat_settings,
    gap_table,
    render_csv,
    render_rows,
    worst_domain,
)
from tasks.report_plots import DARK, LIGHT, mixture_plot, ratio_plot

__all__ = ["gap_table", "mixture_path", "render_csv", "render_page", "render_rows", "terminal_table"]


def render_page(summary: RunSummary, records: Sequence[IntervalRecord]) -> str:
    """The whole report as one HTML document, for a finished run or one still going.

    Raises:
        ValueError: as `report_data.domains_of`.
    """
    rows, gaps = render_rows(records), gap_table(records)
    template = environment().get_template("report.html.j2")
    return template.render(
        run=summary,
        settings=list(flat_settings(summary.settings)),
        gaps=gaps,
        worst_before=worst_domain(records[0]),
        worst_after=worst_domain(records[-1]),
        intervals={gap["domain"]: [row for row in rows if row["domain"] == gap["domain"]] for gap in gaps},
        versions=len(records),
        plots=[
            {
                "title": "Gap",
                "alt": f"Line plot of student over teacher perplexity against tokens seen, a line for each of "
                f"{len(records[0].gaps)} domains. The numbers are in the tables of this page.",
                "caption": "Perplexity of the student divided by the teacher's, on each domain's validation blocks. "
                "At 1 (dotted) the student has caught up.",
                **_images(ratio_plot, records),
            },
            {
                "title": "Mixture",
                "alt": f"Step plot of sampling probability against tokens seen, a line for each of "
                f"{len(records[0].gaps)} domains. The numbers are in the tables of this page.",
                "caption": "Probability that a training block is drawn from a domain; it changes where the gap was "
                "measured and holds until the next measurement.",
                **_images(mixture_plot, records),
            },
        ],
    )


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _images(plot: Callable[..., bytes], records: Sequence[IntervalRecord]) -> dict[str, str]:
    """The plot in both themes, for a wide screen and for a phone."""
    return {
        f"{shape}_{name}": data_uri(plot(records, theme=replace(theme, narrow=shape == "narrow")))
        for shape in ("wide", "narrow")
        for name, theme in (("light", LIGHT), ("dark", DARK))
    }


def environment() -> jinja2.Environment:
    """Jinja2 with escaping on; `PackageLoader` finds the template in a checkout, a wheel and an editable install."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ppl": ppl, "ratio": ratio, "percent": percent, "count": count, "duration": duration}
    return environment


def terminal_table(records: Sequence[IntervalRecord]) -> Table:
    """The gap before and after, domain by domain, the one that lagged most first; the worst now is bold."""
    table = Table(title="Gap to the teacher, before → after", title_justify="left")
    table.add_column("domain", no_wrap=True)
    for heading in ("teacher ppl", "student ppl", "→ now", "ratio", "→ now", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    worst = worst_domain(records[-1])
    for row in gap_table(records):
        table.add_row(
            Text(row["domain"]),  # Text, not str: a domain called '[red]' is no markup
            ppl(row["teacher_ppl"]),
            ppl(row["student_ppl_before"]),
            ppl(row["student_ppl_after"]),
            ratio(row["ratio_before"]),
            ratio(row["ratio_after"]),
            percent(row["token_share"]),
            style="bold" if row["domain"] == worst else None,
        )
    return table


def mixture_path(records: Sequence[IntervalRecord]) -> Table:
    """The sampling probabilities in percent: a row per version of the mixture, a column per domain."""
    table = Table(title="Mixture, in % of the blocks drawn", title_justify="left")
    for heading in ("t", "step", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    domains = domains_of(records)
    for domain in domains:
        table.add_column(Text(domain), justify="right", overflow="fold")
    for record in records:
        table.add_row(
            str(record.t),
            count(record.step),
            count(record.tokens_seen),
            *(f"{100 * record.mixture.probabilities[domain]:.1f}" for domain in domains),
        )
    return table
