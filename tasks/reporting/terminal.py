"""What a terminal shows of a run: two tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ddk.values import worst_gap
from tasks.reporting.overtraining import all_alarms, said, too_often
from tasks.reporting.records import IntervalRecord, domains_of, gap_table, regressions
from tasks.reporting.tree import overview, tree_table
from tasks.showing.formats import count, gap_cells, number_or_unknown, percent


def terminal_table(records: Sequence[IntervalRecord]) -> Table:
    """The gap before and after, domain by domain, the one that lagged most first; the worst now is bold.

    Where domains have paths, a row above the leaves' says what they roll up to. Lines below the table name the domains
    on which the student is worse than before training, and those that it has seen too often, and say why.
    """
    notes = [note for note in (regressions(gap_table(records)), too_often(records)) if note]
    notes += [said(alarm) for alarm in all_alarms(records)]
    table = Table(
        title="Gap to the teacher, before → after",
        title_justify="left",
        caption=Text("\n".join(notes)) if notes else None,
        caption_justify="left",
        caption_style="",
    )
    table.add_column("domain", overflow="fold")
    for heading in ("teacher\nppl", "student\nppl", "→ now", "ratio", "→ now", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    with_epochs = bool(records[-1].train_blocks)
    if with_epochs:
        table.add_column("epochs", justify="right", no_wrap=True)
    worst, rows, leaves = worst_gap(records[-1].gaps).domain, tree_table(records), domains_of(records)
    for row in rows:
        table.add_row(
            Text(_branch(row["domain"]) if len(rows) > len(leaves) else row["domain"]),  # no str: '[red]' is no markup
            *gap_cells(row),
            percent(row["token_share"]),
            *([number_or_unknown(row["epochs"], 1)] if with_epochs else []),
            style="bold" if row["domain"] == worst else None if row["domain"] in leaves else "dim",
        )
    return table


def _branch(domain: str) -> str:
    """A row's name below that of the domain which it lies in: 'math/algebra/linear' → '    linear'."""
    *above, name = domain.split("/")
    return "  " * len(above) + name


def mixture_path(records: Sequence[IntervalRecord]) -> Table:
    """The sampling probabilities in percent: a row per version of the mixture, a column per domain.

    Leaves that are too many for columns are rolled up.
    """
    records = overview(records)
    return _mixtures(records, domains_of(records))


def mixture_paths(records: Sequence[IntervalRecord], columns: int) -> list[Table]:
    """The same in as many tables as it takes, none wider than `columns` characters unless a single domain is."""
    records = overview(records)
    fixed = _width("t", *(str(one.t) for one in records)) + _width("step", *(count(one.step) for one in records))
    fixed += _width("tokens", *(count(one.tokens_seen) for one in records)) + 1
    parts: list[list[str]] = [[]]
    for domain in domains_of(records):
        if parts[-1] and fixed + sum(_width(one, "100.0") for one in [*parts[-1], domain]) > columns:
            parts.append([])
        parts[-1].append(domain)
    return [_mixtures(records, part) for part in parts]


def _width(*cells: str) -> int:
    """Of a column with its line and margins."""
    return max(map(len, cells)) + 3


def _mixtures(records: Sequence[IntervalRecord], domains: Sequence[str]) -> Table:
    table = Table(title="Mixture, in % of the blocks drawn", title_justify="left")
    for heading in ("t", "step", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for domain in domains:
        table.add_column(Text(domain), justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            str(record.t),
            count(record.step),
            count(record.tokens_seen),
            *(f"{100 * record.mixture.probabilities[domain]:.1f}" for domain in domains),
        )
    return table
