"""What `ddk eval --context` measured: perplexity by position and passkeys found, as rows, tables and a CSV.

A row is a stretch of positions of one domain, the positions from the beginning to its end, or one length of the texts
with a passkey; it has a value of each model, and its standard error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from storage.runs.evaluations import CONTEXT_KIND, EvaluationFolder
from tasks.evaluation.names import ROLES
from tasks.reporting.records import Row
from tasks.showing.formats import UNKNOWN, count, ppl

_METRIC = re.compile(r"(ppl),(\d+)-(\d+)|(ppl_to),(\d+)|(acc),(\d+)")
FIGURES: Mapping[str, str] = {"ppl": "perplexity", "ppl_to": "perplexity up to", "acc": "passkeys found"}


def is_context(record: Mapping[str, Any]) -> bool:
    """Whether a record is of long inputs, and of no benchmark."""
    return record.get("kind") == CONTEXT_KIND


def measured_context(root: str, run: str) -> list[Row]:
    """The rows of a run; empty where nothing was measured."""
    return context_rows(EvaluationFolder(root, run).records())


def context_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a domain (or passkeys), figure and stretch: `before`, `student`, `teacher` and their standard errors.

    Of two measurements with the same figure the later counts, as a whole: of all models on the same inputs.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in sorted(filter(is_context, records), key=lambda one: one["measured_at"]):
        task = record["task"]
        for metric, score in record["metrics"].items():
            match = _METRIC.fullmatch(metric)
            if match is None:
                continue
            figure = match[1] or match[4] or match[6]
            first, last = (int(match[2]), int(match[3])) if match[1] else (0, int(match[5] or match[7]))
            key = (task, metric)
            if key not in found or found[key]["question"] != record["question"]:
                found[key] = {
                    "domain": task.partition(":")[2],
                    "figure": figure,
                    "first": first,
                    "last": last,
                    "trained": record.get("trained"),
                    "inputs": record["asked"],
                    "source": record["source"],
                    "question": record["question"],
                    "task": task,
                    **{f"{role}{end}": None for role in ROLES for end in ("", "_stderr")},
                }
            found[key][record["model"]] = score["value"]
            found[key][f"{record['model']}_stderr"] = score["stderr"]
    order = list(FIGURES)
    return sorted(found.values(), key=lambda row: (order.index(row["figure"]), row["domain"], row["last"]))


def by_figure(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """'ppl', 'ppl_to' and 'acc', those that there are."""
    return {name: mine for name in FIGURES if (mine := [row for row in rows if row["figure"] == name])}


def stretch(row: Row) -> str:
    """'256 to 512 (1x to 2x)', or '512 (2x)'."""
    trained = row["trained"]
    if row["figure"] == "ppl":
        times = f" ({_times(row['first'], trained)} to {_times(row['last'], trained)})" if trained else ""
        return f"{count(row['first'])} to {count(row['last'])}{times}"
    return f"{count(row['last'])}" + (f" ({_times(row['last'], trained)})" if trained else "")


def _times(positions: int, trained: int) -> str:
    return f"{positions / trained:.3g}×"


def shown(row: Row, role: str) -> str:
    """A perplexity, or a share in percent."""
    value = row[role]
    if value is None:
        return UNKNOWN
    return f"{100 * value:.0f} %" if row["figure"] == "acc" else ppl(value)


def terminal_context(rows: Sequence[Row]) -> list[Table]:
    """Perplexity by position, and passkeys found; what is cumulated is on the page and in the CSV."""
    tables = []
    for figure, mine in by_figure(rows).items():
        if figure == "ppl_to":
            continue
        perplexity = figure == "ppl"
        title = "Perplexity by position on long documents" if perplexity else "Passkeys found, by length"
        table = Table(title=title, title_justify="left")
        headings = ("domain", "positions") if perplexity else ("length",)
        for heading in (*headings, *ROLES):
            table.add_column(heading, justify="left" if heading == "domain" else "right", no_wrap=True)
        for row in mine:
            cells = (Text(row["domain"]),) if perplexity else ()
            table.add_row(*cells, stretch(row), *(shown(row, role) for role in ROLES))
        tables.append(table)
    return tables
