"""Scores as rows, and the page made of them."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from ddk.values import DomainGap, Mixture
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record
from tasks.reporting.scores import evaluation_rows, evaluation_section, means, report_evaluation, terminal_scores

RUN = "try"


def record(model: str, task: str, at: float = 0.0, question: str = "q", **changes: Any) -> dict[str, Any]:
    """`changes`: fields of the record, or metrics as `acc=(value, stderr)`."""
    metrics = {
        f"{name},none": {"value": value[0], "stderr": value[1], "higher_is_better": True}
        for name, value in changes.items()
        if isinstance(value, tuple)
    }
    fields = {name: value for name, value in changes.items() if not isinstance(value, tuple)}
    return {
        "model": model,
        "task": task,
        "question": f"{task} {question}",
        "measured_at": at,
        "shots": 0,
        "asked": 100,
        "available": 100,
        "source": "a file",
        "metrics": metrics,
        **fields,
    }


def three(task: str, before: float, student: float, teacher: float, error: float = 0.01, **changes: Any) -> list[Any]:
    values = {"before": before, "student": student, "teacher": teacher}
    return [record(model, task, acc=(value, error), **changes) for model, value in values.items()]


def test_one_row_a_benchmark_with_the_three_side_by_side() -> None:
    (row,) = evaluation_rows(three("arc_easy", 0.3, 0.45, 0.6))
    assert (row["before"], row["student"], row["teacher"]) == (0.3, 0.45, 0.6)
    assert row["closed"] == pytest.approx(0.5)
    assert row["shown"]


def test_no_share_is_told_of_a_distance_that_may_be_chance() -> None:
    assert evaluation_rows(three("arc_easy", 0.30, 0.31, 0.34, error=0.05))[0]["closed"] is None
    assert evaluation_rows(three("arc_easy", 0.30, 0.31, 0.29))[0]["closed"] is None
    assert evaluation_rows(three("arc_easy", 0.30, 0.25, 0.50))[0]["closed"] == pytest.approx(-0.25)
    only = [one for one in three("arc_easy", 0.3, 0.4, 0.6) if one["model"] != "teacher"]
    assert (evaluation_rows(only)[0]["closed"], evaluation_rows(only)[0]["teacher"]) == (None, None)


def test_the_later_score_and_the_larger_number_of_questions_count() -> None:
    tried = three("arc_easy", 0.1, 0.1, 0.1, at=9.0, question="first 8", asked=8)
    whole = three("arc_easy", 0.3, 0.4, 0.6, at=1.0)
    again = [record("student", "arc_easy", at=2.0, acc=(0.5, 0.01))]
    rows = evaluation_rows([*tried, *whole, *again])
    assert [(row["questions"], row["student"], row["shown"]) for row in rows] == [(100, 0.5, True), (8, 0.1, False)]


def test_shots_are_other_benchmarks() -> None:
    rows = evaluation_rows([*three("gsm8k", 0.1, 0.2, 0.3), *three("gsm8k", 0.2, 0.3, 0.4, question="five", shots=5)])
    assert [(row["shots"], row["shown"]) for row in rows] == [(0, True), (5, True)]


def test_programs_that_were_not_executed_are_named() -> None:
    rows = evaluation_rows([record(model, "humaneval") for model in ("before", "student", "teacher")])
    assert [(row["metric"], row["shown"], row["student"]) for row in rows] == [("", True, None)]
    rows = evaluation_rows([record("before", "humaneval"), record("student", "humaneval", **{"pass@1": (0.5, 0.1)})])
    assert [(row["metric"], row["before"], row["student"]) for row in rows] == [("pass@1,none", None, 0.5)]


def test_the_order_is_the_papers_and_completions_come_last() -> None:
    tasks = ("completion:java", "zebra", "humaneval", "arc_easy", "ceval-valid", "piqa")
    rows = evaluation_rows([one for task in tasks for one in three(task, 0.1, 0.2, 0.3)])
    assert [row["task"] for row in rows] == ["ceval-valid", "arc_easy", "humaneval", "piqa", "zebra", "completion:java"]


def test_the_mean_is_over_what_all_three_have() -> None:
    rows = evaluation_rows(
        [
            *three("arc_easy", 0.3, 0.4, 0.6),
            *three("mmlu", 0.2, 0.4, 0.8),
            record("student", "piqa", acc=(0.9, 0.01)),
        ]
    )
    mean = means(rows)
    assert mean is not None
    assert (mean["count"], mean["before"], mean["student"], mean["teacher"]) == (2, 0.25, 0.4, pytest.approx(0.7))
    assert mean["closed"] == pytest.approx((0.4 - 0.25) / (0.7 - 0.25))
    assert means(rows[:1]) is None


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A run with scores, completions and perplexities; a task with a name that is no HTML."""
    folder = EvaluationFolder(str(tmp_path), RUN)
    records = [
        *three("arc_easy", 0.3, 0.45, 0.6, asked=20),
        *three("<b>bold</b>", 0.1, 0.2, 0.3),
        *(
            record(model, "completion:java", exact_match=(value / 2, 0.01), edit_similarity=(value, 0.01))
            for model, value in (("before", 0.2), ("student", 0.31), ("teacher", 0.4))
        ),
    ]
    for i, one in enumerate(records):
        folder.write(one["model"], f"task-{i}", one)
    gaps = (DomainGap(domain="java", student_ppl=12.5, teacher_ppl=7.25),)
    history = MixtureHistory(RunFolder(str(tmp_path), RUN).url)
    history.append(_mixture(0, gaps))
    history.append(_mixture(1, (DomainGap(domain="java", student_ppl=9.75, teacher_ppl=7.25),)))
    return str(tmp_path)


