"""Artifacts as Prefect's server holds them afterwards: where they hang, and that none of them stops the work."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import warnings
from contextlib import suppress

import pytest
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.showing import artifacts
from tasks.showing.artifacts import Board, add_version, artifact_key, table


def stored(key):
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("quickstart", "gap"), "ddk-quickstart-gap"),
        (("My run_2!", "gap"), "ddk-my-run-2-gap"),
        (("书", "gap"), "ddk-run-gap"),
        (("capture math",), "ddk-capture-math"),
    ],
)
def test_artifact_key(words, key):
    assert artifact_key(*words) == key


@task(cache_policy=NO_CACHE)
def show(key, *pages, of_task=False):
    board = Board(key, "markdown", of_task=of_task)
    return [board.show(page, f"now {page}") for page in pages]


def test_a_board_is_replaced_in_its_flow_run_and_in_those_that_called_it(prefect_server):
    ids = {}

    @flow
    def inner():
        ids["inner"] = FlowRunContext.get().flow_run.id
        assert show("ddk-board", "a", "b") == [True, True]
        assert show("ddk-board", "c") == [True], "another task run goes on with it"

    @flow
    def middle():
        ids["middle"] = FlowRunContext.get().flow_run.id
        inner()

    @flow
    def outer():
        ids["outer"] = FlowRunContext.get().flow_run.id
        middle()

    outer()
    found = stored("ddk-board")
    assert {artifact.flow_run_id for artifact in found} == set(ids.values())
    assert len(found) == 3
    assert [(artifact.data, artifact.description, artifact.task_run_id) for artifact in found] == [
        ("c", "now c", None)
    ] * 3
    outer()
    assert len(stored("ddk-board")) == 6, "another run's is another"


def test_a_task_s_own_board(prefect_server):
    @flow
    def run():
        for page in "ab":
            show("ddk-of-task", page, page + page, of_task=True)

    run()
    found = stored("ddk-of-task")
    assert sorted(artifact.data for artifact in found) == ["aa", "bb"]
    assert len({artifact.task_run_id for artifact in found} - {None}) == 2


def test_a_change_is_given_what_hangs_there(prefect_server):
    @flow
    def run():
        for row in ({"domain": "math"}, {"domain": "web"}):
            board = Board("ddk-rows", "table")
            board.change(lambda old, row=row: table([*(json.loads(old) if old else []), row]), "rows")

    run()
    (found,) = stored("ddk-rows")
    assert json.loads(found.data) == [{"domain": "math"}, {"domain": "web"}]


def test_what_somebody_took_down_hangs_there_again(prefect_server, caplog):
    @flow
    def run():
        board = Board("ddk-taken", "markdown")
        with get_client(sync_client=True) as client:
            assert board.show("a", "")
            client.delete_artifact(stored("ddk-taken")[0].id)
            with caplog.at_level(logging.WARNING, logger="ddk"):
                assert not board.show("b", "")
            assert board.show("c", "")

    run()
    assert [artifact.data for artifact in stored("ddk-taken")] == ["c"]
    assert len([record for record in caplog.records if record.name == "ddk"]) == 1


@pytest.mark.parametrize("deleted", ["caller", "itself"])
def test_a_deleted_flow_run_is_no_hindrance(prefect_server, deleted):
    key = f"ddk-deleted-{deleted}"

    @flow
    def inner(caller):
        with get_client(sync_client=True) as client:
            client.delete_flow_run(caller if deleted == "caller" else FlowRunContext.get().flow_run.id)
        assert Board(key, "markdown").show("a", "")

    @flow
    def outer():
        inner(FlowRunContext.get().flow_run.id)

    with suppress(ObjectNotFound):  # Prefect misses it at its end
        outer()
    assert [artifact.data for artifact in stored(key)] == ["a"]


def test_versions_stay(prefect_server):
    @flow
    def run():
        for step in range(3):
            assert add_version("ddk-versions", "table", table([{"step": str(step)}]), f"step {step}")

    run()
    found = sorted(stored("ddk-versions"), key=lambda artifact: artifact.created)
    assert [artifact.description for artifact in found] == ["step 0", "step 1", "step 2"]


def test_from_an_async_flow(prefect_server):
    @flow
    async def run():
        return show("ddk-async", "a") == [True] and add_version("ddk-async", "markdown", "b", "")

    with warnings.catch_warnings():
        # Prefect 3.7.7 leaves a connection of its own open after any async flow, even an empty one.
        warnings.simplefilter("ignore", ResourceWarning)
        assert asyncio.run(run())
        gc.collect()
    assert sorted(artifact.data for artifact in stored("ddk-async")) == ["a", "b"]


def test_outside_of_a_run_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(artifacts, "_prepared", None)  # whoever calls it fails
    assert not Board("ddk-nowhere", "markdown").show("a", "")
    assert not add_version("ddk-nowhere", "markdown", "a", "")


@pytest.mark.parametrize("answers", [False, True], ids=["refuses", "hangs"])
def test_a_server_that_is_gone_costs_a_warning_and_not_the_work(
    prefect_server, monkeypatch, caplog, requests_made, answers
):
    monkeypatch.setattr(artifacts, "SECONDS_TO_WAIT", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if answers:
            silent.listen()  # takes the connection, and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"

        @flow
        def run():
            with temporary_settings({PREFECT_API_URL: url}):
                board = Board("ddk-gone", "markdown")
                shown = [board.show("a", ""), board.show("b", "")]
                shown.append(add_version("ddk-gone", "markdown", "a", ""))
            return shown

        with caplog.at_level(logging.WARNING, logger="ddk"):
            shown = run()
    assert shown == [False] * 3
    assert len([asked for asked in requests_made if asked.startswith(url)]) == 3, "Prefect itself would try for minutes"
    messages = [record.getMessage() for record in caplog.records if record.name == "ddk"]
    assert len(messages) == (3 if answers else 1), "that it is not there is said once"
    assert all(message.startswith("'ddk-gone' is not shown in Prefect's UI: ") for message in messages)
    assert stored("ddk-gone") == []
