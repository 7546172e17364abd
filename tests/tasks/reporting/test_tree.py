"""What a report says above the leaves, against sums done here by hand."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest
from rich.console import Console

from ddk.values import DomainGap, Mixture
from storage.files import uri
from tasks.reporting.model_card import render_model_card
from tasks.reporting.page import render_page
from tasks.reporting.records import IntervalRecord, gap_table
from tasks.reporting.terminal import mixture_path, terminal_table
from tasks.reporting.tree import at_level, has_paths, overview, rollup_rows, tree_table, weakest
from tasks.reporting.write_report import write_report

LEAVES = ("math/algebra/linear", "math/algebra/rings", "math/geometry", "web")
STUDENT = ((64.0, 4.0, 8.0, 6.0), (16.0, 4.0, 8.0, 5.0))
"""Before and after; the teacher's is 2 everywhere."""
PROBABILITIES = (0.4, 0.1, 0.2, 0.3)
POSITIONS = (100, 300, 50, 1000)
DRAWN = (8, 2, 4, 6)


def record(t: int, leaves: tuple[str, ...], student: tuple[float, ...], **changes: Any) -> IntervalRecord:
    given: dict[str, Any] = {
        "t": t,
        "step": 10 * t,
        "tokens_seen": 5120 * t,
        "gaps": tuple(
            DomainGap(domain=d, student_ppl=s, teacher_ppl=2.0) for d, s in zip(leaves, student, strict=True)
        ),
        "mixture": Mixture(probabilities=dict(zip(leaves, PROBABILITIES, strict=True))),
        "blocks_drawn": dict(zip(leaves, DRAWN, strict=True)) if t else {},
        "positions": dict(zip(leaves, POSITIONS, strict=True)),
    }
    return IntervalRecord(**(given | changes))


@pytest.fixture
def tree() -> list[IntervalRecord]:
    return [record(t, LEAVES, student) for t, student in enumerate(STUDENT)]


@pytest.fixture
def many() -> list[IntervalRecord]:
    """Twenty leaves of five concepts of two domains; c4/4 is the weakest now, and c0/0 was."""
    leaves = [f"{'math' if concept < 3 else 'code'}/c{concept}/{n}" for concept in range(5) for n in range(4)]
    return [
        IntervalRecord(
            t=t,
            step=t,
            tokens_seen=t,
            gaps=tuple(
                DomainGap(domain=leaf, student_ppl=4.0 + (n if t else 20 - n), teacher_ppl=2.0)
                for n, leaf in enumerate(leaves)
            ),
            mixture=Mixture(probabilities=dict.fromkeys(leaves, 1 / 20)),
            blocks_drawn={},
            positions=dict.fromkeys(leaves, 7),
        )
        for t in range(2)
    ]


def test_the_domains_above_the_leaves(tree: list[IntervalRecord]) -> None:
    rows = {row["domain"]: row for row in tree_table(tree)}
    # In bits: (100·6 + 300·2) / 400 before, (100·4 + 300·2) / 400 after.
    algebra = rows["math/algebra"]
    assert algebra["student_ppl_before"] == pytest.approx(2**3.0, rel=1e-14)
    assert algebra["student_ppl_after"] == pytest.approx(2**2.5, rel=1e-14)
    assert algebra["ratio_after"] == pytest.approx(2**1.5, rel=1e-14)
    assert (algebra["blocks_drawn"], algebra["token_share"]) == (10, 0.5)
    assert algebra["final_probability"] == pytest.approx(0.5, rel=1e-14)
    # (100·6 + 300·2 + 50·3) / 450: over the leaves, not over the rows beneath it.
    assert rows["math"]["student_ppl_before"] == pytest.approx(2 ** (1350 / 450), rel=1e-14)
    assert rows["math"]["final_probability"] == pytest.approx(0.7, rel=1e-14)
    assert rows["math"]["token_share"] == 0.7
    for leaf in gap_table(tree):
        assert rows[leaf["domain"]] == leaf
    assert len(rows) == len(LEAVES) + 2


def test_the_weakest_leaf_comes_first_at_every_level(tree: list[IntervalRecord]) -> None:
    assert [row["domain"] for row in tree_table(tree)] == [
        "math",
        "math/algebra",
        "math/algebra/linear",  # 64 / 2
        "math/algebra/rings",
        "math/geometry",
        "web",
    ]
    # Geometry is the weakest leaf now, though algebra as a whole is weaker than it was.
    worse = [record(0, LEAVES, (10.0, 4.0, 80.0, 90.0))]
    assert [row["domain"] for row in tree_table(worse)] == [
        "web",
        "math",
        "math/geometry",
        "math/algebra",
        "math/algebra/linear",
        "math/algebra/rings",
    ]


def test_without_paths_nothing_is_rolled_up(records: list[IntervalRecord]) -> None:
    assert tree_table(records) == gap_table(records)
    assert rollup_rows(records) == []
    assert overview(records) == records
    assert weakest(records) == ()


def test_records_that_do_not_say_how_much_they_measured_are_not_rolled_up(tree: list[IntervalRecord]) -> None:
    silent = [tree[0], record(1, LEAVES, STUDENT[1], positions={})]
    assert not has_paths(silent)
    assert tree_table(silent) == gap_table(silent)
    assert rollup_rows(silent) == []


