from __future__ import annotations

import asyncio
import csv
import gc
import io
import json
import math
import warnings

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from storage import uri
from tasks.report import artifact_key, publish_artifacts, write_report
from tasks.report_page import render_page
from tasks.report_plots import mixture_plot, ratio_plot

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


@pytest.mark.parametrize(
    ("name", "key"),
    [("quickstart", "ddk-quickstart-gap"), ("My run_2!", "ddk-my-run-2-gap"), ("书", "ddk-run-gap")],
)
def test_artifact_key(name, key):
    assert artifact_key(name, "gap") == key


def artifacts(key):
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


@pytest.mark.usefixtures("prefect_server")
def test_artifacts_in_prefect(make_summary, records, tmp_path):
    summary = make_summary(name="Sync run")
    urls = write_report(summary, records, str(tmp_path)) | {"remote.html": "https://example.org/a b.html"}

    @flow
    def report() -> None:
        publish_artifacts(summary, records, urls)

    report()
    (table,) = artifacts("ddk-sync-run-gap")
    assert table.type == "table"
    assert table.flow_run_id is not None
    rows = json.loads(table.data)
    assert [(row["domain"], row["ratio_before"], row["ratio_after"]) for row in rows] == [
        ("code", 4.0, 1.5),
        ("math", 3.0, 2.0),
        ("web", 1.5, 1.0),
    ]
    assert rows[0]["token_share"] == 0.3333
    (page,) = artifacts("ddk-sync-run-report")
    assert page.type == "markdown"
    assert page.data.count("](data:image/png;base64,") == 2
    assert f"- index.html: `{urls['index.html']}`" in page.data
    assert "- [remote.html](<https://example.org/a b.html>)" in page.data


@pytest.mark.usefixtures("prefect_server")
def test_artifacts_from_an_async_flow_with_numbers_that_json_lacks(make_summary, make_records, tmp_path):
    summary, records = make_summary(name="async"), make_records({"a": [math.inf, 2.0], "b": [2.0, math.nan]})
    urls = write_report(summary, records, str(tmp_path))

    @flow
    async def report() -> None:
        publish_artifacts(summary, records, urls)

    with warnings.catch_warnings():
        # Prefect 3.7.7 leaves a connection of its own open after any async flow, even an empty one.
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(report())
        gc.collect()
    (table,) = artifacts("ddk-async-gap")
    assert [row["ratio_before"] for row in json.loads(table.data)] == ["inf", 2.0]
