"""What Prefect's UI is given of a run: judged against the stored history and the manifest that it is made from."""

from __future__ import annotations

import json
import logging
import math

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.context import FlowRunContext

from ddk.values import DomainGap, Mixture
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record
from storage.stores.schema import Manifest, ObjectRecord, ShardRecord, SplitManifest
from tasks.reporting.now import key_of, show_stage
from tasks.reporting.run_artifacts import (
    measurement_line,
    measurement_rows,
    places,
    publish_measurement,
    publish_report,
    publish_targets,
    report_markdown,
)
from tasks.showing.artifacts import artifact_key
from tasks.showing.formats import link


def stored(key):
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_a_measurement_by_domain_with_its_changes(records):
    assert measurement_rows(records[1:]) == [
        {
            "domain": "math",
            "student ppl": "16.00",
            "teacher ppl": "8.00",
            "ratio": "2.000",
            "ratio change": "−0.500",
            "next probability": "0.4444",
            "probability change": f"+{4 / 9 - 2.5 / 5.75:.4f}",
        },
        {
            "domain": "code",
            "student ppl": "12.00",
            "teacher ppl": "8.00",
            "ratio": "1.500",
            "ratio change": "−0.500",
            "next probability": "0.3333",
            "probability change": f"−{2 / 5.75 - 1 / 3:.4f}",
        },
        {
            "domain": "web",
            "student ppl": "8.00",
            "teacher ppl": "8.00",
            "ratio": "1.000",
            "ratio change": "−0.250",
            "next probability": "0.2222",
            "probability change": f"+{2 / 9 - 1.25 / 5.75:.4f}",
        },
    ]
    assert measurement_line(records) == "step 20, 9,216 tokens: largest ratio 2.000 (math)"


def test_the_first_measurement_has_no_changes_and_numbers_need_not_be_finite(make_records):
    rows = measurement_rows(make_records({"a": [2.0], "far": [math.inf], "lost": [math.nan]}))
    assert {row["domain"]: row["ratio"] for row in rows} == {"far": "∞", "lost": "–", "a": "2.000"}
    assert rows[-1]["domain"] == "a", "what could not be measured is noticed first"
    assert {row[key] for row in rows for key in ("ratio change", "probability change")} == {"–"}


def test_a_page_of_it_all(make_summary, records):
    page = report_markdown(
        make_summary(name="<b>|"), records, {"index.html": "s3://bucket/a b/index.html", "run": "https://example.org/r"}
    )
    assert page.startswith("# &lt;b&gt;\\|\n")
    assert page.count("](data:image/png;base64,") == 2
    assert "| code | 8.00 | 32.00 | 12.00 | 4.000 | 1.500 | 33.3\xa0% | 33.3\xa0% |" in page
    assert "| index.html | `s3://bucket/a b/index.html` |" in page
    assert "| run | [https://example.org/r](<https://example.org/r>) |" in page


def test_a_path_is_text_to_copy():
    assert link("/data/ddk/runs/a") == "`/data/ddk/runs/a`"
    assert link("s3://b/targets/f/math.zarr", "targets/f/math.zarr") == "`targets/f/math.zarr`"
    assert link("https://h/targets/a b", "targets/a b") == "[targets/a b](<https://h/targets/a b>)"


CONFIG = {
    "method": "ddk",
    "teacher": {"model": "org/teacher"},
    "student": {"model": "org/student"},
    "domains": {"math": {}, "web": {}},
    "packing": {"seq_len": 96},
    "loss": {},
    "train": {"steps": 8},
}


@pytest.fixture
def folder(tmp_path):
    run = RunFolder(str(tmp_path), f"R{abs(hash(tmp_path.name)) % 10**6}")
    stores = {"web": {"blocks": "b2", "targets": "t2"}, "math": {"blocks": "b1", "targets": "t1"}}
    run.claim({"stores": stores}, CONFIG)
    return run


def measure(folder, version):
    record = make_record(
        version=version,
        step=2 * version,
        tokens_seen=100 * version,
        gaps=[
            DomainGap(domain="math", student_ppl=30.0 - version, teacher_ppl=10.0),
            DomainGap(domain="web", student_ppl=9.0, teacher_ppl=4.5),
        ],
        mixture=Mixture(probabilities={"math": 0.6 - version / 100, "web": 0.4 + version / 100}),
        blocks_drawn={"math": version, "web": version},
    )
    MixtureHistory(folder.url).append(record)
    return record


