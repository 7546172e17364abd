"""Benchmark results beside the perplexities: rows, a CSV, a page, and a section for a run's main report.

    report_evaluation(root, run)      writes <run>/report/evaluation.html and evaluation.csv, and context.csv if any
    evaluation_section(root, run)     the page's tables as HTML for another page; None where nothing was evaluated

All of it is made from what lies in the run's folder; no model is asked anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from storage.files import uri
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from tasks.evaluation.local_files import FORMATS
from tasks.evaluation.names import COMPLETION, PRESETS, ROLES, headline
from tasks.reporting.concepts import (
    by_benchmark,
    concept_rows,
    earlier_records,
    earlier_run,
    roles_of,
    with_concepts,
    with_interval,
)
from tasks.reporting.context import by_figure, is_context, measured_context, shown, stretch
from tasks.reporting.now import key_of
from tasks.reporting.page import environment as plain_environment
from tasks.reporting.records import Row, render_csv
from tasks.showing.artifacts import add_version
from tasks.showing.artifacts import table as as_artifact
from tasks.showing.formats import UNKNOWN, escape, ppl

_ORDER = [*dict.fromkeys([*(benchmark.task for benchmark in PRESETS["paper"]), *FORMATS])]


def report_evaluation(root: str, run: str) -> dict[str, str]:
    """Write the page and the table of all scores, and publish them in Prefect's UI.

    Returns:
        The URL of each file by its name.
    """
    rows, concepts = measured_rows(root, run)
    folder = RunFolder(root, run)
    contents = {"evaluation.html": _page(root, run), "evaluation.csv": render_csv(with_concepts(rows, concepts))}
    if context := measured_context(root, run):
        contents["context.csv"] = render_csv(context)
    urls = {name: uri.join(folder.report_url, name) for name in contents}
    for name, content in contents.items():
        uri.write_bytes(urls[name], content.encode())
    _publish(folder, rows)
    return urls


def measured_rows(root: str, run: str) -> tuple[list[Row], list[Row]]:
    """The rows of all benchmarks, and of the concepts in them.

    Where the run's mixture followed accuracies on a benchmark that the run itself has not been asked (yet), there are
    concepts of that too.
    """
    records, earlier = EvaluationFolder(root, run).records(), earlier_records(root, run)
    rows = evaluation_rows(records)
    own = {(row["task"], row["shots"]) for row in rows}
    followed = [row for row in evaluation_rows(earlier) if (row["task"], row["shots"]) not in own]
    return rows, concept_rows(records, [*rows, *followed], earlier)


def evaluation_section(root: str, run: str) -> Markup | None:
    """The tables as HTML (`<section>`s with headings of the second level), every value escaped; None without scores."""
    rows, concepts = measured_rows(root, run)
    anything = rows or concepts or measured_context(root, run)
    return Markup(_render("evaluation_section.html.j2", root, run)) if anything else None  # noqa: S704 (made by jinja2)


def evaluation_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a benchmark and metric: task, shots, questions, the three models' scores and their standard errors.

    Of a task with the same number of examples, what was asked with the most questions (of those, last) is `shown` on
    the page: its main metric, and both of a completion. All else is in the CSV.

    `closed` is the share of the distance to the teacher that the student has made up; None where a score is missing, or
    that distance is no larger than its standard error. Scores in one row answer the same questions; of two that a model
    has, the later counts.
    """
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    asked = (record for record in records if not is_context(record))
    for record in sorted(asked, key=lambda record: record["measured_at"]):
        for metric in record["metrics"] or {"": None}:
            found.setdefault((record["question"], metric), {})[record["model"]] = record
    executed = {question for question, metric in found if metric}
    rows = [
        _row(metric, models)
        for (question, metric), models in found.items()
        if metric or question not in executed  # programs that only one model's were executed of
    ]
    best: dict[tuple[str, int], Row] = {}
    for row in rows:  # in the order in which they were measured
        line = (row["task"], row["shots"])
        if line not in best or row["questions"] >= best[line]["questions"]:
            best[line] = row
    for row in rows:
        main = row["headline"] or row["task"].startswith(f"{COMPLETION}:")
        row["shown"] = main and row["question"] == best[row["task"], row["shots"]]["question"]
    return sorted(rows, key=lambda row: (_place(row["task"]), row["shots"], -row["questions"], not row["headline"]))


def _row(metric: str, models: Mapping[str, Mapping[str, Any]]) -> Row:
    record = next(iter(models.values()))
    scores = {role: models[role]["metrics"].get(metric, {}) if role in models else {} for role in ROLES}
    values: dict[str, float | None] = {role: scores[role].get("value") for role in ROLES}
    errors: dict[str, float | None] = {role: scores[role].get("stderr") for role in ROLES}
    return {
        "task": record["task"],
        "shots": record["shots"],
        "questions": record["asked"],
        "of": record["available"],
        "metric": metric,
        "headline": metric == (headline(record["task"], list(record["metrics"])) or ""),
        **values,
        **{f"{role}_stderr": errors[role] for role in ROLES},
        "closed": _closed(values, errors),
        "executed": record.get("executed"),
        "source": record["source"],
        "question": record["question"],
    }


