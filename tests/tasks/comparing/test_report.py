"""The page is parsed as a browser would, the figures by their data, the files as a reader opens them."""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from ddk.errors import UserError
from storage.checking.verify_runs import report_findings
from storage.errors import FormatVersionError, StoreDamagedError
from storage.files import uri
from storage.runs.reports import ComparisonFolder
from tasks.comparing.data import ComparedVariant
from tasks.comparing.page import flops, in_words, render_comparison, render_markdown, signed
from tasks.comparing.paper import paper, tables_beside
from tasks.comparing.plots import (
    Curve,
    curve,
    domains_figure,
    frontier_figure,
    mixture_figure,
    panels_figure,
    plots,
    ratio_figure,
    ratio_panels,
)
from tasks.comparing.report import (
    comparison_url,
    earlier_failures,
    read_comparison,
    report_comparison,
    write_comparison,
)
from tasks.reporting.plots import LIGHT
from tasks.showing.artifacts import artifact_key

FILES = [
    "comparison.json",
    "domains.png",
    "frontier.png",
    "index.html",
    "mixture.png",
    "ratio.png",
    "runs.csv",
    "summary.csv",
]


class Page(HTMLParser):
    """Rows of cell texts of every table, and the attributes of every tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.cell, self.text = [], [], False, ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.cell = self.cell or tag in ("td", "th")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data

    def row(self, label, columns):
        """The first row with this label and so many cells."""
        return next(row for row in self.rows if row and row[0].startswith(label) and len(row) == columns)


@pytest.fixture
def three(make_comparison):
    return make_comparison(
        {
            "ddk": {
                0: {"math": [4.0, 3.0, 2.0], "web": [2.0, 1.7, 1.5]},
                1: {"math": [4.0, 3.2, 2.2], "web": [2.0, 1.8, 1.7]},
            },
            "kd": {
                0: {"math": [4.0, 3.5, 3.0], "web": [2.0, 1.6, 1.4]},
                1: {"math": [4.0, 3.7, 3.3], "web": [2.0, 1.6, 1.5]},
            },
            "cpt": {0: {"math": [4.0, 3.0, 2.5], "web": [2.0, 1.5, 1.1]}, 1: None},
        }
    )


def page_of(comparison):
    pictures = dict.fromkeys(plots(comparison), b"\x89PNG")
    return render_comparison(comparison, pictures, pictures)


def test_the_result_stands_in_the_first_table(three):
    page = Page(page_of(three))
    ddk, kd, cpt = (page.row(name, 8) for name in ("ddk", "kd", "cpt"))
    # 8·√(2·1.5) = 13.86 and 8·√(2.2·1.7) = 15.47.
    assert ddk[:5] == ["ddk baseline", "2", "14.66 ± 1.14", "1.850 ± 0.141", "2.100 ± 0.141 math"]
    assert kd[3:5] == ["2.300 ± 0.141", "3.150 ± 0.212 math"]
    assert kd[5] == "+0.450 [+0.450, +0.450] worse"
    assert kd[6] == "+1.050 [+0.415, +1.685] worse"
    assert cpt[5] == "+0.050 one seed, no interval"


def test_failures_and_what_they_mean_are_said(three):
    page = Page(page_of(three))
    assert "1 of 6 runs failed and are excluded from all means" in page.text
    assert ["trial-cpt-s1", "cpt", "1", "failed: cpt has diverged", "–", "–"] in page.rows
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert len(links) == 5
    assert links[0] == "../../runs/trial-ddk-s0/report/index.html"


def test_in_words_what_the_intervals_say(three):
    assert in_words(three) == [
        "By the mean ratio, against ddk: worse: kd; one seed, no interval: cpt.",
        "By the largest ratio, against ddk: worse: kd; one seed, no interval: cpt.",
        "By the perplexity (geometric mean), against ddk: worse: kd; one seed, no interval: cpt.",
    ]


def test_one_seed_has_no_interval_and_the_page_says_so(make_comparison):
    comparison = make_comparison({name: {7: {"math": [3.0, 2.0]}} for name in ("ddk", "kd")})
    page = Page(page_of(comparison))
    assert "With one seed there is no spread and no interval" in page.text
    assert page.row("kd", 8)[3:6] == ["2.000", "2.000 math", "0.000 one seed, no interval"]


def test_domains_are_shaped_as_the_papers_table(three):
    page = Page(page_of(three))
    assert page.row("teacher", 4) == ["teacher", "8.00", "8.00", "8.00"]
    assert page.row("student before", 5)[1:] == ["4.000", "2.000", "3.000", "4.000"]
    assert page.row("kd", 5)[1:] == ["3.150 ± 0.212", "1.450 ± 0.071", "2.300 ± 0.141", "3.150 ± 0.212"]


def test_the_papers_numbers_stand_apart_and_are_theirs(three):
    html = page_of(three)
    page = Page(html)
    joint = page.row("kd", 10)
    assert joint[1:4] == ["2.300 ± 0.141", "3.150 ± 0.212", "52.87"]
    theirs = [attrs for tag, attrs in page.tags if tag == "td" and "theirs" in attrs.get("class", "")]
    assert len(theirs) == 8 * 7 + 3, "the methods and the cost of training; no sampling, of which there is one row"
    assert "the paper’s own numbers" in page.text
    assert "arXiv 2407.16154" in page.text
    assert page.row("cpt_doremi", 10)[1:3] == ["–", "–"]


def test_the_papers_numbers_are_as_it_prints_them():
    tables = {table.title: table for table in paper().tables}
    methods = tables["Methods"].rows
    assert [row[0] for row in methods.values()] == [70.80, 49.39, 50.48, 50.95, 52.87, 52.59, 52.58, 55.41]
    assert methods["ddk"] == (55.41, 29.32, 63.58, 53.64, 37.6, 69.4, 60.36)
    assert tables["Interval K"].rows[1000] == tables["Sampling"].rows["ddk"] == (57.46,)
    assert tables["Training cost"].rows == {"cpt": (1.456e8,), "kd": (5.364e8,), "ddk": (5.401e8,)}
    assert all(len(row) == len(table.columns) for table in paper().tables for row in table.rows.values())


def test_a_sweep_stands_beside_its_ablation(make_comparison):
    ratios = {f"mixture.interval={k}": {0: {"math": [3.0, 2.0]}} for k in (100, 75, 1000)}
    variants = [
        ComparedVariant(name=name, method="ddk", settings={"mixture.interval": name.partition("=")[2]})
        for name in ratios
    ]
    ((table, rows),) = tables_beside(make_comparison(ratios, variants=variants))
    assert table.title == "Interval K"
    assert [row.label for row in rows] == ["50", "75", "100", "500", "1000", "1500", "2000"]
    assert [row.variant for row in rows if row.variant] == [f"mixture.interval={k}" for k in (75, 100, 1000)]
    assert [row.theirs for row in rows[:3]] == [(54.54,), None, (55.68,)]


def test_a_variant_that_differs_in_more_is_no_row_of_a_sweep(make_comparison):
    ratios = {name: {0: {"math": [3.0, 2.0]}} for name in ("a", "b", "c")}
    settings = [{"loss.gamma": "0.1"}, {"loss.gamma": "0.2"}, {"loss.gamma": "0.3", "loss.tail": "residual"}]
    variants = [
        ComparedVariant(name=name, method="ddk", settings=own) for name, own in zip(ratios, settings, strict=True)
    ]
    ((_, rows),) = tables_beside(make_comparison(ratios, variants=variants))
    assert [row.variant for row in rows if row.variant] == ["a", "b"]


def test_the_page_needs_nothing_but_itself(three):
    page = Page(page_of(three))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    loaded = [attrs["src"] for _, attrs in page.tags if "src" in attrs]
    assert len(loaded) == 8
    assert all(source.startswith("data:image/png;base64,") for source in loaded)
    assert "url(" not in page_of(three)


def test_hostile_names_are_escaped(make_comparison):
    nasty = '"><script>alert(1)</script>'
    comparison = make_comparison(
        {"ddk": {0: {nasty: [3.0, 2.0]}}, "kd": {0: None}},
        name=nasty,
        left_out={nasty: nasty},
        settings={nasty: nasty},
    )
    runs = [run.model_copy(update={"reason": nasty, "stopped_early": nasty}) for run in comparison.runs]
    html = page_of(comparison.model_copy(update={"runs": tuple(runs)}))
    assert "<script" not in html
    assert nasty in Page(html).text


def test_curves_are_means_over_seeds_with_their_range(three):
    one = ratio_panels(three)["math"]["ddk"]
    assert one.tokens == (0, 640, 1280)
    assert one.mean == pytest.approx((4.0, 3.1, 2.1))
    assert (one.low, one.high) == ((4.0, 3.0, 2.0), (4.0, 3.2, 2.2))
    mean = ratio_panels(three)["mean of the domains"]["kd"]
    assert mean.mean == pytest.approx((3.0, (2.55 + 2.65) / 2, (2.2 + 2.4) / 2))
    assert curve(three, "cpt", lambda record: None) is None


def test_panels_of_one_axis_reach_as_far_as_the_highest_of_them():
    """Also where the first one is flat."""
    flat, high = (Curve(tokens=(0, 10), mean=(p, p), low=(p, p), high=(p, p)) for p in (0.2, 0.7))
    figure = panels_figure({"a": {"math": flat}, "b": {"math": high}}, "probability", LIGHT, steps=True, shared=True)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0.0
        assert axes.get_ylim()[1] > 0.7


def test_figures_have_a_panel_for_each_domain_or_variant(three):
    def titles(figure):
        return [axes.get_title() for axes in figure.axes if axes.get_title()]

    assert titles(ratio_figure(three)) == ["mean of the domains", "largest of the domains", "math", "web"]
    assert titles(domains_figure(three)) == titles(mixture_figure(three)) == ["ddk", "kd", "cpt"]
    figure = ratio_figure(three)
    drawn = [line for line in figure.axes[2].get_lines() if line.get_gid() != "caught-up"]
    assert [list(line.get_ydata()) for line in drawn] == [
        pytest.approx([4.0, 3.1, 2.1]),
        pytest.approx([4.0, 3.6, 3.15]),
        pytest.approx([4.0, 3.0, 2.5]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ddk", "kd", "cpt"]


def test_the_frontier_rings_a_variant_under_which_a_domain_gets_worse(make_comparison):
    comparison = make_comparison(
        {
            "ddk": {seed: {"math": [4.0, 2.0 + seed / 10], "web": [2.0, 2.2]} for seed in range(3)},
            "kd": {seed: {"math": [4.0, 3.0], "web": [2.0, 1.5]} for seed in range(3)},
        }
    )
    figure = frontier_figure(comparison)
    (axes,) = figure.axes
    assert [line.get_gid() for line in axes.get_lines() if line.get_gid()] == ["regressed ddk"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ddk (worse than before: web)", "kd"]
    points = sorted(container[0].get_ydata()[0] for container in axes.containers)
    assert points == pytest.approx([2.2, 3.0])


def test_the_line_at_one_is_shown_where_the_curves_come_near_it(three):
    far, near = (ratio_figure(three).axes[place] for place in (2, 3))
    assert not [line for line in far.get_lines() if line.get_gid() == "caught-up"]
    assert [line for line in near.get_lines() if line.get_gid() == "caught-up"]
    assert near.get_ylim()[0] < 1.0 < far.get_ylim()[0]


def check_files(comparison, root):
    urls = write_comparison(root, comparison)
    folder = comparison_url(root, comparison.name)
    assert sorted(urls) == FILES == [name for name in uri.list_names(folder) if name != "files.json"]
    assert read_comparison(root, comparison.name) == comparison
    assert list(report_findings(ComparisonFolder(root, comparison.name), full=True)) == []
    uri.write_bytes(f"{folder}/runs.csv", (uri.read_bytes(f"{folder}/runs.csv") or b"").replace(b"kd", b"KD"))
    (finding,) = report_findings(ComparisonFolder(root, comparison.name), full=True)
    assert "runs.csv: its bytes are not those that were written" in str(finding)
    urls = write_comparison(root, comparison)
    assert uri.read_bytes(urls["ratio.png"]) == plots(comparison)["ratio.png"]
    rows = list(csv.DictReader(io.StringIO(uri.read_bytes(urls["summary.csv"]).decode())))
    kd = next(row for row in rows if (row["variant"], row["measure"], row["domain"]) == ("kd", "ratio", ""))
    assert float(kd["mean"]) == pytest.approx(2.3)
    assert kd["verdict"] == "worse"
    assert len(list(csv.DictReader(io.StringIO(uri.read_bytes(urls["runs.csv"]).decode())))) == 5 * 3 + 1


def test_files_below_a_local_root(three, tmp_path):
    check_files(three, str(tmp_path))


def test_files_on_s3(three, s3_server):
    check_files(three, f"{s3_server}/compared")


def test_a_comparison_of_which_nothing_has_finished_has_a_page(make_comparison, tmp_path):
    comparison = make_comparison({"ddk": {0: {"math": [2.0, 1.5]}}})
    comparison = comparison.model_copy(
        update={"runs": tuple(run.model_copy(update={"status": "unfinished"}) for run in comparison.runs)}
    )
    urls = write_comparison(str(tmp_path), comparison)
    assert sorted(urls) == ["comparison.json", "index.html", "runs.csv", "summary.csv"]
    assert "1 of 1 runs are not finished" in uri.read_bytes(urls["index.html"]).decode()


def test_what_is_no_comparison_is_refused(three, tmp_path):
    root = str(tmp_path)
    with pytest.raises(UserError, match="run `ddk compare` first"):
        read_comparison(root, "a")
    place = f"{root}/comparisons/a/comparison.json"
    uri.write_json(place, {"format_version": 9})
    with pytest.raises(FormatVersionError, match="has format version 9"):
        read_comparison(root, "a")
    urls = write_comparison(root, three)
    whole = uri.read_bytes(urls["comparison.json"])
    uri.write_bytes(urls["comparison.json"], whole.replace(b"0.", b"1.", 1))
    with pytest.raises(StoreDamagedError, match="its content is not what was written"):
        read_comparison(root, three.name)
    uri.write_bytes(place, whole)
    with pytest.raises(StoreDamagedError, match=r"is that of the data of comparison '.*exchanged or moved"):
        read_comparison(root, "a")


@pytest.mark.usefixtures("prefect_server")
def test_the_artifact_in_prefect(three, tmp_path):
    @flow
    def reporting() -> None:
        report_comparison(str(tmp_path), three)

    reporting()
    with get_client(sync_client=True) as client:
        key = artifact_key(tmp_path.name, "trial", "comparison")
        (found,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    assert "| 2.300 ± 0.141 | 3.150 ± 0.212 |" in found.data
    assert "](data:image/png;base64," in found.data


def test_markdown_has_a_row_for_each_variant(three):
    lines = render_markdown(three).splitlines()
    assert lines[2].startswith("| ddk | 2 | 14.66 ± 1.14 | 1.850 ± 0.141 | 2.100 ± 0.141 | – ")
    assert "| cpt | 2.500 | 1.100 |" in lines


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (12.0, "12 FLOP"),
        (1.234e15, "1.23 PFLOP"),
        (-4.5e9, "−4.5 GFLOP"),
    ],
)
def test_flops_are_readable(value, said):
    assert flops(value) == said


def test_signs_are_shown():
    assert [signed(value) for value in (0.1234, -0.1, 0.0, -0.0001)] == ["+0.123", "−0.100", "0.000", "0.000"]


def test_why_runs_had_failed_is_known_later(three, tmp_path):
    assert earlier_failures(str(tmp_path), "trial") == {}
    write_comparison(str(tmp_path), three)
    assert earlier_failures(str(tmp_path), "trial") == {"trial-cpt-s1": "cpt has diverged"}
