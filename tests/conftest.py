"""What several packages' tests share."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import s3fs
import zarr.core.sync
from repository import REPOSITORY

from storage.files.s3 import S3

for module in ("deaths", "teacher_contract"):
    pytest.register_assert_rewrite(module)

# As the `ddk` command sets it for itself before Prefect is imported: its commands are called in this process too.
os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")

# A loaded machine takes its time over an example; that is no failure.
hypothesis.settings.register_profile("ddk", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("ddk")

MARKS = {
    "prefect_server": "server",
    "s3_server": "server",
    "server": "server",
    "small_run": "engine",
    "browser": "browser",
}
"""Of whoever takes a fixture. Others that start an engine, a server or a browser are marked by hand."""


gc.disable()  # until everything is imported: there is nothing to be found among modules


def pytest_collection_finish() -> None:
    gc.freeze()  # nor among those later on
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in MARKS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(MARKS[fixture])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server in a process of its own; the environment points at it. Yields the URL of an empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_it_answers(server, port)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "testing")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_CONFIG_FILE", os.devnull)
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            patch.setenv("NO_PROXY", "127.0.0.1")
            # Not what an earlier run of the tests left on this machine.
            patch.setenv("DDK_SHARD_CACHE_DIR", str(tmp_path_factory.mktemp("shards") / "cache"))
            _forget_file_systems()
            s3fs.S3FileSystem().mkdir("ddk-tests")
            yield "s3://ddk-tests"
            _close_the_sessions_of_zarr()
            _forget_file_systems()
    finally:
        server.kill()
        server.wait()


def _forget_file_systems() -> None:
    for kind in (s3fs.S3FileSystem, S3):
        kind.clear_instance_cache()


def _close_the_sessions_of_zarr() -> None:
    # s3fs closes those of its own event loop when they are let go of; these run in zarr's.
    for fs in (*s3fs.S3FileSystem._cache.values(), *S3._cache.values()):
        if fs.asynchronous and fs._s3 is not None:
            zarr.core.sync.sync(fs._s3creator.__aexit__(None, None, None))


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 180  # on a busy machine
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server ended at once, with exit code {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the S3 server did not answer within 180 s")


@pytest.fixture
def requests_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URLs that httpx's synchronous clients, Prefect's among them, ask from here on; each attempt is one."""
    made: list[str] = []
    send = httpx.Client.send

    def noted(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        made.append(str(request.url))
        return send(client, request, **options)

    monkeypatch.setattr(httpx.Client, "send", noted)
    return made


@pytest.fixture(scope="session")
def teacher_folder() -> str:
    """The quickstart's teacher: small, but a real model."""
    return str(REPOSITORY / "flows" / "presets" / "quickstart" / "teacher")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """A Prefect server of its own, with an empty database; flows called within it report to it. Yields its URL."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        # Where runs send heartbeats, each of them waits at its end for up to a second, and so does each run within it.
        silent = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with prefect_test_harness(server_startup_timeout=120), temporary_settings(silent):
            yield str(PREFECT_API_URL.value())
