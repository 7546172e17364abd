from __future__ import annotations

import csv
import io
import json
import math

import pytest

from storage.files import uri
from tasks.reporting.page import render_page
from tasks.reporting.plots import mixture_plot, ratio_plot
from tasks.reporting.write_report import write_report

NAMES = ["gap.csv", "index.html", "mixture.png", "ratio.png", "report.json"]


def check_files(summary, records, folder, urls):
    assert sorted(urls) == NAMES == uri.list_names(folder)
    assert all(url == uri.join(folder, name) for name, url in urls.items())
    assert uri.read_bytes(urls["index.html"]) == render_page(summary, records).encode()
    assert uri.read_bytes(urls["ratio.png"]) == ratio_plot(records)
    assert uri.read_bytes(urls["mixture.png"]) == mixture_plot(records)
    assert len(list(csv.DictReader(io.StringIO(uri.read_bytes(urls["gap.csv"]).decode())))) == 9
    report = uri.read_json(urls["report.json"])
    assert report["format"] == 1
    assert report["summary"]["name"] == "try_1"
    assert report["summary"]["domains"] == ["math", "code", "web"]
    assert report["summary"]["settings"]["loss"]["gamma"] == 0.2
    assert len(report["rows"]) == 9
    assert report["gap"][0]["ratio_after"] == 1.5


def test_files_below_a_local_folder(summary, records, tmp_path):
    folder = str(tmp_path / "runs" / "try 1" / "report")
    check_files(summary, records, folder, write_report(summary, records, folder))


def test_files_below_an_s3_prefix(summary, records, s3_server):
    folder = f"{s3_server}/runs/try_1/report"
    check_files(summary, records, folder, write_report(summary, records, folder))


def test_a_report_is_replaced_by_the_next(summary, records, tmp_path):
    write_report(summary, records[:1], str(tmp_path))
    check_files(summary, records, str(tmp_path), write_report(summary, records, str(tmp_path)))


def test_report_json_is_strict_json(summary, make_records, tmp_path):
    urls = write_report(summary, make_records({"a": [math.inf, math.nan]}), str(tmp_path))
    report = json.loads(uri.read_bytes(urls["report.json"]), parse_constant=pytest.fail)
    assert report["rows"][0]["ratio"] is None


def test_nothing_is_written_of_an_empty_history(summary, tmp_path):
    with pytest.raises(ValueError, match="the mixture history is empty"):
        write_report(summary, [], str(tmp_path))
    assert uri.list_names(str(tmp_path)) == []