def test_every_measurement_is_a_version_and_the_page_is_replaced(prefect_server, folder):
    @task(cache_policy=NO_CACHE)
    def mixture(version):
        measure(folder, version)
        publish_measurement(folder)

    @flow
    def train():
        for version in range(3):
            mixture(version)
            (page,) = stored(key_of(folder, "report"))
            pages.append(page)

    pages = []
    train()
    tables = sorted(stored(key_of(folder, "gap")), key=lambda artifact: artifact.created)
    assert [one.description for one in tables] == [
        f"step {2 * t}, {100 * t} tokens: largest ratio {3 - t / 10:.3f} (math)" for t in range(3)
    ]
    for t, one in enumerate(tables):
        assert one.type == "table"
        assert one.task_run_id is not None
        rows = {row["domain"]: row for row in json.loads(one.data)}
        assert list(rows) == ["math", "web"]
        assert rows["math"]["student ppl"] == f"{30 - t:.2f}"
        assert rows["web"]["next probability"] == f"{0.4 + t / 100:.4f}"
        assert rows["math"]["probability change"] == ("–" if t == 0 else "−0.0100")
    assert len({page.id for page in pages}) == 1
    assert len({page.data for page in pages}) == 3
    assert f"| targets of web | `{folder.url.rpartition('/runs/')[0]}/targets/t2/web.zarr` |" in pages[-1].data
    assert pages[-1].description == tables[-1].description
    (now,) = stored(key_of(folder, "now"))
    assert now.data.startswith("**train**\n")
    assert "**Step 4 of 8** (50.0\N{NO-BREAK SPACE}%)" in now.data
    assert "| math | 58.0\N{NO-BREAK SPACE}% | 2.800 |" in now.data
    assert now.description == tables[-1].description


def test_the_line_of_stages_and_the_training_below_it_do_not_disturb_each_other(prefect_server, folder):
    """`distill` writes the line, its subflow `train-student` what is below."""
    seen = []

    @flow
    def train():
        measure(folder, 0)
        publish_measurement(folder)

    @flow
    def distill():
        show_stage(folder, ["pack", "train"], 0)
        show_stage(folder, ["pack", "train"], 1)
        train()
        show_stage(folder, ["pack", "train"], 2)
        seen.append(FlowRunContext.get().flow_run.id)

    distill()
    assert key_of(folder, "now") == artifact_key(folder.root_name, folder.name, "now")
    of_flow = {one.flow_run_id: one for one in stored(key_of(folder, "now"))}
    whole = of_flow.pop(seen[0])
    assert whole.description == "complete"
    line, _, below = whole.data.partition("\n\n---\n\n")
    assert line == "✓ pack → ✓ train"
    assert below.startswith("**Step 0 of 8**")
    (alone,) = of_flow.values()
    assert alone.data.startswith("**train**\n")


def test_where_a_run_s_things_lie(folder, tmp_path):
    assert places(folder) == {
        "run": folder.url,
        "targets of math": f"{tmp_path}/targets/t1/math.zarr",
        "targets of web": f"{tmp_path}/targets/t2/web.zarr",
        "blocks of math": f"{tmp_path}/blocks/b1/math.zarr",
        "blocks of web": f"{tmp_path}/blocks/b2/web.zarr",
    }


def test_a_history_that_cannot_be_shown_costs_a_warning(prefect_server, folder, make_summary, caplog):
    @flow
    def run():
        publish_measurement(folder)
        publish_report(folder, make_summary(), [], {})

    with caplog.at_level(logging.WARNING, logger="ddk"):
        run()
    said = [record.getMessage() for record in caplog.records if record.name == "ddk"]
    assert len(said) == 2
    assert said[0].startswith(f"the gap of run '{folder.name}' is not shown in Prefect's UI: run '{folder.name}' has")
    assert "the mixture history is empty" in said[1]


def test_outside_of_a_run_nothing_is_read(tmp_path, make_summary, requests_made, caplog):
    nowhere = RunFolder(str(tmp_path / "nowhere"), "a")
    with caplog.at_level(logging.WARNING, logger="ddk"):
        publish_measurement(nowhere)
        publish_report(nowhere, make_summary(), [], {})
    assert caplog.records == [], "a history that is read, and is not there, costs a warning"
    assert requests_made == []


def manifest(blocks, size):
    # What is shown is of sizes alone: no store need be possible with these.
    def of(size):
        return ObjectRecord.model_construct(bytes=size, sha256="")

    shards = [ShardRecord.model_construct(blocks=n, objects={"ids": of(size), "tail": of(6)}, facts={}) for n in blocks]
    part = SplitManifest.model_construct(blocks=sum(blocks), shards=tuple(shards))
    splits = {"train": part, "validation": part}
    return Manifest.model_construct(kind="targets", dims={"seq_len": 10, "k": 16}, splits=splits, targets=None)


def test_a_row_for_each_domain_s_targets(prefect_server, tmp_path):
    root = f"{tmp_path}/The Root"

    @flow
    def cache():
        publish_targets("web", f"{root}/targets/t2/web.zarr", manifest([8, 2], 44), 61.234, 0.98765)
        publish_targets("math", f"{root}/targets/t1/math.zarr", manifest([1000] * 3, 994), 9.0, 1.0)
        publish_targets("web", f"{root}/targets/t2/web.zarr", manifest([8, 2], 94), 61.234, 0.98765)

    cache()
    (found,) = stored("ddk-the-root-targets")
    assert found.type == "table"
    assert found.description == (
        f"what is kept of the teacher in the 16 stored tokens of a position; stores below `{root}`"
    )
    assert json.loads(found.data) == [
        {
            "domain": "math",
            "retained mass": "100.00\xa0%",
            "teacher ppl": "9.00",
            "positions": "60,000",
            "shards": "6",
            "bytes a position": "0.1",
            "store": "`targets/t1/math.zarr`",
        },
        {
            "domain": "web",
            "retained mass": "98.77\xa0%",
            "teacher ppl": "61.23",
            "positions": "200",
            "shards": "4",
            "bytes a position": "2.0",
            "store": "`targets/t2/web.zarr`",
        },
    ]
