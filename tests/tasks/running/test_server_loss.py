"""A Prefect server that dies in the middle of a run, and one that must not outlive it."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import pytest
from prefect import flow, task
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.running import server_loss as surviving


class Server:
    """One that passes everything on to another, until it is gone."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/api"
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def die(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._upstream)
                self._open += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(65536):
            target.sendall(content)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def server(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The flows' server; in place of a second one of the command's own there is the tests' server."""

    @contextlib.contextmanager
    def own_server() -> Iterator[None]:
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            yield

    monkeypatch.setattr(surviving, "own_server", own_server)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # as the command has it
    logging.getLogger("prefect._internal").setLevel(logging.CRITICAL)
    mortal = Server(prefect_server)
    with temporary_settings({PREFECT_API_URL: mortal.url, PREFECT_CLIENT_MAX_RETRIES: 1}):
        yield mortal
    mortal.die()


def test_training_that_loses_its_server_finishes_and_says_so_in_one_line(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    trained: list[int] = []

    @task
    def train(step: int) -> None:
        if step not in trained:  # every stage skips what is complete
            if step == 1:
                server.die()
            emit_event(event="ddk.test", resource={"prefect.resource.id": "ddk.test"})
            logging.getLogger("ddk").info("step %d", step)
            trained.append(step)

    @flow
    def stage() -> str:
        for step in range(3):
            train(step)
        return "trained"

    @flow
    def pipeline() -> str:
        return stage() + " and reported"

    began = time.monotonic()
    assert surviving.going_on_without_its_server(pipeline) == "trained and reported"
    # Against a wait that has no end in sight: Prefect's clients ask a server that is gone for minutes, each of them. It
    # takes seconds, and took 20 s on two cores that were busy with much else, so the bound is far from that.
    assert time.monotonic() - began < 120
    assert trained == [0, 1, 2]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    said = [line for line in said if "Prefect's server" in line]
    assert len(said) == 1
    assert f"{server.url.removesuffix('/api')} is gone. What is complete is kept" in said[0]
    assert "Error logging to API" not in capfd.readouterr().err


def test_an_error_of_the_work_stays_what_it_is(server: Server) -> None:
    @flow
    def pipeline(lose: bool) -> None:
        if lose:
            server.die()
        raise KeyError("of the work")

    for lose in (False, True):
        with pytest.raises(KeyError, match="of the work"):
            surviving.going_on_without_its_server(lambda lose=lose: pipeline(lose))


HOLDER = """
import subprocess, sys
from tasks.running.server_loss import going_on_without_its_server
going_on_without_its_server(lambda: (
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True), input()
))
"""


@pytest.mark.server
def test_a_server_that_a_command_has_started_ends_with_it_when_that_is_killed() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    holder.kill()
    holder.communicate()
    assert not psutil.wait_procs([child], timeout=20)[1]
