"""The tree of accuracies: rows, CSV, page and terminal, before and after."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import binomtest

from ddk.values import Tally
from storage.files import uri
from storage.runs.evaluations import CONCEPTS, EvaluationFolder, stored_concepts
from storage.runs.folder import RunFolder
from tasks.reporting.concepts import by_benchmark, concept_rows, earlier_run, terminal_concepts
from tasks.reporting.scores import evaluation_rows, evaluation_section, measured_rows, report_evaluation

ASKED = {"math/add": 20, "math/mul": 10, "<b>": 5}
BEFORE = {"math/add": 18, "math/mul": 1, "<b>": 2}
NOW = {"math/add": 18, "math/mul": 6, "<b>": 1}


def record(model: str, right: dict[str, int], at: float = 0.0, **changes: Any) -> dict[str, Any]:
    tallies = {path: {"acc,none": Tally(right=count, asked=ASKED[path])} for path, count in right.items()}
    mean = sum(right.values()) / 35
    return {
        "model": model,
        "task": "own_questions",
        "question": "q",
        "measured_at": at,
        "shots": 0,
        "source": "a file",
        "asked": 35,
        "available": 35,
        CONCEPTS: stored_concepts(tallies),
        "metrics": {
            name: {"value": mean, "stderr": 0.01, "higher_is_better": True} for name in ("acc,none", "acc_norm,none")
        },
        **changes,
    }


RECORDS = [record("before", BEFORE), record("student", NOW), record("teacher", ASKED)]


def rows(records: list[dict[str, Any]], earlier: list[dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    found = concept_rows(records, evaluation_rows(records), earlier or [])
    return {row["concept"]: row for row in found}


def test_every_node_of_every_model_the_weakest_first() -> None:
    found = rows(RECORDS)
    assert list(found) == ["<b>", "math", "math/mul", "math/add"]
    math = found["math"]
    assert (math["questions"], math["before"], math["student"], math["teacher"]) == (30, 19 / 30, 24 / 30, 1.0)
    interval = binomtest(24, 30).proportion_ci(method="wilson")
    assert (math["student_low"], math["student_high"]) == pytest.approx((interval.low, interval.high))
    assert [row["weakest"] for row in found.values()] == [True, False, False, False]
    assert math["earlier"] is None
    # Without the student it is the student before that is ranked.
    assert list(rows(RECORDS[:1])) == ["<b>", "math", "math/mul", "math/add"]
    assert rows([{**one, CONCEPTS: {}} for one in RECORDS]) == {}


def test_the_later_answers_count_and_other_questions_are_another_tree() -> None:
    later = record("student", BEFORE, at=9.0)
    assert rows([*RECORDS, later])["math/mul"]["student"] == 0.1
    other = record("student", NOW, question="fewer", asked=3)
    found = concept_rows([*RECORDS, other], evaluation_rows([*RECORDS, other]))
    assert len(found) == 8
    assert {row["question"] for tree in by_benchmark(found).values() for row in tree} == {"q"}


def root_with(tmp_path: Path, **mixture: Any) -> str:
    for run, records in (("first", [record("student", BEFORE)]), ("second", RECORDS)):
        folder = EvaluationFolder(str(tmp_path), run)
        for one in records:
            folder.write(one["model"], "own_questions-0a", one)
    config = {"method": "ddk", "student": {"model": "s"}, "teacher": {"model": "t"}, "mixture": mixture}
    RunFolder(str(tmp_path), "second").claim({"seed": 0}, config)
    return str(tmp_path)


def test_the_page_shows_the_run_that_was_followed_and_this_one(tmp_path: Path) -> None:
    root = root_with(tmp_path, follow="accuracy", accuracy_run="first", accuracy_model="student")
    assert earlier_run(root, "second") == ("first", "student")
    page = evaluation_section(root, "second")
    assert page is not None
    for shown in (
        'id="concepts-1">Concepts of own_questions',
        "followed the accuracies of run first",
        "Run first",
        "60.0 [31, 83]",  # multiplication now,
        "10.0 [2, 40]",  # and before
        "&lt;b&gt; <span",
    ):
        assert shown in page, shown
    assert "<b>" not in page
    assert page.count('class="interval"') == 4
    _, concepts = measured_rows(root, "second")
    assert {row["concept"]: row["earlier"] for row in concepts}["math/mul"] == 0.1


def test_a_run_that_has_not_been_asked_yet_shows_what_it_followed(tmp_path: Path) -> None:
    root = root_with(tmp_path, follow="both", accuracy_run="first")
    uri.remove_tree(EvaluationFolder(root, "second").url)
    page = evaluation_section(root, "second")
    assert page is not None
    assert "No benchmark has been evaluated" in page
    assert "Run first" in page
    assert "10.0 [2, 40]" in page
    assert "Student now" not in page
    assert Path(report_evaluation(root, "second")["evaluation.csv"]).read_text().strip() == ""


def test_the_csv_has_whole_benchmarks_and_below_them_their_concepts(tmp_path: Path) -> None:
    root = root_with(tmp_path, follow="gap")
    assert earlier_run(root, "second") is None
    urls = report_evaluation(root, "second")
    found = list(csv.DictReader(io.StringIO(Path(urls["evaluation.csv"]).read_text())))
    assert [(row["metric"], row["concept"]) for row in found] == [
        ("acc,none", ""),
        *(("acc,none", concept) for concept in ("<b>", "math", "math/mul", "math/add")),
        ("acc_norm,none", ""),
    ]
    assert (found[3]["questions"], found[3]["student"], found[3]["student_stderr"]) == ("10", "0.6", "")
    assert (found[0]["student_low"], found[0]["source"]) == ("", "a file")
    assert "Run first" not in Path(urls["evaluation.html"]).read_text()


def test_the_terminal_shows_the_tree_and_of_a_large_one_the_weakest(tmp_path: Path) -> None:
    def said(tables: list[Any]) -> str:
        console = Console(width=160, record=True, file=io.StringIO())
        for table in tables:
            console.print(table)
        return console.export_text()

    text = said(terminal_concepts(list(rows(RECORDS).values())))
    assert "Concepts of own_questions, in %, weakest first" in text
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[1].rstrip() for line in lines] == [" <b>", " math", "   mul", "   add"]
    assert [cell.strip() for cell in lines[2].split("│")[2:-1]] == [
        "10",
        "10.0 [2, 40]",
        "60.0 [31, 83]",
        "100.0 [72, 100]",
    ]
    many = {f"a/{i:02}": {"acc,none": Tally(right=i, asked=60)} for i in range(50)}
    text = said(terminal_concepts(list(rows([{**RECORDS[0], CONCEPTS: stored_concepts(many)}]).values())))
    assert "(the 12 weakest of 50 leaves)" in " ".join(text.split())
    shown = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert shown == ["a", *(f"{i:02}" for i in range(12))]
