"""Progress as a person sees it: lines in a log, and an artifact in Prefect's UI."""

from __future__ import annotations

import logging

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from tasks import progress


def test_an_artifact_follows_the_task(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)

    @task(cache_policy=NO_CACHE)
    def work() -> None:
        with progress.meter("capture math", 8, "blocks") as meter:
            for _ in range(6):
                meter.advance(1, "123 tokens/s")

    @flow
    def run() -> str:
        from prefect.context import FlowRunContext

        work()
        return str(FlowRunContext.get().flow_run.id)

    flow_run = run()
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
        (found,) = client.read_artifacts(artifact_filter=wanted)
    assert found.type == "progress"
    assert found.data == 75.0
    assert found.description.startswith("capture math: 6 of 8 blocks, 123 tokens/s, ")
    assert found.task_run_id is not None


def test_what_shows_it_never_stops_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)
    monkeypatch.setattr(progress, "create_progress_artifact", fail)
    shown = progress._Artifact("capture math", 8, "blocks")
    with caplog.at_level(logging.WARNING, logger="ddk"):
        for _ in range(3):
            shown.advance(1)
        shown.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the progress of 'capture math' is not shown in Prefect's UI any more: no server"
    ]


def test_outside_of_a_task_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "create_progress_artifact", None)  # whoever calls it fails
    with (
        caplog.at_level(logging.INFO, logger="ddk"),
        progress.meter("pack math", 200, "bytes") as meter,
    ):
        meter.advance(50, "half of a half")
    assert "pack math: 50 of 200 bytes" in caplog.text
    assert "half of a half" in caplog.text
