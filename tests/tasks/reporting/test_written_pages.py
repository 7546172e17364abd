"""The pages that lie in a root, opened in Chromium as files: what they show, on a screen and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visitor, open_browser
from markupsafe import Markup
from playwright.sync_api import Browser

from storage.runs.evaluations import EvaluationFolder
from tasks.comparing.report import write_comparison
from tasks.reporting.scores import evaluation_section, report_evaluation
from tasks.reporting.write_report import write_report

SCORES = {"arc_easy": (0.31, 0.42, 0.55), "mmlu": (0.24, 0.25, 0.26), "completion:java": (0.2, 0.3, 0.4)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def evaluated(tmp_path: Path) -> str:
    """A root with a run of three models' scores."""
    folder = EvaluationFolder(str(tmp_path), "try")
    for task, values in SCORES.items():
        for model, value in zip(("before", "student", "teacher"), values, strict=True):
            names = ("edit_similarity", "exact_match") if task.startswith("completion") else ("acc",)
            metrics = {f"{name},none": {"value": value, "stderr": 0.02, "higher_is_better": True} for name in names}
            about = {"shots": 0, "asked": 400, "available": 400, "source": "a file", "measured_at": 0.0}
            folder.write(model, task, {"model": model, "task": task, "question": task, "metrics": metrics, **about})
    return str(tmp_path)


def visit(browser: Browser, path: str) -> Visitor:
    visitor = Visitor(browser, "file://")
    visitor.open(Path(path).resolve().as_uri())
    assert visitor.page.evaluate("document.documentElement.lang") == "en"
    return visitor


def assert_sound(visitor: Visitor) -> None:
    """Nothing is asked for elsewhere, every picture shows, and a phone need not scroll the page sideways."""
    assert visitor.outside == []
    assert visitor.errors == []
    assert all(width > 300 for width in visitor.widths_of_images())
    for width in (1200, 390):
        visitor.page.set_viewport_size({"width": width, "height": 800})
        assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.page.set_viewport_size({"width": 1200, "height": 800})


def test_benchmarks_on_their_own_page(browser: Browser, evaluated: str) -> None:
    visitor = visit(browser, report_evaluation(evaluated, "try")["evaluation.html"])
    assert_sound(visitor)
    # The mean over the benchmarks, not over completions too; the share of 0.11 in 0.24, none of what may be chance.
    rows = [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in visitor.rows()]
    assert [row[:1] + row[4:] for row in rows[1:]] == [
        ["mmlu", "24.00 ± 2.0", "25.00 ± 2.0", "26.00 ± 2.0", "–"],
        ["arc_easy", "31.00 ± 2.0", "42.00 ± 2.0", "55.00 ± 2.0", "46 %"],
        ["Mean of 2", "27.50", "33.50", "40.50", "46 %"],
    ]
    visitor.shoot("evaluation")


def test_benchmarks_in_the_report(browser: Browser, evaluated: str, summary: Any, records: Any, tmp_path: Path) -> None:
    section = evaluation_section(evaluated, "try")
    assert isinstance(section, Markup)
    visitor = visit(browser, write_report(summary, records, str(tmp_path / "report"), section)["index.html"])
    assert_sound(visitor)
    headings = visitor.page.get_by_role("heading", level=2).all_inner_texts()
    assert headings.index("Benchmarks") < headings.index("Interval by interval")
    assert "42.00 ±\N{NO-BREAK SPACE}2.0" in visitor.page.locator("#benchmark-table").inner_text()
    assert visitor.page.locator("img:visible").count() == 2
    visitor.shoot("report", height=2400)


def test_a_comparison(browser: Browser, make_comparison: Any, tmp_path: Path) -> None:
    def ratios(last: float) -> dict[str, list[float]]:
        return {"math": [4.0, 3.0, last], "web": [2.0, 1.7, 1.5]}

    runs = {"ddk": {0: ratios(2.0), 1: ratios(2.2)}, "kd": {0: ratios(3.0), 1: ratios(3.4)}}
    visitor = visit(browser, write_comparison(str(tmp_path), make_comparison(runs))["index.html"])
    assert_sound(visitor)
    rows = visitor.rows()
    assert [row[0].split()[0] for row in rows[1:3]] == ["ddk", "kd"]
    assert visitor.page.locator("img:visible").count() >= 3
    visitor.shoot("comparison", height=2400)
