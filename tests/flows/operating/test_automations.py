"""`ddk automations` against a real server, and that what it makes does what it is for."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import Flow, flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import RunnerDeployment
from prefect.events.schemas.automations import Automation
from prefect.events.worker import EventsWorker
from prefect.flow_engine import FlowRunEngine
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running
from prefect.types.entrypoint import EntrypointType
from small_run import small_config

import flows
from ddk.errors import UserError
from flows.__main__ import main
from flows.config import Config
from flows.operating import automations
from flows.operating.automations import DEAD_RUNS, FLOWS, SILENCE, Done, dead_runs, remove, set_up
from flows.operating.deployments import DEPLOYABLE
from storage.runs.folder import RunFolder
from tasks.showing.events import say_event

REBALANCE = "rebalance/for-automations"


@pytest.fixture
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    """Of a server that has none of our automations, before and after.

    Prefect's thread that sends events keeps the context in which it was started: were that one of a flow run, every
    event of this process would be related to that run's flow. Here it is started outside of any.
    """
    EventsWorker.drain_all(timeout=60)
    EventsWorker.instance()
    remove()
    with get_client(sync_client=True) as client:
        yield client
    remove()


def on_server(client: SyncPrefectClient) -> dict[str, Automation]:
    return {one.name: one for one in client.read_automations()}


def changed_at(client: SyncPrefectClient, automation: UUID) -> str:
    return str(client.request("GET", f"/automations/{automation}").json()["updated"])


@pytest.fixture
def theirs(client: SyncPrefectClient) -> Iterator[set[str]]:
    """Automations of somebody else, one of them with our prefix and one with our tag; gives their names."""
    others = [
        dead_runs(timedelta(hours=1)).model_copy(update={"name": name, "tags": tags, "enabled": False})
        for name, tags in (("ddk: my own", []), ("somebody's", ["ddk"]))
    ]
    ids = [client.create_automation(one) for one in others]
    yield {one.name for one in others}
    for one in ids:
        client.delete_automation(one)


def test_a_second_call_changes_nothing_and_another_option_changes_it(
    client: SyncPrefectClient, theirs: set[str]
) -> None:
    assert set_up() == [Done(name=DEAD_RUNS, what="created")]
    made = on_server(client)[DEAD_RUNS]
    created = changed_at(client, made.id)
    assert made.trigger.within == timedelta(seconds=540)
    assert made.enabled
    assert set_up() == [Done(name=DEAD_RUNS, what="unchanged")]
    assert changed_at(client, made.id) == created

    client.pause_automation(made.id)
    assert set_up() == [Done(name=DEAD_RUNS, what="unchanged", enabled=False)]
    assert set_up(90) == [Done(name=DEAD_RUNS, what="updated", enabled=False)]
    now = on_server(client)
    assert (now[DEAD_RUNS].id, now[DEAD_RUNS].trigger.within) == (made.id, timedelta(seconds=90))
    assert not now[DEAD_RUNS].enabled, "who switched it off wants it off"

    assert remove() == [Done(name=DEAD_RUNS, what="removed")]
    assert remove() == []
    assert set(on_server(client)) >= theirs
    assert DEAD_RUNS not in on_server(client)


def test_of_two_that_were_made_at_once_one_is_left(client: SyncPrefectClient) -> None:
    for _ in range(2):
        client.create_automation(dead_runs(timedelta(seconds=SILENCE)))
    assert set_up() == [Done(name=DEAD_RUNS, what="unchanged")]
    assert [one.name for one in client.read_automations()].count(DEAD_RUNS) == 1


def test_the_command_says_what_it_did(
    client: SyncPrefectClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ddk(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddk", "automations", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out.strip()

    assert ddk() == (0, f"created    {DEAD_RUNS}")
    assert on_server(client)[DEAD_RUNS].trigger.within == timedelta(seconds=SILENCE)
    client.pause_automation(on_server(client)[DEAD_RUNS].id)
    assert ddk("--within", "120") == (0, f"updated    {DEAD_RUNS}   (switched off on the server)")
    assert ddk("--within", "89")[0] == 2, "healthy runs would be marked"
    assert ddk("--within", "90")[0] == 0
    assert ddk("--rebalance-on-checkpoint", "--deployment", "rebalance/nowhere")[0] == 2
    assert ddk("--remove") == (0, f"removed    {DEAD_RUNS}")
    assert ddk("--remove") == (0, "there were none")


def test_without_a_server_nothing_is_started(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automations, "get_client", lambda **_: pytest.fail("it would start a server of its own"))
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(UserError, match="set PREFECT_API_URL="):
        set_up()


def test_a_server_that_does_not_answer_and_one_that_is_none(prefect_server: str) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        for call in (set_up, remove):
            with pytest.raises(UserError, match=r"at http://127\.0\.0\.1:9/api does not answer"):
                call()
    with (
        temporary_settings({PREFECT_API_URL: prefect_server.removesuffix("/api") + "/nowhere"}),
        pytest.raises(UserError, match="it ends with /api"),
    ):
        set_up()


def test_a_block_is_told_of_failures_and_news(client: SyncPrefectClient) -> None:
    """Over the wire: a webhook on loopback hears of a run that fails, and of one that is complete."""
    heard: list[str] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Webhook) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            CustomWebhookNotificationBlock(
                name="operators",
                url=f"http://127.0.0.1:{server.server_port}/",
                json_data={"subject": "{{subject}}", "body": "{{body}}"},
            ).save("operators", overwrite=True)
            with pytest.raises(UserError, match="there is no notification block 'slack-webhook/none' on the server"):
                set_up(notify="slack-webhook/none")
            done = set_up(notify="custom-webhook/operators")
            assert [one.name for one in done] == [DEAD_RUNS, "ddk: notify of failed runs", "ddk: notify of news"]
            assert {one.what for one in set_up(notify="custom-webhook/operators")} == {"unchanged"}
            run = RunFolder("/data", "weekly")

            @flow(name="report", flow_run_name="report weekly")
            def stage() -> None:
                say_event("run.finished", run, "inline", {"step": 9, "message": "largest ratio 1.07 (math)"})
                raise RuntimeError("disk full")

            with pytest.raises(RuntimeError):
                stage()
            until(lambda: len(heard) >= 2)
        finally:
            server.shutdown()
            thread.join()
    news, failure = sorted(heard, key=lambda text: "Failed" in text)
    assert "ddk: weekly" in news
    assert "largest ratio 1.07 (math)" in news
    assert "report weekly" in failure
    assert "disk full" in failure


def test_every_flow_of_ours_is_watched() -> None:
    found = [one.name for one in pkgutil.walk_packages(flows.__path__, "flows.")]
    modules = [import_module(name) for name in found if not name.startswith("flows.presets.")]
    ours = {one.name for module in modules for one in vars(module).values() if isinstance(one, Flow)}
    assert ours == set(FLOWS), "name it in flows.operating.automations.FLOWS"


def events_of(client: SyncPrefectClient, run: UUID) -> list[str]:
    """Names of the events whose resource or target is the run."""
    any_resource = {"any_resource": {"id": [f"prefect.flow-run.{run}"]}}
    answer = client.request("POST", "/events/filter", json={"filter": any_resource, "limit": 50})
    answer.raise_for_status()
    return [str(event["event"]) for event in answer.json()["events"]]


def until(condition: Any, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.5)


class Sender:
    """A flow run whose process is this one: it is Running, and Prefect's own engine sends its heartbeats."""

    def __init__(self, client: SyncPrefectClient, name: str) -> None:
        @flow(name=name)
        def nothing() -> None: ...

        self._client = client
        self.run: FlowRun = client.create_flow_run(nothing, state=Running())
        self._engine = FlowRunEngine(flow=nothing, flow_run=self.run)
        self.beat()

    def beat(self) -> None:
        self._engine._emit_flow_run_heartbeat()

    @property
    def state(self) -> str | None:
        return self._client.read_flow_run(self.run.id).state_name


