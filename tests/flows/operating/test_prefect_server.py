"""Which Prefect server did not answer, and what to do: said at once; and patience with one that starts."""

from __future__ import annotations

import http.server
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

from ddk.errors import UserError
from flows.operating import prefect_server
from flows.operating.prefect_server import OwnServer, reach
from tasks.running.loopback import loopback_past_proxies

HEALTHY = """
import http.server, sys, time

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *arguments):
        pass

time.sleep(float(sys.argv[2]))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


class Server(http.server.ThreadingHTTPServer):
    status, content = 200, b"true"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def refusal(url: str) -> str:
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(UserError) as refused:
        reach()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("status", "content", "says"),
    [
        (200, b"<html>", "answers, but not like a Prefect server; does its URL end in /api?"),
        (404, b"", "answers 404; does its URL end in /api?"),
        (401, b"", "refuses this client (401); set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY"),
        (502, b"", "answers 502; look at its log, or unset PREFECT_API_URL"),
    ],
)
def test_a_server_that_is_none_is_named(server: Server, status: int, content: bytes, says: str) -> None:
    server.status, server.content = status, content
    message = refusal(f"{server.url}/api")
    assert message.startswith(f"the Prefect server {server.url}/api (PREFECT_API_URL, or Prefect's profile)")
    assert says in message


def test_a_server_that_is_down_is_named_at_once(monkeypatch: pytest.MonkeyPatch, requests_made: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    message = refusal(f"http://me:secret@127.0.0.1:{port}/api")
    assert f"http://***@127.0.0.1:{port}/api" in message
    assert "secret" not in message
    assert "does not answer" in message
    assert "start it, or unset PREFECT_API_URL" in message
    assert len(requests_made) == 1, "Prefect itself would ask again and again"
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert "asked through the proxy of HTTP_PROXY (NO_PROXY=far.invalid goes past it)" in refusal(
        "http://far.invalid/api"
    )


@pytest.mark.parametrize("url", ["localhost:4200/api", "x", "ftp://x/api", "http://"])
def test_what_is_no_url_of_a_server(url: str) -> None:
    assert refusal(url)


def test_no_server_at_all() -> None:
    nothing = {PREFECT_API_URL: None, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: False}
    with temporary_settings(nothing), pytest.raises(UserError, match="PREFECT_API_URL names no server; set it"):
        reach()


def test_a_good_server_is_reached(server: Server) -> None:
    with temporary_settings({PREFECT_API_URL: f"{server.url}/api"}):
        reach()
    assert server.asked == ["/api/health"]


def test_loopback_never_goes_through_a_proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url)
    loopback_past_proxies()
    loopback_past_proxies()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intranet.example,127.0.0.1,localhost,::1"
    assert httpx.get(server.url).content == b"true"


class Fake(OwnServer):
    """Whose process is another program."""

    command: tuple[str, ...] = ()

    def _process(self, said: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", self.command[0], str(self.port), *self.command[1:]], stderr=said)


@pytest.mark.usefixtures("prefect_server")
def test_a_server_of_its_own_is_waited_for_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "1")
    monkeypatch.setattr(prefect_server, "SECONDS_OF_SILENCE", 0.2)
    monkeypatch.setattr(Fake, "command", (HEALTHY, "1.5"))
    with caplog.at_level(logging.INFO, logger="ddk"):
        own = Fake(port=1)
        own.start()
    try:
        assert own.running
        assert "waiting for the Prefect server that this run starts for itself" in caplog.text
    finally:
        own.stop()


@pytest.mark.usefixtures("prefect_server")
def test_a_server_of_its_own_that_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "command", ("import sys; sys.exit('no such table: flow')",))
    own = Fake(port=2)
    with pytest.raises(UserError, match=r"ended at once \(no such table: flow\); see that .* \(PREFECT_HOME\) can"):
        own.start()
    assert not own.running
