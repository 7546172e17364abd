"""Accuracies along the paths of the questions: the tree of a benchmark, at every level the weakest first.

A row is a node of the tree (`arithmetic`, `arithmetic/addition`) of one benchmark and metric, with the number of its
questions, and for each model its accuracy and Wilson's 95% interval. Where a run followed the accuracies of an earlier
one (`mixture.accuracy_run`), the earlier run's are there too, as the role `earlier`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ddk.concepts import rolled_up_tallies, weakest_first, wilson
from ddk.domain_tree import depth
from ddk.values import Tally
from storage.files.names import plain_name
from storage.runs.evaluations import EvaluationFolder, concepts_of
from storage.runs.folder import RunFolder
from tasks.evaluation.names import ROLES
from tasks.reporting.records import Row
from tasks.showing.formats import UNKNOWN

EARLIER = "earlier"
SHOWN_ROLES = (EARLIER, *ROLES)
"""The order of the columns."""
_RANKED_BY = ("student", "before", EARLIER, "teacher")
"""Whose accuracy makes a node weak: the first of these that was asked."""
_MOST_NODES, _WEAKEST = 40, 12
"""Of a table in the terminal: with more nodes it has only those above the leaves, and so many of the weakest leaves."""

Record = Mapping[str, Any]


def earlier_run(root: str, run: str) -> tuple[str, str] | None:
    """The run whose accuracies a run followed, and whose they are; None where it followed none."""
    folder = RunFolder(root, run)
    mixture = (folder.config() or {}).get("mixture", {})
    if mixture.get("follow", "gap") == "gap" or (name := mixture.get("accuracy_run")) is None:
        return None
    model = mixture.get("accuracy_model", "student")
    return plain_name(name, folder.url), model if model in ROLES else "student"


def earlier_records(root: str, run: str) -> list[Record]:
    """What the earlier run's model answered; empty where there is no earlier run."""
    found = earlier_run(root, run)
    if found is None:
        return []
    name, model = found
    return [record for record in EvaluationFolder(root, name).records() if record["model"] == model]


def concept_rows(records: Sequence[Record], rows: Sequence[Row], earlier: Sequence[Record] = ()) -> list[Row]:
    """A row for every node of every benchmark and metric, in the order of the benchmarks.

    Args:
        records: of the run's evaluations.
        rows: `tasks.reporting.scores.evaluation_rows` of them.
        earlier: records of the model that the run's mixture followed.
    """
    newest: dict[tuple[str, str], Record] = {}
    for record in sorted([*records, *earlier], key=lambda record: float(record["measured_at"])):
        role = EARLIER if any(record is one for one in earlier) else record["model"]
        newest[role, record["question"]] = record
    found: list[Row] = []
    for row in rows:
        tallies = {
            role: _of_metric(newest[role, row["question"]], row["metric"])
            for role in SHOWN_ROLES
            if (role, row["question"]) in newest
        }
        found += _tree({role: by_path for role, by_path in tallies.items() if by_path}, row)
    return found


def _of_metric(record: Record, metric: str) -> dict[str, Tally]:
    return {path: by_metric[metric] for path, by_metric in concepts_of(record).items() if metric in by_metric}


def _tree(tallies: Mapping[str, Mapping[str, Tally]], row: Row) -> list[Row]:
    leading = next((role for role in _RANKED_BY if role in tallies), None)
    if leading is None:
        return []
    by_role = {role: rolled_up_tallies(by_path) for role, by_path in tallies.items()}
    order = weakest_first(tallies[leading])
    leaves = [node for node in order if not any(other.startswith(f"{node}/") for other in order)]
    weakest = min(leaves, key=lambda leaf: by_role[leading][leaf].accuracy)
    return [
        {
            "task": row["task"],
            "shots": row["shots"],
            "metric": row["metric"],
            "question": row["question"],
            "shown": row["shown"] and row["headline"],
            "concept": node,
            "leaf": node in leaves,
            "weakest": node == weakest,
            "questions": by_role[leading][node].asked,
            **{
                name: value
                for role in SHOWN_ROLES
                for name, value in _measured(role, by_role.get(role, {}).get(node)).items()
            },
        }
        for node in order
    ]


def _measured(role: str, tally: Tally | None) -> Row:
    low, high = (None, None) if tally is None else wilson(tally)
    return {role: None if tally is None else tally.accuracy, f"{role}_low": low, f"{role}_high": high}


def roles_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The models that anything is known of."""
    return tuple(role for role in SHOWN_ROLES if any(row[role] is not None for row in rows))


def with_concepts(rows: Sequence[Row], concepts: Sequence[Row]) -> list[Row]:
    """The rows of evaluation.csv: whole benchmarks, whose `concept` is empty, each before the nodes of its tree."""
    names = list(dict.fromkeys([*(name for row in rows for name in row), *(name for row in concepts for name in row)]))
    names = [name for name in names if name not in ("leaf", "weakest")]
    return [
        {name: one.get(name, "" if name == "concept" else None) for name in names}
        for row in rows
        for one in (
            row,
            *(node for node in concepts if (node["question"], node["metric"]) == (row["question"], row["metric"])),
        )
    ]


def by_benchmark(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that a page shows, by the benchmark's name and its number of examples where that is not 0."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["shown"]:
            found.setdefault(row["task"] + (f"@{row['shots']}" if row["shots"] else ""), []).append(row)
    return found


def terminal_concepts(rows: Sequence[Row]) -> list[Table]:
    """A table for each benchmark whose questions have paths, in percent."""
    return [_terminal(name, tree) for name, tree in by_benchmark(rows).items()]


def _terminal(name: str, rows: Sequence[Row]) -> Table:
    leaves = sorted((row for row in rows if row["leaf"]), key=_accuracy)
    few = leaves if len(rows) <= _MOST_NODES else leaves[:_WEAKEST]
    kept = {row["concept"] for row in [*few, *(row for row in rows if not row["leaf"])]}
    title = f"Concepts of {name}, in %, weakest first"
    if len(few) < len(leaves):
        title += f" (the {len(few)} weakest of {len(leaves)} leaves)"
    # Not markup: a benchmark, or a concept, may be called '[red]'.
    table = Table(title=Text(title), title_justify="left")
    table.add_column("concept", no_wrap=True)
    roles = roles_of(rows)
    for heading in ("questions", *roles):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row["concept"] in kept:
            shown = "  " * (depth(row["concept"]) - 1) + row["concept"].rpartition("/")[2]
            table.add_row(Text(shown), f"{row['questions']:,}", *(with_interval(row, role) for role in roles))
    return table


def _accuracy(row: Row) -> float:
    return float(next(row[role] for role in _RANKED_BY if row[role] is not None))


def with_interval(row: Row, role: str) -> str:
    """'45.0 [26, 66]': an accuracy and its interval, in percent."""
    if row[role] is None:
        return UNKNOWN
    return f"{100 * row[role]:.1f} [{100 * row[f'{role}_low']:.0f}, {100 * row[f'{role}_high']:.0f}]"
