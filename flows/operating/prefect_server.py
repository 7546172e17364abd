"""Reaches the Prefect server that a run reports to before anything begins: the one that PREFECT_API_URL names, or one
that is started for the lifetime of this process.

Prefect itself gives a server that it starts only 20 s, even on a busy machine, and reports a server that does not
answer late, with an error that names no remedy. This module waits for a started server as long as its process lives,
and reports a server that does not answer at once, in a line that names the server and the remedy.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import IO
from urllib.parse import urlsplit

import httpx
import prefect
from prefect.client.orchestration import get_client
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    get_current_settings,
    temporary_settings,
)

from ddk.errors import UserError
from ddk.redaction import redacted
from tasks.showing.progress import logger

SECONDS_OF_SILENCE = 3.0
"""Until a line says what is waited for."""
SECONDS_BETWEEN_LINES = 60.0
_ATTEMPTS = 3
"""To start a server, where another program takes the port in between."""
_TIMEOUT = httpx.Timeout(10.0, connect=4.0)
_OTHERWISE = "unset PREFECT_API_URL to start a server for the duration of the run"


def reach() -> None:
    """See that there is a server. A second call asks it again.

    Raises:
        UserError: the one that is named does not answer as Prefect's server does, or none can be started.
    """
    url = PREFECT_API_URL.value()
    if url:
        _ask(str(url))
    elif PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        # Prefect takes the instance that is there for its own.
        OwnServer().start()
    else:
        raise UserError(
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE is false, and PREFECT_API_URL names no server; set it to one that runs"
        )


def _ask(url: str) -> None:
    place = f"the Prefect server {redacted(url)} (PREFECT_API_URL, or Prefect's profile)"
    if not re.match(r"https?://[^/]", url):
        raise UserError(f"{place} is no URL of one; write http://HOST:4200/api")
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": _TIMEOUT}) as client,
        ):
            answer = client.request("GET", "/health")
    except httpx.HTTPStatusError as error:
        raise UserError(f"{place} {_refusal(error.response.status_code)}") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{place} does not answer ({why}){_proxy(url)}; start it, or {_OTHERWISE}") from error
    if not _is_true(answer.content):
        raise UserError(f"{place} answers, but not like a Prefect server; does its URL end in /api?")


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"refuses this client ({status}); set PREFECT_API_AUTH_STRING, or PREFECT_API_KEY"
    if status == 404:
        return "answers 404; does its URL end in /api?"
    return f"answers {status}; look at its log, or {_OTHERWISE}"


def _proxy(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    host = parts.hostname or ""
    if parts.scheme not in urllib.request.getproxies() or urllib.request.proxy_bypass(host):
        return ""
    return f", asked through the proxy of {parts.scheme.upper()}_PROXY (NO_PROXY={host} goes past it)"


def _is_true(content: bytes) -> bool:
    try:
        return json.loads(content) is True
    except ValueError:
        return False


class OwnServer(SubprocessASGIServer):
    """Prefect's server for the time of this process, with a port and a patience of its own.

    What it says on its standard error is shown with --debug; otherwise its end is said where it does not start.
    """

    def start(self, timeout: int | None = None) -> None:
        if self.running:
            return
        self.running = True
        try:
            with tempfile.TemporaryFile() as said:
                attempts = 1
                while not self._comes_up(said):
                    lines = _lines(said)
                    if attempts == _ATTEMPTS or not any("already in use" in line for line in lines):
                        raise UserError(_did_not_start(lines))
                    attempts += 1
        except BaseException:
            self.stop()
            raise
        atexit.register(self.stop)

    def _comes_up(self, said: IO[bytes]) -> bool:
        self.port = self.find_available_port()
        self.server_process = self._process(said)
        started, next_line = time.monotonic(), SECONDS_OF_SILENCE
        with httpx.Client(trust_env=False, timeout=_TIMEOUT) as client:
            while self.server_process.poll() is None:
                try:
                    if client.get(f"{self.api_url}/health").status_code == 200:
                        return self.server_process.poll() is None  # and not another's on this port
                except httpx.TransportError:
                    pass
                waited = time.monotonic() - started
                if waited > next_line:
                    logger.info(
                        "waiting for the Prefect server that this run starts for itself (%.0f s so far): the machine "
                        "may be busy; to use a running server, set PREFECT_API_URL",
                        waited,
                    )
                    next_line += SECONDS_BETWEEN_LINES
                time.sleep(0.1)
        return False

    def _process(self, said: IO[bytes]) -> subprocess.Popen[bytes]:
        """As Prefect starts it."""
        command = ["-m", "uvicorn", "--app-dir", str(prefect.__module_path__.parent), "--factory"]
        command += ["prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(self.port)]
        return subprocess.Popen(  # noqa: S603
            [sys.executable, *command, "--log-level", "error", "--lifespan", "on"],
            env={
                **os.environ,
                "PREFECT_UI_ENABLED": "0",
                "PREFECT__SERVER_EPHEMERAL": "1",
                "PREFECT__SERVER_FINAL": "1",
                **get_current_settings().to_environment_variables(exclude_unset=True),
            },
            stderr=None if logger.isEnabledFor(logging.DEBUG) else said,
        )


def _lines(said: IO[bytes]) -> list[str]:
    said.seek(0)
    return [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]


def _did_not_start(lines: list[str]) -> str:
    why = f" ({' '.join(lines[-1].split())[:300]})" if lines else ""
    home = get_current_settings().home
    return (
        f"the Prefect server that this run starts for itself ended at once{why}; see that {home} (PREFECT_HOME) can "
        f"be written and its database is intact, or set PREFECT_API_URL to a server that runs"
    )
