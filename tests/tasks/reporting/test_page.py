"""The page is parsed as a browser would: what stands in its tables, and that it needs nothing but itself."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ddk.overtraining import Alarm
from ddk.values import DomainGap, Mixture
from tasks.reporting.model_card import render_model_card
from tasks.reporting.page import render_page
from tasks.reporting.records import (
    IntervalRecord,
    flat_settings,
    gap_table,
    plain,
    regressions,
    render_csv,
    render_rows,
)
from tasks.reporting.run_artifacts import report_markdown
from tasks.reporting.terminal import mixture_path, terminal_table
from tasks.showing.formats import ppl, ratio


class Page(HTMLParser):
    """Collects tables (rows of cell texts), attributes of every tag, and checks that tags nest."""

    VOID = frozenset({"meta", "img", "br", "source", "link", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.tables, self.open, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "th" in self.open or "td" in self.open:
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(summary, records):
    return Page(render_page(summary, records))


def test_before_and_after_by_domain(page):
    table = page.tables[0]
    assert table[0][0] == "Domain"
    assert table[1:] == [
        ["code", "8.00", "32.00", "12.00", "4.000", "1.500", "33.3\xa0%", "33.3\xa0%"],
        ["math largest gap now", "8.00", "24.00", "16.00", "3.000", "2.000", "22.2\xa0%", "44.4\xa0%"],
        ["web", "8.00", "12.00", "8.00", "1.500", "1.000", "44.4\xa0%", "22.2\xa0%"],
    ]


def test_only_the_worst_domain_is_marked(page):
    assert [attrs.get("class") for attrs in page.all("tr")].count("worst") == 1


def test_a_table_of_intervals_for_every_domain(page):
    assert len(page.tables) == 1 + 3 + 1
    code = page.tables[1]
    assert code[1:] == [
        ["0", "0", "0", "32.00", "8.00", "4.000", "47.1\xa0%", "0"],
        ["1", "10", "4,608", "16.00", "8.00", "2.000", "34.8\xa0%", "6"],
        ["2", "20", "9,216", "12.00", "8.00", "1.500", "33.3\xa0%", "12"],
    ]


def test_settings_are_folded_in(page):
    assert ["train.learning_rate", "3e-05"] in page.tables[-1]
    assert ["corpus.domains", '["math", "code", "web"]'] in page.tables[-1]
    assert ["corpus.url", "null"] in page.tables[-1]


def test_the_page_needs_nothing_but_itself(summary, records):
    html = render_page(summary, records)
    page = Page(html)
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    loaded = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "srcset", "href")]
    assert len(loaded) == 8  # two plots, wide and narrow, light and dark
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert "url(" not in html
    assert "@import" not in html
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on")]


def test_it_can_be_read_without_eyes_and_in_the_dark(page, summary, records):
    assert page.all("html") == [{"lang": "en"}]
    assert all("perplexity" in image["alt"] or "probability" in image["alt"] for image in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["aria-labelledby"] for _, attrs in page.tags if "aria-labelledby" in attrs} <= set(ids)
    style = render_page(summary, records)
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert "tabular-nums" in style


def test_hostile_names_are_escaped(make_summary, make_records):
    domain = "<script>alert(1)</script>"
    nasty = '"><img src=http://evil.example/x onerror=alert(1)>'
    records = make_records({domain: [2.0, 1.5], "web": [1.5, 1.2]})
    html = render_page(
        make_summary(name=nasty, teacher=nasty, stopped_early=nasty, settings={nasty: {domain: nasty}}), records
    )
    page = Page(html)
    assert "<script" not in html
    assert "script" not in {name for name, _ in page.tags}
    assert not [attrs for attrs in page.all("img") if not attrs["src"].startswith("data:")]
    assert page.tables[0][1][0].startswith(domain)
    assert nasty in page.text


def test_a_run_that_has_only_been_measured(make_summary, make_records):
    html = render_page(make_summary(wall_seconds=None), make_records({"math": [2.0], "web": [1.5]}))
    page = Page(html)
    assert "No interval is finished yet" in page.text
    assert "Wall time" not in page.text
    assert page.tables[0][1][1:] == ["8.00", "16.00", "16.00", "2.000", "2.000", "–", "57.1\xa0%"]


def test_why_a_run_stopped_early_is_said(make_summary, records):
    assert "every ratio is below 1.05" in render_page(make_summary(stopped_early="every ratio is below 1.05"), records)


def test_equal_runs_give_equal_pages(summary, records):
    assert render_page(summary, records) == render_page(summary, records)


def test_rows_are_flat_and_complete(records):
    rows = render_rows(records)
    assert len(rows) == 9
    assert rows[4] == {
        "t": 1,
        "step": 10,
        "tokens_seen": 4608,
        "domain": "code",
        "student_ppl": 16.0,
        "teacher_ppl": 8.0,
        "ratio": 2.0,
        "probability": 2.0 / 5.75,
        "blocks_drawn": 6,
        "epochs": None,
        "kl": None,
    }


def test_csv_reads_back_exactly(make_records):
    records = make_records({'a "quoted", name': [1 / 3, 0.1], "web": [1.5, 1.25]})
    rows = render_rows([replace(one, kl={"web": 1 / 7}, train_blocks={"web": 3}) for one in records])
    read = list(csv.DictReader(io.StringIO(render_csv(rows))))
    kinds = {key: type(value) for key, value in rows[1].items()}
    assert [{key: kinds[key](value) if value else None for key, value in row.items()} for row in read] == rows
    assert render_csv([]).strip() == ""


def test_gap_table_shares_and_order(records):
    rows = gap_table(records)
    assert [row["domain"] for row in rows] == ["code", "math", "web"]
    assert [row["token_share"] for row in rows] == [12 / 36, 8 / 36, 16 / 36]
    assert math.fsum(row["token_share"] for row in rows) == pytest.approx(1.0)


def test_what_was_not_measured_comes_first_and_has_no_number(summary, make_records):
    records = make_records({"web": [3.0, 2.0], "lost": [math.nan, 1.0], "far": [math.inf, 1.5]})
    assert [row["domain"] for row in gap_table(records)] == ["lost", "far", "web"]
    assert ppl(math.nan) == "–"
    assert ratio(math.inf) == "∞"
    text = json.dumps(plain(render_rows(records)), allow_nan=False)
    assert json.loads(text)[1]["ratio"] is None


def shown(table):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_terminal_table_has_the_worst_first(records):
    lines = [line for line in shown(terminal_table(records)).splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == ["code", "math", "web"]
    assert [cell.strip() for cell in lines[0].split("│")[2:-1]] == [
        "8.00",
        "32.00",
        "12.00",
        "4.000",
        "1.500",
        "33.3\xa0%",
    ]


def test_a_domain_that_got_worse_is_named_everywhere(summary, make_records):
    records = make_records({"math": [4.0, 3.0], "web": [2.0, 2.1], "qa": [1.5, 1.51]})
    said = "Worse than before training: web (+5.0%)."
    assert regressions(gap_table(records)) == said
    assert said in shown(terminal_table(records))
    html = render_page(summary, records)
    assert said in html
    assert html.count("worse than before</span>") == 1
    assert said.replace("(", "").replace(")", "") in render_model_card(summary, records).replace("(", "").replace(
        ")", ""
    )
    assert said in report_markdown(summary, records, {})
    assert regressions(gap_table(records[:1])) == ""


SENTENCE = "its 3 train blocks were read 5.3 times; the limit is 4"


@pytest.fixture
def seen_too_often(records):
    """'math' has three train blocks, and the last measurement raises an alarm for it."""
    known = [
        replace(one, kl=dict.fromkeys(("math", "code", "web"), 0.25), train_blocks={"math": 3, "code": 60, "web": 80})
        for one in records
    ]
    alarm = Alarm(domain="math", kind="epochs", step=20, sentence=SENTENCE)
    return [*known[:-1], replace(known[-1], blocks_drawn={**known[-1].blocks_drawn, "math": 16}, alarms=(alarm,))]


def test_a_domain_seen_too_often_is_named_everywhere(summary, seen_too_often):
    said = "Seen too often: math (since step 20)."
    terminal = shown(terminal_table(seen_too_often))
    assert said in terminal
    assert f"step 20, math: {SENTENCE}" in terminal
    (row,) = (line for line in terminal.splitlines() if line.startswith("│ math"))
    assert row.split("│")[-2].strip() == "5.3"
    html = render_page(summary, seen_too_often)
    page = Page(html)
    assert said in page.text
    assert f"Step 20, math: {SENTENCE}." in page.text
    assert html.count("seen too often</span>") == 1
    assert page.tables[0][0][-1] == "Epochs"
    assert {row[0].split()[0]: row[-1] for row in page.tables[0][1:]} == {"code": "0.2", "math": "5.3", "web": "0.2"}
    assert page.tables[2][-1][-2:] == ["5.33", "0.2500"]
    markdown = report_markdown(summary, seen_too_often, {})
    assert f"**{said}**" in markdown
    assert f"- step 20, math: {SENTENCE}" in markdown


def test_where_epochs_are_not_known_there_is_no_column(summary, records):
    assert "Epochs" not in render_page(summary, records)
    assert "epochs" not in shown(terminal_table(records))


def test_mixture_path_has_a_row_per_version(records):
    lines = [line for line in shown(mixture_path(records)).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines] == [
        ["0", "0", "0", "35.3", "47.1", "17.6"],
        ["1", "10", "4,608", "43.5", "34.8", "21.7"],
        ["2", "20", "9,216", "44.4", "33.3", "22.2"],
    ]


def test_a_domain_in_brackets_is_no_markup(make_records):
    records = make_records({"[red]x[/red]": [2.0], "[/]": [1.5]})
    assert "[red]x[/red]" in shown(terminal_table(records))
    assert "[/]" in shown(mixture_path(records))


def test_flat_settings_keep_their_order_and_empty_sections():
    assert list(flat_settings({"b": {"x": 1, "y": {}}, "a": True})) == [("b.x", "1"), ("b.y", "{}"), ("a", "true")]


def record_at(t, tokens, domains=("a", "b")):
    gaps = tuple(DomainGap(domain=domain, student_ppl=2.0, teacher_ppl=1.0) for domain in domains)
    mixture = Mixture(probabilities={domain: 1 / len(domains) for domain in domains})
    return IntervalRecord(t=t, step=t, tokens_seen=tokens, gaps=gaps, mixture=mixture, blocks_drawn={})


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "the mixture history is empty"),
        ([record_at(1, 0), record_at(1, 5)], "out of order: version 1 at 0 tokens is followed by version 1"),
        ([record_at(0, 9), record_at(1, 5)], "out of order"),
        ([record_at(0, 0), record_at(1, 5, ("a", "c"))], "keeps its domains from start to end"),
    ],
)
def test_a_history_that_does_not_hold_together_is_refused(summary, history, message):
    for render in (lambda: render_page(summary, history), lambda: gap_table(history), lambda: render_rows(history)):
        with pytest.raises(ValueError, match=message):
            render()


def test_a_record_measures_what_it_mixes():
    with pytest.raises(ValueError, match="both must name each domain once"):
        IntervalRecord(
            t=0,
            step=0,
            tokens_seen=0,
            gaps=(DomainGap(domain="a", student_ppl=2.0, teacher_ppl=1.0),),
            mixture=Mixture(probabilities={"b": 1.0}),
            blocks_drawn={},
        )