SLEEPS = """
import time
from prefect import flow
flow(lambda: time.sleep(600), name="distill", flow_run_name="to be killed")()
"""
TO_BE_KILLED = FlowRunFilter(name=FlowRunFilterName(any_=["to be killed"]))


def test_a_run_that_died_becomes_crashed_and_no_other_does(
    client: SyncPrefectClient, prefect_server: str, tmp_path: Path
) -> None:
    """A real process, killed. Prefect sends a heartbeat every 30 s at most, and the first one at once."""
    set_up(silence=25)
    ended, overtaken, foreign = (Sender(client, name) for name in ("report", "pack-corpus", "somebody-s"))
    until(lambda: all("prefect.flow-run.heartbeat" in events_of(client, one.run.id) for one in (ended, overtaken)))
    for one in (ended, overtaken):
        client.set_flow_run_state(one.run.id, Completed())
    overtaken.beat()  # of a run that is short, the last heartbeat may arrive after its end
    environment = {**os.environ, "PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", SLEEPS], env=environment, stderr=subprocess.DEVNULL)
    try:
        until(lambda: client.read_flow_runs(flow_run_filter=TO_BE_KILLED))
        killed = client.read_flow_runs(flow_run_filter=TO_BE_KILLED)[0].id
        until(lambda: "prefect.flow-run.heartbeat" in events_of(client, killed))
    finally:
        process.kill()
        process.wait()
    assert client.read_flow_run(killed).state_name == "Running", "for ever, without the automation"
    alive = Sender(client, "train-student")

    def noticed() -> bool:
        alive.beat()
        return client.read_flow_run(killed).state_name == "Crashed"

    until(noticed)
    state = client.read_flow_run(killed).state
    assert state is not None
    assert "No heartbeat for 25 s" in str(state.message)
    # The silence of these began earlier, and the last has gone on all the time.
    until(lambda: "prefect.automation.action.failed" in events_of(client, overtaken.run.id))
    assert (ended.state, overtaken.state, foreign.state, alive.state) == (
        "Completed",
        "Completed",
        "Running",
        "Running",
    )
    for run in (alive, foreign):  # on one that has ended Prefect may try, and refuses
        assert not [event for event in events_of(client, run.run.id) if "automation" in event]

    until(lambda: alive.state == "Crashed")  # now that it is silent as well
    assert (ended.state, overtaken.state, foreign.state) == ("Completed", "Completed", "Running")
    client.delete_flow_run(foreign.run.id)