def _mixture(version: int, gaps: tuple[DomainGap, ...]) -> Any:
    return make_record(
        version=version,
        step=version,
        tokens_seen=version,
        gaps=gaps,
        mixture=Mixture(probabilities={"java": 1.0}),
        blocks_drawn={"java": version},
    )


def test_the_page_shows_scores_beside_perplexities(root: str) -> None:
    urls = report_evaluation(root, RUN)
    page = Path(urls["evaluation.html"]).read_text()
    for shown in ("arc_easy", "45.00", "50&nbsp;%", "20 of 100", "31.0", "15.5", "12.50", "9.75", "7.25"):
        assert shown in page, shown
    assert "Not all questions were asked" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page
    assert "<script" not in page
    assert "http" not in page.replace('lang="en"', "")
    rows = list(csv.DictReader(io.StringIO(Path(urls["evaluation.csv"]).read_text())))
    assert {row["task"] for row in rows} == {"arc_easy", "<b>bold</b>", "completion:java"}
    assert next(row for row in rows if row["task"] == "arc_easy")["student"] == "0.45"


def test_the_section_for_another_page_is_the_pages_own(root: str, tmp_path: Path) -> None:
    section = evaluation_section(root, RUN)
    assert section is not None
    assert section.startswith("<section")
    assert "<html" not in section
    page = Path(report_evaluation(root, RUN)["evaluation.html"]).read_text()
    assert section.strip() in page
    assert evaluation_section(root, "no such run") is None


def test_a_run_without_scores_has_a_page_that_says_so(tmp_path: Path) -> None:
    page = Path(report_evaluation(str(tmp_path), "empty")["evaluation.html"]).read_text()
    assert "No benchmark has been evaluated" in page


def test_the_terminal_shows_one_line_a_benchmark() -> None:
    tried = three("[red]", 0.1, 0.1, 0.1, question="first 8", asked=8)
    table = terminal_scores(evaluation_rows([*tried, *three("[red]", 0.3, 0.45, 0.6)]))
    assert table.row_count == 1
    assert str(next(iter(table.columns[0].cells))) == "[red]"
