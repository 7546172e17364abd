from __future__ import annotations

import csv
import io
import math
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from tasks.comparing.page import render_comparison, render_markdown
from tasks.reporting.model_card import render_model_card
from tasks.reporting.page import render_page
from tasks.reporting.records import render_csv, render_rows
from tasks.reporting.run_artifacts import measurement_rows, report_markdown
from tasks.showing.formats import change, csv_cell, duration, escape, link, markdown_table, percent, ppl
from tasks.training.tracking.mlflow_run import metric_name


@pytest.mark.parametrize(
    ("seconds", "said"), [(9.5, "9.5 s"), (59.97, "1 min 00 s"), (65, "1 min 05 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_large_perplexities_stay_short():
    assert [ppl(value) for value in (1.0, 12345.678, 1.5e9)] == ["1.00", "12,346", "1.50e+09"]


def test_a_change_has_its_sign():
    assert [change(value) for value in (0.01234, -0.5, 0.0)] == ["+0.0123", "−0.5000", "+0.0000"]
    assert change(-1.0, 1) == "−1.0"
    assert [change(value) for value in (None, math.nan, math.inf)] == ["–"] * 3


def test_percent():
    assert [percent(0.99987), percent(0.99987, 2), percent(None)] == ["100.0\xa0%", "99.99\xa0%", "–"]


def test_a_table_aligns_numbers_to_the_right():
    assert markdown_table(("domain", "ppl"), [("web", "8.00")]) == "| domain | ppl |\n| :--- | ---: |\n| web | 8.00 |"


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "a | b | c",
    "`code` ``x`",
    "![i](https://x.invalid/i.png)",
    "[x](javascript:alert(1))",
    "</td></tr></table><b>",
    "\"onmouseover='x'",
    "&lt;b&gt; &#60;",
    "*a* _b_ ~c~ # d",
    "=HYPERLINK(1)",
    "@SUM(1)",
    "\\| \\<b>",
    "$a$ $",
    "{{ 7 * 7 }} {% raw %}",
]
"""As a record's field may name its path."""


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.targets = set(), [""], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.targets += [value for name, value in attrs if name in ("href", "src") or name.startswith("on")]
        self.texts.append("")

    def handle_endtag(self, tag):
        self.texts.append("")

    def handle_data(self, data):
        self.texts[-1] += data


def shown(markdown):
    return Tags(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


@pytest.mark.parametrize("name", [*HOSTILE, "a\nb", "x\u202ey", "s3://b/<img>/`x", 'https://h/<b>|`a>"b'])
def test_a_name_in_markdown_is_text(name):
    for made in (escape(name), link(name), link("s3://b/k", name), link("https://h/k", name)):
        page = shown(f"| a | b |\n|---|---|\n| {made} | end |")
        assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td", "code", "a"}
        assert all(target.startswith("https://h/") for target in page.targets)
        assert {" ".join(name.split()).replace("\u202e", "\ufffd"), "end"} <= set(page.texts)
    assert "\n" not in escape(name)


def test_names_are_text_wherever_they_are_shown(make_records, make_summary, make_comparison):
    records = make_records({name: [3.0 + place, 2.0] for place, name in enumerate(HOSTILE)})
    name = HOSTILE[0]
    run = make_summary(name=name, teacher=name, student=name, stopped_early=name, settings={"train": {"seed": name}})
    places = {f"targets of {name}": f"s3://b/{name}", f"blocks of {name}": f"https://h/{name}"}
    tags = {*("h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "img", "a", "code", "ul", "li", "em", "hr")}
    for page in (report_markdown(run, records, places), render_model_card(run, records).split("---\n", 2)[2]):
        found = shown(page)
        assert found.tags <= tags
        assert not [target for target in found.targets if not target.startswith(("data:image/png", "https://h/"))]
        assert set(HOSTILE) <= set(found.texts)
    assert all(Tags(row["domain"]).tags == set() for row in measurement_rows(records))
    compared = make_comparison({"ddk": {0: {name: [3.0, 2.0] for name in HOSTILE}}, "kd": {0: None}}, name=name)
    assert shown(render_markdown(compared)).tags <= tags
    plots = dict.fromkeys(("frontier.png", "ratio.png", "domains.png", "mixture.png"), b"")
    for html in (render_page(run, records), render_comparison(compared, plots, plots)):
        page = Tags(html)
        assert "script" not in page.tags
        assert not [target for target in page.targets if not target.startswith(("data:image/png", "../../", "#"))]
        assert set(HOSTILE) <= {text.strip() for text in page.texts}


def test_no_cell_of_a_csv_is_a_formula(make_records):
    assert [csv_cell(value) for value in ("=1", "+1", "-1", "@x", "\tx", "\rx")] == [
        *("'=1", "'+1", "'-1", "'@x", "'\tx", "'\rx")
    ]
    assert [csv_cell(value) for value in (-1.5, None, "a=b", "C++", "")] == [-1.5, None, "a=b", "C++", ""]
    text = render_csv(render_rows(make_records({"=cmd|' /C calc'!A0": [2.0, 1.5], "web": [1.5, 1.2]})))
    assert {row["domain"] for row in csv.DictReader(io.StringIO(text))} == {"'=cmd|' /C calc'!A0", "web"}


def test_a_leaf_may_have_any_name_in_mlflow():
    from mlflow.utils.validation import _validate_metric_name

    names = [metric_name(f"gap/{name}/ratio") for name in (*HOSTILE, "math/C++", "math/C--", "a/../b", "a/./b", "数学")]
    for name in names:
        _validate_metric_name(name)
    assert len(set(names)) == len(names)
    assert metric_name("mixture/math/linear algebra") == "mixture/math/linear algebra"
