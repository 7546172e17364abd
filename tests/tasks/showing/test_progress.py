"""Progress as a person sees it: lines in a log, and an artifact in Prefect's UI."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.context import FlowRunContext

from tasks.showing import artifacts, progress
from tasks.showing.progress import Work


@task(cache_policy=NO_CACHE)
def work(amounts: list[int], done: int = 0, artifact: str | None = None) -> None:
    with progress.meter(
        "capture math", 8, "blocks", done=done, positions=100, root="s3://bucket/weekly", artifact=artifact
    ) as meter:
        for amount in amounts:
            meter.advance(amount, "a note")


def shown(key: str, *calls: tuple[list[int], int], artifact: str | None = None) -> list[Artifact]:
    """What hangs in the flow run after so many task runs."""

    @flow
    def run() -> str:
        for amounts, done in calls:
            work(amounts, done, artifact)
        return str(FlowRunContext.get().flow_run.id)

    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run()]), key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=wanted)


def test_an_artifact_follows_the_task(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_TO_FIRST_UPDATE", 0.0)
    (found,) = shown("ddk-weekly-capture-math", ([1] * 6, 0))
    assert found.type == "progress"
    assert found.data == 75.0
    said = found.description
    assert said.startswith("6 of 8 blocks (600 positions), ")
    assert " left, " in said
    assert said.endswith(" tokens/s, a note")
    assert found.task_run_id is not None


def test_what_took_no_longer_than_a_glance_leaves_none(prefect_server: str) -> None:
    assert shown("ddk-weekly-capture-math", ([1] * 8, 0)) == []


def test_the_tasks_of_a_flow_run_carry_one_on(prefect_server: str) -> None:
    (found,) = shown("ddk-some-training", ([1, 1], 0), ([1, 1], 2), artifact="ddk-some-training")
    assert found.data == 50.0
    assert found.description.startswith("4 of 8 blocks (400 positions), ")
    assert found.task_run_id is None


def test_what_shows_it_never_stops_it(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fail(server: object) -> None:
        asked.append(server)
        raise ConnectionError("no server")

    monkeypatch.setattr(progress, "SECONDS_TO_FIRST_UPDATE", 0.0)
    monkeypatch.setattr(artifacts, "_prepared", fail)

    @flow
    def run() -> None:
        work.fn([1] * 8)

    with caplog.at_level(logging.WARNING, logger="ddk"):
        run()
    # At the first block and at the end; in between, that server is left alone.
    assert [record.getMessage() for record in caplog.records if record.name == "ddk"] == [
        "'ddk-weekly-capture-math' is not shown in Prefect's UI: no server"
    ] * 2
    assert len(asked) == 2


def test_outside_of_a_run_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(artifacts, "_prepared", None)  # whoever calls it fails
    with (
        caplog.at_level(logging.INFO, logger="ddk"),
        progress.meter("pack math", 200, "bytes") as meter,
    ):
        meter.advance(50, "half of a half")
    assert caplog.messages == ["pack math: 50 of 200 bytes, half of a half"]


def test_the_time_left_is_that_of_the_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an engine's start nor what was done before counts as speed."""
    clock = 1000.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock))
    at = Work("capture math", 100, "blocks", done=40, positions=10)
    assert str(at) == "40 of 100 blocks (400 positions)"
    clock += 60  # an engine starts
    at.advance(10, "")
    assert str(at) == "50 of 100 blocks (500 positions)"
    clock += 4
    at.advance(20, "note")
    assert str(at) == "70 of 100 blocks (700 positions), 6.0 s left, 50 tokens/s, note"
    clock += 6
    at.advance(30, "")
    # 60 blocks of 10 positions in 70 s, the engine's start among them.
    assert str(at) == "100 of 100 blocks (1,000 positions), 9 tokens/s, 50 after the start, note"
    assert at.percent == 100.0


def test_what_others_have_done_is_no_speed_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock))
    at = Work("capture math", 100, "blocks", positions=10)
    clock = 1.0
    at.advance(10, "")
    at.skip(60)
    clock = 3.0
    at.advance(20, "")
    assert str(at) == "90 of 100 blocks (900 positions), 1.0 s left, 100 tokens/s"
    at.skip(10)
    assert str(at) == "100 of 100 blocks (1,000 positions), 100 tokens/s"


def test_at_the_end_the_time_that_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock))
    at = Work("pack math", 2, "bytes")
    clock = 65.0
    at.advance(2, "")
    assert str(at) == "2 of 2 bytes, in 1 min 05 s"


def test_lines_reach_a_worker_s_log() -> None:
    """Prefect lends its handlers to the logger `ddk`, and leaves its level as it is: WARNING, by the root logger's."""
    program = "import logging, tasks.showing.progress; print(logging.getLogger('ddk').isEnabledFor(logging.INFO))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert said.stdout.strip() == "True"
