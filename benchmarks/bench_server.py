"""How calm Prefect's server is with two workers and one user: `make bench-server`.

A real `prefect server` with a database of its own, two real workers (process pools), which run what `distill` tells
Prefect (server_load.py) without a pause, the automation of `ddk automations`, and a user who opens a page of the UI
every second: the requests that the page makes, six at a time, as a browser does. Counted are (server_counts.py, inside
the server) 'database is locked', writes by source, requests and their seconds, and what the user waits for a page.

The databases and settings are measured in turns, so that what else the machine does hits all of them:

    one worker  Prefect's SQLite and settings, and one worker instead of two
    default     Prefect's SQLite and settings, with what `prefect.yaml` gives to the runs
    settings    the same with the settings of docs/server.md
    lock at once    the same, and a transaction that may write waits for the lock at its beginning: nothing that a user
                could set, but what shows where the errors come from
    postgres    PostgreSQL, with the settings of docs/server.md

    python benchmarks/bench_server.py --only default --seconds 60 --keep /tmp/counts     # one, and look at its sources
    python benchmarks/bench_server.py --tree before=/path/to/another/checkout            # an earlier version beside it

A tree's load is run with the code of that checkout, on Prefect's SQLite and settings.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import yaml
from harness import Row, publish, row

from flows.operating import postgres

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
SETTINGS = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""What docs/server.md gives a server: task runs are written once a second, and not each state by itself."""
SECONDS_BETWEEN_PAGES = 1.0
SECONDS_TO_WAIT = 30.0
"""For a page; after that the user has gone."""
QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "NO_PROXY": "127.0.0.1,localhost"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is measured.

    Args:
        settings: of the server.
        tree: the checkout whose code the flow runs use.
        workers: how many there are.
    """

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    postgres: bool = False
    tree: Path = REPOSITORY
    workers: int = 2


@dataclass(slots=True, kw_only=True)
class Found:
    """What one measurement gave."""

    locked: int
    lines: int
    failed: int
    writes: int
    commits: int
    runs: int
    pages: list[float]
    broken: int
    requests: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="each variant is measured so many times (%(default)s)")
    parser.add_argument("--only", nargs="*", help="variants to measure; nothing is published")
    parser.add_argument("--tree", nargs="*", default=[], metavar="NAME=PATH", help="checkouts to measure beside")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="a setting more, of every server")
    parser.add_argument("--keep", type=Path, help="folder for the server's counts and logs")
    given = parser.parse_args()
    variants = [
        *(Variant(name=name, tree=Path(path)) for name, _, path in (one.partition("=") for one in given.tree)),
        Variant(name="one worker", workers=1),
        Variant(name="default"),
        Variant(name="settings", settings=SETTINGS),
        Variant(name="lock at once", settings={**SETTINGS, "DDK_BENCH_LOCK_AT_ONCE": "1"}),
        Variant(name="postgres", settings=SETTINGS, postgres=True),
    ]
    variants = [one for one in variants if not given.only or one.name in given.only]
    more = dict(one.split("=", 1) for one in given.set)
    found: dict[str, list[Found]] = {one.name: [] for one in variants}
    for _ in range(given.rounds):
        for variant in variants:
            one = measure(variant, given.seconds, more, given.keep)
            found[variant.name].append(one)
            print(f"{variant.name}: {summary(one)}", flush=True)
    if given.only:
        return 0
    rows = [one for name, results in found.items() for one in rows_of(name, results, given.seconds)]
    trees = f" ARGS='--tree {' '.join(one.partition('=')[0] + '=…' for one in given.tree)}'" if given.tree else ""
    return 0 if publish("server", f"make bench-server{trees}", rows) else 1


def summary(found: Found) -> str:
    waits = sorted(found.pages)
    return (
        f"{found.locked} lock errors ({found.lines} lines), {found.failed} requests refused, {found.runs} runs, "
        f"{found.writes} writes in {found.commits} transactions; pages {median(waits):.2f} s, p99 {p99(waits):.2f} s, "
        f"{found.broken} of {len(waits)} broken; requests {median(found.requests):.3f} s, "
        f"p99 {p99(found.requests):.3f} s"
    )


def rows_of(name: str, found: list[Found], seconds: float) -> list[Row]:
    minutes = seconds / 60
    none = 0.01 if name == "postgres" else None
    return [
        row(f"{name}: lock errors", [one.locked / minutes for one in found], "a minute", none),
        row(f"{name}: requests refused (5xx)", [one.failed / minutes for one in found], "a minute", none),
        row(f"{name}: writes", [one.writes / minutes for one in found], "a minute"),
        row(f"{name}: transactions that write", [one.commits / minutes for one in found], "a minute"),
        row(f"{name}: a page of the UI, median", [median(one.pages) for one in found], "s"),
        row(f"{name}: a page of the UI, 99th percentile", [p99(one.pages) for one in found], "s"),
        row(f"{name}: pages with a refused request", [100 * one.broken / len(one.pages) for one in found], "%"),
    ]


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


def measure(variant: Variant, seconds: float, more: Mapping[str, str], keep: Path | None) -> Found:
    """One server, from its start to its end; what is counted begins when every worker runs something."""
    with tempfile.TemporaryDirectory(prefix="ddk-bench-server-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        settings = {**variant.settings, **more}
        if variant.postgres:
            folder.chmod(0o711)  # where root calls this, PostgreSQL runs as another user
            settings["PREFECT_API_DATABASE_CONNECTION_URL"] = stack.enter_context(postgres.running(folder / "postgres"))
        site = stack.enter_context(Site(folder, settings, variant.tree, variant.workers))
        site.begin()
        before, lines = site.counts(), site.locked_lines()
        user = User(site.api)
        user.visit(seconds)
        after, lines = site.counts(), site.locked_lines() - lines
        runs = site.completed()
        if keep is not None:
            kept = keep / f"{variant.name}-{time.time():.0f}"
            kept.mkdir(parents=True)
            (kept / "counts.json").write_text(json.dumps(difference(before, after), indent=1))
            for log in folder.glob("*.log"):
                shutil.copy(log, kept)
        change = difference(before, after)
        return Found(
            locked=sum(change["locked"].values()),
            lines=lines,
            failed=sum(one["failed"] for one in change["requests"].values()),
            writes=sum(change["writes"].values()),
            commits=change["commits"],
            runs=runs,
            pages=user.pages,
            broken=user.broken,
            requests=[second for one in change["requests"].values() for second in one["seconds"]],
        )


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What was counted in between."""
    requests = {}
    for name, one in after["requests"].items():
        old = before["requests"].get(name, {"failed": 0, "seconds": []})
        requests[name] = {
            "failed": one["failed"] - old["failed"],
            "seconds": one["seconds"][len(old["seconds"]) :],
        }
    return {
        "writes": dict((Counter(after["writes"]) - Counter(before["writes"])).most_common()),
        "locked": dict((Counter(after["locked"]) - Counter(before["locked"])).most_common()),
        "commits": after["commits"] - before["commits"],
        "requests": requests,
    }