def test_a_rolled_up_record_is_a_record(tree: list[IntervalRecord]) -> None:
    whole = at_level(tree, 1)[1]
    assert whole.mixture.probabilities == pytest.approx({"math": 0.7, "web": 0.3}, abs=1e-15)
    assert whole.blocks_drawn == {"math": 14, "web": 6}
    assert whole.positions == {"math": 450, "web": 1000}
    assert whole.gap("math").student_ppl == pytest.approx(2 ** ((400 + 600 + 150) / 450), rel=1e-14)
    assert whole.gap("web") == tree[1].gap("web")
    assert at_level(tree, 3) == tree


def test_what_could_not_be_measured_stays_so() -> None:
    lost = [record(0, LEAVES, (math.inf, 4.0, math.nan, 6.0))]
    rows = {row["domain"]: row for row in tree_table(lost)}
    assert rows["math/algebra"]["student_ppl_after"] == math.inf
    assert math.isnan(rows["math"]["student_ppl_after"])


def test_many_leaves_are_shown_by_the_finest_level_that_finds_room(many: list[IntervalRecord]) -> None:
    assert [gap.domain for gap in overview(many)[1].gaps] == ["math/c0", "math/c1", "math/c2", "code/c3", "code/c4"]
    assert weakest(many) == tuple(gap.domain for gap in reversed(many[1].gaps))[:12]
    assert len(overview(at_level(many, 2))[0].gaps) == 5
    assert weakest(at_level(many, 2)) == ()


def shown(table: Any) -> list[list[str]]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    return [[cell.rstrip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_terminal_tables(tree: list[IntervalRecord], many: list[IntervalRecord]) -> None:
    rows = shown(terminal_table(tree))
    assert [row[0][1:] for row in rows] == ["math", "  algebra", "    linear", "    rings", "  geometry", "web"]
    assert [cell.strip() for cell in rows[1][1:]] == ["2.00", "8.00", "5.66", "4.000", "2.828", "50.0\xa0%"]
    assert len(shown(mixture_path(tree))[0]) == 3 + 4
    assert len(shown(mixture_path(many))[0]) == 3 + 5
    assert shown(mixture_path(many))[0][3].strip() == "20.0"


def test_the_page(make_summary: Any, tree: list[IntervalRecord], many: list[IntervalRecord]) -> None:
    html = render_page(make_summary(), tree)
    assert "4 domains." in html
    assert html.count('class="inner"') == 2
    assert 'tr class="worst"' in html
    assert "rolled up from its leaves below it" in html
    assert html.count("<details") == 4 + 2 + 1
    assert html.count("<figure>") == 2
    assert "leaves are rolled up to" not in html
    large = render_page(make_summary(), many)
    assert large.count("<figure>") == 3
    assert "Gap of the 12 weakest against tokens seen" in large
    assert "The 20 leaves are rolled up to 5 domains." in large
    assert "Largest gap now</dt><dd>11.500 <small>code/c4/3</small>" in large


def test_the_page_of_plain_domains_says_nothing_of_leaves(make_summary: Any, records: list[IntervalRecord]) -> None:
    html = render_page(make_summary(), records)
    assert "leaves" not in html
    assert 'class="inner"' not in html


def test_the_card(make_summary: Any, tree: list[IntervalRecord]) -> None:
    card = render_model_card(make_summary(), tree)
    assert "A domain in italics is rolled up from its leaves, which follow it." in card
    assert "| *math/algebra* | 10 | 2,560 | 50.0\xa0% |" in card
    assert "| math/algebra/linear | 8 | 2,048 | 40.0\xa0% |" in card
    assert "| *math/algebra* | 2.00 | 8.00 | 5.66 | 4.000 | 2.828 |" in card


def test_files(make_summary: Any, tree: list[IntervalRecord], many: list[IntervalRecord], tmp_path: Any) -> None:
    urls = write_report(make_summary(), tree, str(tmp_path / "tree"))
    assert "ratio-weakest.png" not in urls
    rows = list(csv.DictReader(io.StringIO((uri.read_bytes(urls["rollup.csv"]) or b"").decode())))
    assert [(row["t"], row["domain"], row["leaves"]) for row in rows] == [
        ("0", "math", "3"),
        ("1", "math", "3"),
        ("0", "math/algebra", "2"),
        ("1", "math/algebra", "2"),
    ]
    assert float(rows[3]["student_ppl"]) == pytest.approx(2**2.5, rel=1e-14)
    assert float(rows[3]["ratio"]) == pytest.approx(2**1.5, rel=1e-14)
    assert (float(rows[3]["probability"]), rows[3]["blocks_drawn"]) == (pytest.approx(0.5), "10")
    leaves = list(csv.DictReader(io.StringIO((uri.read_bytes(urls["gap.csv"]) or b"").decode())))
    assert {row["domain"] for row in leaves} == set(LEAVES), "no domain twice: who adds these up counts each block once"
    report = uri.read_json(urls["report.json"])
    assert [row["domain"] for row in report["rollup"]] == [row["domain"] for row in rows]
    assert len(report["gap"]) == 4
    large = write_report(make_summary(), many, str(tmp_path / "many"))
    assert (uri.read_bytes(large["ratio-weakest.png"]) or b"").startswith(b"\x89PNG")
