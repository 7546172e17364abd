"""A PostgreSQL of one's own: a real one, started, stopped and started again."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from ddk.errors import UserError
from flows.operating import postgres
from flows.operating.postgres import Postgres

pytestmark = pytest.mark.skipif(not postgres.installed(), reason="there is no PostgreSQL: apt-get install postgresql")


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the user `postgres` can reach, where root runs the tests: pytest's are closed to others."""
    with tempfile.TemporaryDirectory(prefix="ddk-postgres-") as name:
        Path(name).chmod(0o711)
        yield Path(name) / "of o'mine"


def ask(server: Postgres, *statements: str) -> list[object]:
    async def all_of_them() -> list[object]:
        connection = await asyncpg.connect(server.url.replace("+asyncpg", ""))
        try:
            return [await connection.fetchval(statement) for statement in statements]
        finally:
            await connection.close()

    return asyncio.run(all_of_them())


def test_what_was_committed_is_there_after_a_restart(folder: Path) -> None:
    with postgres.running(folder) as url:
        server = Postgres(folder)
        assert url == server.url
        assert server.runs
        server.start()  # changes nothing
        found = ask(server, "CREATE TABLE run (name text)", "INSERT INTO run VALUES ('a')", "SHOW listen_addresses")
        assert found[-1] == "", "no port is opened"
        # Prefect's migrations need it.
        assert ask(server, "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_trgm'") == [1]
    assert not server.runs
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700, "nobody else reaches the socket"
    with postgres.running(folder):
        assert ask(server, "SELECT name FROM run") == ["a"]


def test_the_command_prints_what_to_export(folder: Path) -> None:
    def call(action: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.operating.postgres", action, str(folder)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    try:
        done = call("start")
        assert done.returncode == 0, done.stderr
        variable = "PREFECT_API_DATABASE_CONNECTION_URL"
        shell = f'{done.stdout}\nprintf %s "${variable}"'
        exported = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
        assert exported == Postgres(folder).url
    finally:
        assert call("stop").returncode == 0
    assert not Postgres(folder).runs


def test_a_folder_that_holds_something_else_is_left_alone(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    with pytest.raises(UserError, match="holds something else than PostgreSQL's data; choose another folder"):
        Postgres(folder).start()


def test_a_path_that_is_too_long_for_a_socket() -> None:
    with pytest.raises(UserError, match="choose a shorter folder"):
        Postgres(Path("/tmp") / ("a" * 90))


@pytest.mark.skipif(os.geteuid() != 0, reason="only for root it runs as another user")
def test_a_folder_that_its_user_cannot_reach() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ddk-postgres-") as closed,
        pytest.raises(UserError, match="the user postgres, as whom PostgreSQL runs for root, cannot reach"),
    ):
        Postgres(Path(closed) / "postgres").start()


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres.shutil, "which", lambda _name: None)
    monkeypatch.setattr(postgres.glob, "glob", lambda _pattern: [])
    assert not postgres.installed()
    with pytest.raises(UserError, match="not installed; as root: apt-get install postgresql"):
        Postgres(Path("/tmp/postgres"))