class Site:
    """Server, workers and runs."""

    def __init__(self, folder: Path, settings: Mapping[str, str], tree: Path, workers: int) -> None:
        self._workers = workers
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.api = f"http://127.0.0.1:{self._port}/api"
        self._environment = {
            **os.environ,
            **QUIET,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "TMPDIR": str(folder),  # runs are killed at the end, and clean nothing up
            "PYTHONPATH": os.pathsep.join([str(tree), str(HERE)]),
        }
        self._server_environment = {**self._environment, **settings}
        self._job_environment = yaml.safe_load((tree / "prefect.yaml").read_text())["definitions"]["pools"]["cpu"][
            "job_variables"
        ]["env"]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()
        self._feeder = threading.Thread(target=self._feed, daemon=True)
        self._client = httpx.Client(base_url=self.api, timeout=120, trust_env=False)
        self._deployment = ""
        self._made = 0

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        if self._feeder.ident is not None:
            self._feeder.join()
        self._client.close()
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def begin(self) -> None:
        counts = [str(HERE / "server_counts.py"), str(self._folder / "counts.json")]
        server = ["server", "start", "--host", "127.0.0.1", "--port", str(self._port)]
        self._start("server", [*counts, *server], self._server_environment)
        self._wait(self._answers, "the server answers")
        self._call("-m", "prefect", "--no-prompt", "work-pool", "create", "load", "--type", "process")
        self._call("-m", "flows", "automations")
        self._deploy()
        self._feeder.start()
        for number in range(self._workers):
            worker = [
                "-m",
                "prefect",
                "worker",
                "start",
                "--pool",
                "load",
                "--limit",
                "1",
                "--name",
                f"worker-{number}",
            ]
            self._start(f"worker-{number}", worker, self._environment)
        self._wait(lambda: self._count("RUNNING") >= self._workers, "every worker runs something")

    def counts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._folder / "counts.json").read_text(encoding="utf-8"))
        return found

    def locked_lines(self) -> int:
        return (self._folder / "server.log").read_text(errors="replace").count("database is locked")

    def completed(self) -> int:
        return self._count("COMPLETED")

    def _deploy(self) -> None:
        flow = self._ask("flows/", {"name": "distill"})
        body = {
            "name": "load",
            "flow_id": flow["id"],
            "work_pool_name": "load",
            "entrypoint": "server_load.distill",
            "job_variables": {"env": self._job_environment},
            "pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": str(HERE)}}],
        }
        self._deployment = self._ask("deployments/", body)["id"]

    def _feed(self) -> None:
        """A run more as soon as a worker has nothing before it."""
        while not self._over.wait(1.0):
            with contextlib.suppress(httpx.HTTPError):
                if self._count("SCHEDULED", "PENDING") < 1:
                    self._made += 1
                    body = {"parameters": {"run": f"load-{self._made}"}}
                    self._ask(f"deployments/{self._deployment}/create_flow_run", body)

    def _count(self, *states: str) -> int:
        body = {"flow_runs": {"state": {"type": {"any_": list(states)}}, "deployment_id": {"any_": [self._deployment]}}}
        return int(self._ask("flow_runs/count", body))

    def _ask(self, path: str, body: Any) -> Any:
        answer = self._client.post(f"{self.api}/{path}", json=body)
        answer.raise_for_status()
        return answer.json()

    def _call(self, *arguments: str) -> None:
        done = subprocess.run([sys.executable, *arguments], env=self._environment, capture_output=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{arguments}: {done.stderr.decode()}")

    def _start(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        with open(self._folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _answers(self) -> bool:
        try:
            return self._client.get(f"{self.api}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            for process in self._processes:
                if process.poll() is not None:
                    raise RuntimeError((self._folder / "server.log").read_text()[-3000:])
            if time.monotonic() > deadline:
                raise TimeoutError(what)
            time.sleep(0.2)


class User:
    """Opens one page of the UI after the other: dashboard, a run, its artifacts, deployments, events."""

    def __init__(self, api: str) -> None:
        self._api = api
        self.pages: list[float] = []
        """Seconds until a page had all its answers."""
        self.broken = 0
        """Pages of which a request was refused (5xx), or not answered in half a minute."""

    def visit(self, seconds: float) -> None:
        asyncio.run(self._visit(seconds))

    async def _visit(self, seconds: float) -> None:
        limits = httpx.Limits(max_connections=6)  # as a browser has it
        until = time.monotonic() + seconds
        timeout = httpx.Timeout(SECONDS_TO_WAIT)
        async with httpx.AsyncClient(base_url=self._api, limits=limits, timeout=timeout, trust_env=False) as client:
            while time.monotonic() < until:
                for page in (dashboard, run_page, artifacts_page, deployments_page, events_page):
                    run = await newest_run(client)
                    started = time.monotonic()
                    done = await asyncio.gather(*(self._get(client, *one) for one in page(run)))
                    self.pages.append(time.monotonic() - started)
                    self.broken += not all(done)
                    await asyncio.sleep(SECONDS_BETWEEN_PAGES)

    @staticmethod
    async def _get(client: httpx.AsyncClient, path: str, body: Any = None) -> bool:
        try:
            answer = await (client.get(path) if body is None else client.post(path, json=body))
            if answer.is_client_error:  # not what the UI asks, and so a mistake of this file
                raise ValueError(f"{path}: {answer.text}")
            return answer.is_success
        except httpx.HTTPError:
            return False


async def newest_run(client: httpx.AsyncClient) -> str:
    """Which the user looks at. Before `begin` returns there is one."""
    while True:
        with contextlib.suppress(httpx.HTTPError, ValueError, LookupError, TypeError):
            started = {"state": {"type": {"any_": ["RUNNING", "COMPLETED"]}}}
            body = {"limit": 1, "sort": "START_TIME_DESC", "flow_runs": started}
            return str((await client.post("flow_runs/filter", json=body)).json()[0]["id"])
        await asyncio.sleep(0.2)


Requests = list[tuple[str, Any]]


def _since(hours: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 3600 * hours))


def dashboard(_run: str) -> Requests:
    day = {"flow_runs": {"start_time": {"after_": _since(24)}}}
    states = ("FAILED", "RUNNING", "COMPLETED", "SCHEDULED", "CANCELLED")
    history = {"history_start": _since(24), "history_end": _since(0), "history_interval_seconds": 3600}
    return [
        ("flow_runs/filter", {**day, "limit": 200, "sort": "START_TIME_DESC"}),
        *(("flow_runs/count", {"flow_runs": {"state": {"type": {"any_": [state]}}}}) for state in states),
        ("flow_runs/history", history),
        ("task_runs/count", {"task_runs": {"start_time": {"after_": _since(24)}}}),
        ("ui/task_runs/dashboard/counts", {"task_runs": {"start_time": {"after_": _since(24)}}}),
        ("work_pools/filter", {}),
        ("work_pools/load/workers/filter", {}),
        ("work_queues/filter", {}),
    ]


def run_page(run: str) -> Requests:
    of_run = {"flow_runs": {"id": {"any_": [run]}}}
    return [
        (f"flow_runs/{run}", None),
        (f"flow_runs/{run}/graph-v2", None),
        ("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200}),
        ("task_runs/filter", {**of_run, "limit": 200}),
        ("task_runs/count", of_run),
        ("flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}),
        ("flow_runs/count", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}),
        ("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}}),
        ("flows/filter", {}),
        ("deployments/filter", {}),
    ]


def artifacts_page(run: str) -> Requests:
    return [
        ("artifacts/latest/filter", {"limit": 200}),
        ("artifacts/latest/count", {}),
        ("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}}),
    ]


def deployments_page(_run: str) -> Requests:
    return [
        ("deployments/paginate", {"limit": 100}),
        ("deployments/count", {}),
        ("flow_runs/filter", {"limit": 50, "sort": "EXPECTED_START_TIME_DESC"}),
        ("flows/paginate", {"limit": 50}),
        ("work_pools/filter", {}),
        ("automations/filter", {}),
    ]


def events_page(_run: str) -> Requests:
    filtered = {"filter": {"occurred": {"since": _since(24), "until": _since(0)}}}
    return [
        ("events/filter", {**filtered, "limit": 50}),
        ("events/count-by/time", {**filtered, "time_unit": "hour", "time_interval": 1}),
    ]


if __name__ == "__main__":
    sys.exit(main())
