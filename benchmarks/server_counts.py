"""`prefect …` in this process, with every write, lock error and request of the server counted: for bench_server.py.

    python benchmarks/server_counts.py COUNTS.json server start --port 4200

The server is Prefect's own; only SQLAlchemy's events and the routes' handler are listened to. The file is written anew
every second:

    writes      statements that change a table by source: 'POST /logs/: log'; 'services: events' where no request asks
    commits     transactions that changed something
    locked      'database is locked' (or its like) by source, with SQLite's name of the error
    requests    by route: how many, how many of them failed (5xx), and the seconds that each took
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import fastapi.routing
import sqlalchemy as sa
from sqlalchemy.engine import Engine

_WRITE = re.compile(r"\s*(?:WITH\b.*?\b)?(INSERT INTO|UPDATE|DELETE FROM)\s+\"?(\w+)", re.IGNORECASE | re.DOTALL)
_SECONDS_BETWEEN = 1.0
_route: ContextVar[str] = ContextVar("route", default="services")


class Counts:
    """What the server has done since it began."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._writes: Counter[str] = Counter()
        self._locked: Counter[str] = Counter()
        self._commits = 0
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        self._failed: Counter[str] = Counter()

    def listen(self) -> None:
        sa.event.listen(Engine, "before_cursor_execute", self._on_statement)
        sa.event.listen(Engine, "handle_error", self._on_error)
        sa.event.listen(Engine, "commit", self._on_commit)
        original = fastapi.routing.APIRoute.handle
        counts = self

        async def handle(route: Any, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            name = f"{scope['method']} {route.path}"
            status, started, token = [500], time.monotonic(), _route.set(name)

            async def note(message: Any) -> None:
                if message["type"] == "http.response.start":
                    status[0] = message["status"]
                await send(message)

            try:
                await original(route, scope, receive, note)
            finally:
                _route.reset(token)
                counts.add_request(name, status[0], time.monotonic() - started)

        fastapi.routing.APIRoute.handle = handle  # type: ignore[method-assign]
        threading.Thread(target=self._keep, daemon=True).start()

    def add_request(self, name: str, status: int, seconds: float) -> None:
        with self._lock:
            self._seconds[name].append(round(seconds, 4))
            self._failed[name] += status >= 500

    def _on_statement(
        self, connection: Any, _cursor: Any, statement: str, _parameters: Any, _context: Any, _many: bool
    ) -> None:
        if found := _WRITE.match(statement):
            connection.info["wrote"] = True
            with self._lock:
                self._writes[f"{_route.get()}: {found[2]}"] += 1

    def _on_commit(self, connection: Any) -> None:
        if connection.info.pop("wrote", False):
            with self._lock:
                self._commits += 1

    def _on_error(self, context: Any) -> None:
        error = context.original_exception
        name = getattr(error, "sqlite_errorname", None) or getattr(
            getattr(error, "__cause__", None), "sqlite_errorname", None
        )
        if "locked" in str(error) or "deadlock" in str(error) or "could not serialize" in str(error):
            found = _WRITE.match(context.statement or "")
            what = found[2] if found else " ".join((context.statement or "").split()[:2])
            with self._lock:
                self._locked[f"{_route.get()}: {what} ({name or type(error).__name__})"] += 1

    def _keep(self) -> None:
        part = self._path.with_suffix(".part")
        while True:
            with self._lock:
                content = {
                    "writes": dict(self._writes),
                    "commits": self._commits,
                    "locked": dict(self._locked),
                    "requests": {
                        name: {"failed": self._failed[name], "seconds": seconds}
                        for name, seconds in self._seconds.items()
                    },
                }
                text = json.dumps(content)
            part.write_text(text, encoding="utf-8")
            part.replace(self._path)
            time.sleep(_SECONDS_BETWEEN)


def lock_at_once() -> None:
    """Every transaction that may write waits for the lock at its beginning: what Prefect does not do, and should."""
    from prefect.server.database.configurations import AioSqliteConfiguration

    original = AioSqliteConfiguration.begin_transaction

    def begin(configuration: Any, session: Any, with_for_update: bool = False) -> Any:
        return original(configuration, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin  # type: ignore[method-assign]


if __name__ == "__main__":
    if os.environ.get("DDK_BENCH_LOCK_AT_ONCE"):
        lock_at_once()
    Counts(Path(sys.argv[1])).listen()
    sys.argv[:] = ["prefect", *sys.argv[2:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
