"""A Prefect server and process workers as an operator has them: real processes, to be killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from repository import REPOSITORY

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    # A server that is started anew knows who holds which slot.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # Seconds instead of half minutes, here where a person would not mind to wait.
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
}

ASKING = 0.5
"""Seconds between two questions to a server, which has little time for its runs when it is asked without a pause."""


class Site:
    """Everything lies below one folder; nothing outlives the `with`.

    Args:
        folder: for Prefect's database and the processes' logs.
        api_url: of a server that runs already; without one it starts its own.
        database_url: of that server's database; without one it has a SQLite below the folder.
    """

    def __init__(self, folder: Path, api_url: str | None = None, database_url: str | None = None) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._starts_server = api_url is None
        self._of_server = {"PREFECT_API_DATABASE_CONNECTION_URL": database_url} if database_url else {}
        self.api_url = api_url or f"http://127.0.0.1:{self._port}/api"
        python_path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {
            **os.environ,
            **QUIET,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.api_url,
            "PYTHONPATH": python_path,
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Site:
        if self._starts_server:
            self.start_server()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()
        for name in list(self._processes):
            self.kill(name, whole_tree=True)

    @cached_property
    def client(self) -> SyncPrefectClient:
        # Not `get_client`: where the environment names no server, that one starts its own.
        return self._stack.enter_context(SyncPrefectClient(self.api_url))

    def start_server(self, timeout: float = 90) -> None:
        self._start("server", "server", "start", "--host", "127.0.0.1", "--port", str(self._port))
        self.wait_until(self._answers, "the server answers", timeout, every=0.2)

    def start_worker(self, name: str, pool: str) -> None:
        self._start(name, "worker", "start", "--pool", pool, "--name", name, "--limit", "1", "--type", "process")

    def kill(self, name: str, *, whole_tree: bool = False) -> list[psutil.Process]:
        """kill -9 of the process; with `whole_tree` of what it started too.

        Returns:
            What it had started.
        """
        below = self.below(name)
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for one in below if whole_tree else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        return below

    def prefect(self, *arguments: str, cwd: Path = REPOSITORY, **environment: str) -> str:
        """A `prefect` command, to its end; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            check=False,  # the output belongs in the message
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"prefect {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def deploy(self, config: str, root: str) -> None:
        """Both pools, and all deployments of prefect.yaml."""
        for pool in ("cpu", "gpu"):
            self.prefect("work-pool", "create", pool, "--type", "process", "--overwrite")
        self.prefect("deploy", "--all", DDK_CONFIG=config, DDK_ROOT=root)

    def run_of(self, run: UUID) -> FlowRun:
        return self.client.read_flow_run(run)

    def start(self, name: str, **parameters: Any) -> UUID:
        """A run of the deployment `name/name`, as the UI's button starts it."""
        deployment = self.client.read_deployment_by_name(f"{name}/{name}")
        return self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id

    @property
    def workers(self) -> list[str]:
        return [name for name in self._processes if name != "server"]

    def below(self, name: str) -> list[psutil.Process]:
        """What a process has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._processes[name].pid).children(recursive=True)
        return []

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.folder.glob("*.log"))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float, every: float = 0.05) -> Any:
        """Returns what the condition gave, once it is truthy.

        Args:
            every: seconds between two looks. Where a look asks the server, `ASKING`.
        """
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended with {process.returncode}:\n{self.log(name)[-5000:]}"
            assert time.monotonic() < deadline, f"not within {timeout:.0f} s: {what}"
            time.sleep(every)
        return found

    def _start(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                cwd=self.folder,
                env=self.environment | (self._of_server if name == "server" else {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.api_url}/health", timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False