def _closed(values: Mapping[str, float | None], errors: Mapping[str, float | None]) -> float | None:
    before, student, teacher = (values[role] for role in ROLES)
    if before is None or student is None or teacher is None:
        return None
    # Of a distance that may as well be chance, no share is told.
    if teacher - before <= math.hypot(errors["before"] or 0.0, errors["teacher"] or 0.0):
        return None
    return (student - before) / (teacher - before)


def _place(task: str) -> tuple[int, str]:
    name = task.partition(":")[0]
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER) + (name == COMPLETION), task)


def perplexities(root: str, run: str) -> dict[str, dict[str, float]]:
    """By domain: 'before', 'student' (as measured last) and 'teacher'; empty where nothing was measured."""
    folder = RunFolder(root, run)
    records = MixtureHistory(folder.url).whole(folder.summary())
    if not records:
        return {}
    before = {gap.domain: gap.student_ppl for gap in records[0].gaps}
    return {
        gap.domain: {"before": before[gap.domain], "student": gap.student_ppl, "teacher": gap.teacher_ppl}
        for gap in records[-1].gaps
    }


def completion_rows(rows: Sequence[Row], ppl: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One row a domain: exact match and edit similarity of each model beside its perplexity there."""
    found: dict[str, Row] = {}
    for row in rows:
        task, _, domain = row["task"].partition(":")
        if task == COMPLETION and row["shown"]:
            line = found.setdefault(
                domain, {"domain": domain, "questions": row["questions"], "ppl": ppl.get(domain, {})}
            )
            line[row["metric"].partition(",")[0]] = row
    return list(found.values())


def means(rows: Sequence[Row]) -> Row | None:
    """Each model's mean over the benchmarks that all three have a score for; None where there are fewer than two."""
    complete = [row for row in rows if all(row[role] is not None for role in ROLES)]
    if len(complete) < 2:
        return None
    values: dict[str, float | None] = {role: sum(row[role] for row in complete) / len(complete) for role in ROLES}
    # The error of a mean of independent scores.
    errors: dict[str, float | None] = {
        role: math.hypot(*(row[f"{role}_stderr"] or 0.0 for row in complete)) / len(complete) for role in ROLES
    }
    return {"count": len(complete), **values, "closed": _closed(values, errors)}


def terminal_scores(rows: Sequence[Row]) -> Table:
    """The headline scores, in percent."""
    table = Table(title="Benchmarks, in %", title_justify="left")
    table.add_column("task", no_wrap=True)
    for heading in ("shots", "questions", "metric", *ROLES, "gap closed"):
        table.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    for row in rows:
        if row["shown"]:
            table.add_row(
                Text(row["task"]),
                str(row["shots"]),
                questions(row),
                Text(metric_name(row)),
                *(score(row[role]) for role in ROLES),
                score(row["closed"], 0),
            )
    return table


def score(value: float | None, decimals: int = 2) -> str:
    """0.12345 → '12.35'."""
    return UNKNOWN if value is None else f"{100 * value:.{decimals}f}"


def questions(row: Row) -> str:
    """'20 of 2376', or '2376' where all were asked."""
    return f"{row['questions']:,}" if row["questions"] == row["of"] else f"{row['questions']:,} of {row['of']:,}"


def metric_name(row: Row) -> str:
    """'acc' of 'acc,none'; what no metric could be taken of says so."""
    return row["metric"].removesuffix(",none") or "not executed (--allow-code)"


def _page(root: str, run: str) -> str:
    return _render("evaluation.html.j2", root, run)


def _render(template: str, root: str, run: str) -> str:
    rows, concepts = measured_rows(root, run)
    measured = perplexities(root, run)
    earlier = earlier_run(root, run)
    benchmarks = [row for row in rows if row["shown"] and not row["task"].startswith(f"{COMPLETION}:")]
    return (
        _environment()
        .get_template(template)
        .render(
            run=run,
            config=RunFolder(root, run).config(),
            rows=rows,
            benchmarks=benchmarks,
            means=means(benchmarks),
            completions=completion_rows(rows, measured),
            concepts={name: (tree, roles_of(tree)) for name, tree in by_benchmark(concepts).items()},
            context=by_figure(measured_context(root, run)),
            earlier=earlier and earlier[0],
            perplexities=measured,
            roles=ROLES,
            cut_short=any(row["questions"] < row["of"] for row in rows),
            unisolated=any(row["executed"] == "unisolated" for row in rows),
        )
    )


def _environment() -> jinja2.Environment:
    environment = plain_environment()
    environment.filters |= {"score": score, "questions": questions, "metric_name": metric_name, "ppl": _ppl}
    environment.filters |= {"stretch": stretch}
    environment.globals |= {"with_interval": with_interval, "shown": shown}
    return environment


def _ppl(value: float | None) -> str:
    return UNKNOWN if value is None else ppl(value)


def _publish(folder: RunFolder, rows: Sequence[Row]) -> None:
    """What is shown on the page, as a table in Prefect's UI; outside of a run nothing happens."""
    shown = [row for row in rows if row["shown"]]
    if shown:
        add_version(
            key_of(folder, "evaluation"),
            "table",
            as_artifact(
                [
                    {
                        "task": escape(row["task"]),
                        "shots": str(row["shots"]),
                        "questions": questions(row),
                        "metric": escape(metric_name(row)),
                        **{role: score(row[role]) for role in ROLES},
                        "gap closed": score(row["closed"], 0),
                    }
                    for row in shown
                ]
            ),
            "Benchmarks of the student before, the distilled student and the teacher, in %",
        )