@pytest.fixture
def rebalancing(client: SyncPrefectClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UUID, str]]:
    """A deployment of `rebalance` with a root of its own; gives its id and the root."""
    root = str(tmp_path_factory.mktemp("root [a]"))
    parameters = Config.model_validate(small_config(root=root)).model_dump(mode="json")
    deployment = RunnerDeployment.from_flow(
        DEPLOYABLE["rebalance"],
        REBALANCE.partition("/")[2],
        parameters=parameters,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    identifier = deployment.apply()
    assert isinstance(identifier, UUID)
    yield identifier, root
    client.delete_deployment(identifier)


def runs_of(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    )


def test_a_checkpoint_starts_rebalance_for_its_run(client: SyncPrefectClient, rebalancing: tuple[UUID, str]) -> None:
    deployment, root = rebalancing
    name = f"ddk: rebalance after each checkpoint ({REBALANCE})"
    for what in ("created", "unchanged"):
        assert Done(name=name, what=what) in set_up(rebalance=REBALANCE)  # type: ignore[arg-type]
    for place, run, evaluation in (
        (f"{root}-other", "small", "scheduled"),
        (root, "inline", "inline"),
        (root, "second", "scheduled"),
    ):
        say_event("checkpoint.written", RunFolder(place, run), evaluation, {"step": 2})
    until(lambda: runs_of(client, deployment))
    say_event("checkpoint.written", RunFolder(root, "third"), "scheduled", {"step": 2})
    until(lambda: len(runs_of(client, deployment)) > 1)
    started = runs_of(client, deployment)
    assert {run.parameters["run"] for run in started} == {"second", "third"}, "of this root, and measured by others"
    assert all(run.parameters["train"]["steps"] == 6 for run in started), "all else as deployed"
    for run in started:
        client.delete_flow_run(run.id)
    assert {one.name for one in remove()} == {DEAD_RUNS, name}


def test_a_deployment_that_is_not_there_is_named(client: SyncPrefectClient) -> None:
    with pytest.raises(UserError, match=r"there is no deployment 'rebalance/nowhere'.*prefect deploy --all"):
        set_up(rebalance="rebalance/nowhere")
    assert on_server(client) == {}, "nothing is made where something is wrong"
