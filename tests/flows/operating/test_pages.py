"""What a person sees, in a real browser: Prefect's UI while and after a worker distils, and the report's page.

One server, one deployment of everything, one run. DDK_SCREENSHOTS=docs/images keeps the pictures that docs/operating.md
shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import SCREENSHOTS, Visitor, open_browser
from playwright.sync_api import Browser
from repository import REPOSITORY
from small_run import ASSETS, DOMAINS, small_config, write_config

DEPLOYMENTS = ["cache-teacher", "distill", "pack-corpus", "rebalance", "report", "select-blocks", "train-student"]
STEPS, INTERVAL = 24, 6
pytestmark = pytest.mark.timeout(1500)  # one of them waits for the run
YAML = REPOSITORY / "prefect.yaml"


class Server:
    """A Prefect server as docs/operating.md starts it: with its UI, and with no calls to the outside."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(folder),
            "PREFECT_API_URL": f"{self.url}/api",
            "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),  # else it copies them into the installed package
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",  # two wait for each other where a machine has other work
        }
        self._log = folder / "log"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.start("server", "start", "--host", "127.0.0.1", "--port", str(port))
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self._processes[0].poll() is None, self.log()
            try:
                if httpx.get(f"{self.url}/api/health", timeout=5, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise AssertionError("the server did not answer within 120 s")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`prefect …`, until the server ends."""
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def log(self) -> str:
        """What all that was started has said, its end."""
        return self._log.read_text(errors="replace")[-10_000:]

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST where there is a body."""
        method = "GET" if body is None else "POST"
        answer = httpx.request(method, f"{self.url}/api/{path}", json=body, timeout=60, trust_env=False)
        answer.raise_for_status()
        return answer.json()

    def stop(self) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if process is self._processes[0] else signal.SIGKILL)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("prefect"))
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Distillation:
    """`distill` as a deployment, taken by a worker."""

    server: Server
    root: Path
    flow_run: str
    worker: subprocess.Popen[bytes]

    def wait(self) -> None:
        deadline = time.monotonic() + 500
        while (state := self.server.ask(f"flow_runs/{self.flow_run}")["state"])["type"] in (
            "SCHEDULED",
            "PENDING",
            "RUNNING",
        ):
            assert self.worker.poll() is None, self.server.log()
            assert time.monotonic() < deadline, state
            time.sleep(0.5)
        assert state["type"] == "COMPLETED", self.server.log()

    @cached_property
    def flow_runs(self) -> dict[str, Any]:
        """It and those that it called, by the names of their flows."""
        found = self.server.ask("flow_runs/filter", {})
        flows = {flow["id"]: flow["name"] for flow in self.server.ask("flows/filter", {})}
        return {flows[run["flow_id"]]: run for run in found}

    def artifacts(self, flow: str) -> dict[str, Any]:
        """Of one flow run, by key; of several versions the newest."""
        only = {"artifacts": {"flow_run_id": {"any_": [self.flow_runs[flow]["id"]]}}}
        found = self.server.ask("artifacts/filter", only)
        return {one["key"]: one for one in sorted(found, key=lambda one: one["created"])}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The stored mixture history."""
        return [json.loads(path.read_text()) for path in sorted((self.root / "runs/small/mixtures").iterdir())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of the run; its name is short and says nothing where it is to be seen in pictures."""
    if not SCREENSHOTS:
        yield tmp_path_factory.mktemp("distilled")
        return
    folder = Path("/tmp/ddk")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def started(server: Server, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    """By the commands of docs/operating.md. It goes on in the background."""
    for pool in ("cpu", "gpu"):
        server.ask("work_pools/", {"name": pool, "type": "process"})
    for model in ("teacher", "student"):
        (folder / model).symlink_to(ASSETS / model)
    config = write_config(
        folder,
        domains={name: {**domain, "max_train_blocks": 160} for name, domain in small_config()["domains"].items()},
        teacher={"model": "./teacher"},
        student={"model": "./student"},
        train={"steps": STEPS},
        mixture={"interval": INTERVAL},
    )
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copy(YAML, checkout)
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deploy", "--all"],
        cwd=checkout,
        env={**server.environment, "DDK_CONFIG": config},
        capture_output=True,
        check=False,  # the output belongs in the message
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    deployment = server.ask("deployments/name/distill/distill")["id"]
    run = server.ask(f"deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    worker = server.start("worker", "start", "--pool", "gpu", "--limit", "1")
    server.start("worker", "start", "--pool", "cpu")
    return Distillation(server, folder / "root", run["id"], worker)


@pytest.fixture(scope="module")
def distilled(started: Distillation) -> Distillation:
    started.wait()
    return started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def ui(browser: Browser, server: Server) -> Iterator[Visitor]:
    """A tab of its own for each test; whatever it opened, nothing may have been asked of another host."""
    visitor = Visitor(browser, server.url)
    yield visitor
    visitor.page.close()
    assert visitor.outside == []  # its graph throws errors of its own where one leaves it early; these are Prefect's


# While the worker is at work:


def test_every_stage_is_a_deployment(ui: Visitor, server: Server, started: Distillation) -> None:
    ui.open(f"{server.url}/deployments")
    for name in DEPLOYMENTS:
        ui.text(name)
    ui.text("9 Deployments")
    deadline = time.monotonic() + 60
    while ui.page.get_by_text("Not Ready", exact=True).count():
        assert time.monotonic() < deadline, "the workers have asked for work, and the page does not say so"
        ui.page.wait_for_timeout(1000)
        ui.open(f"{server.url}/deployments")
        ui.text("train-student")
    ui.shoot("deployments", 700)


def test_the_form_of_a_custom_run_is_filled_in_and_explained(
    ui: Visitor, server: Server, started: Distillation
) -> None:
    deployment = server.ask("deployments/name/distill/distill")["id"]
    page = ui.open(f"{server.url}/deployments/deployment/{deployment}/run")
    ui.text("Number of most probable tokens that are stored at every position.")
    values = page.locator("input, textarea").evaluate_all("fields => fields.map(field => field.value)")
    assert {"small", str(started.root), str(STEPS), str(INTERVAL)} <= set(values)
    ui.shoot("custom-run")


# When it is done:


def test_a_run_is_named_and_so_are_its_tasks(ui: Visitor, distilled: Distillation) -> None:
    steps = range(0, STEPS + 1, INTERVAL)
    expected = {
        "pack-corpus": [f"pack {domain}" for domain in DOMAINS],
        "cache-teacher": [f"cache {domain}" for domain in DOMAINS],
        "train-student": [
            *(f"gap at step {step}" for step in steps),
            *(f"mixture at step {step}" for step in steps),
            *(f"train steps from {step}" for step in steps[:-1]),
            *("save student small", "report small"),
        ],
    }
    for flow, names in expected.items():
        page = ui.open(f"{distilled.server.url}/runs/flow-run/{distilled.flow_runs[flow]['id']}")
        ui.text("Task Runs").click()
        for name in names:
            ui.text(name)
        assert f"{len(names)} Task runs" in page.inner_text("body")
    ui.text("train small")
    ui.shoot("run", 900)
    ui.open(f"{distilled.server.url}/runs/flow-run/{distilled.flow_run}")
    ui.text("distill small")


def test_the_gap_by_domain_is_a_table_for_each_measurement(ui: Visitor, distilled: Distillation) -> None:
    history = distilled.history
    assert [record["step"] for record in history] == list(range(0, STEPS + 1, INTERVAL))
    page = ui.open(f"{distilled.server.url}/artifacts/key/ddk-root-small-gap")
    links = page.locator("a[href*='/artifacts/artifact/']")
    links.first.wait_for()
    addresses = sorted(set(links.evaluate_all("links => links.map(link => link.href)")))
    assert len(addresses) == len(history)
    newest = distilled.artifacts("train-student")["ddk-root-small-gap"]["id"]
    seen = 0
    for address in sorted(addresses, key=lambda address: address.endswith(newest)):
        ui.open(address)
        headings, *rows = ui.rows()
        assert headings[:4] == ["domain", "student ppl", "teacher ppl", "ratio"]
        step = int(re.search(r"step (\d+), ", page.inner_text("body"))[1])  # type: ignore[index]
        assert {row[0]: row[1:4] + row[5:6] for row in rows} == {
            domain: [
                f"{both['student']:,.2f}",
                f"{both['teacher']:,.2f}",
                f"{both['student'] / both['teacher']:.3f}",
                f"{history[step // INTERVAL]['probabilities'][domain]:.4f}",
            ]
            for domain, both in history[step // INTERVAL]["perplexities"].items()
        }
        seen += step
    assert seen == sum(record["step"] for record in history), "each measurement once"
    ui.shoot("gap", 480)


@pytest.mark.parametrize("flow", ["distill", "train-student"])
def test_the_run_s_page_has_its_report_with_both_plots(ui: Visitor, distilled: Distillation, flow: str) -> None:
    page = ui.open(f"{distilled.server.url}/runs/flow-run/{distilled.flow_runs[flow]['id']}")
    ui.text("Artifacts").click()
    ui.text("ddk-root-small-training")
    ui.text("ddk-root-small-now")
    if flow == "distill":
        ui.shoot("artifacts", 1170, top=500, left=250)
    ui.text("ddk-root-small-report").click()
    page.wait_for_url("**/artifacts/artifact/**")
    _, *rows = ui.rows()
    first, last = distilled.history[0]["perplexities"], distilled.history[-1]["perplexities"]
    assert {row[0] for row in rows} == set(DOMAINS)
    for domain, teacher, before, after, *_ in rows:
        assert [float(text.replace(",", "")) for text in (teacher, before, after)] == [
            pytest.approx(last[domain]["teacher"], abs=0.006),
            pytest.approx(first[domain]["student"], abs=0.006),
            pytest.approx(last[domain]["student"], abs=0.006),
        ]
    drawn = page.locator("img[src^='data:image/png']")
    assert drawn.count() == 2
    assert min(drawn.evaluate_all("images => images.map(image => image.naturalWidth)")) > 500
    assert min(drawn.evaluate_all("images => images.map(image => image.getBoundingClientRect().width)")) > 500
    for place in ("runs/small/report/index.html", "runs/small", *distilled.root.glob("targets/*/*.zarr")):
        ui.text(str(distilled.root / place))
    ui.shoot("report-artifact", 1250)


def test_where_the_run_stands_is_on_one_page(ui: Visitor, distilled: Distillation) -> None:
    address = f"{distilled.server.url}/artifacts/artifact/"
    page = ui.open(address + distilled.artifacts("distill")["ddk-root-small-now"]["id"])
    ui.text("✓ pack → ✓ cache → ✓ train")
    ui.text(f"Step {STEPS} of {STEPS}")
    _, *rows = ui.rows()
    newest = distilled.history[-1]
    assert {row[0]: row[1] for row in rows[: len(DOMAINS)]} == {
        domain: f"{100 * p:.1f}\N{NO-BREAK SPACE}%" for domain, p in newest["probabilities"].items()
    }
    assert page.get_by_text(str(distilled.root / "runs/small/report")).count() >= 1
    ui.shoot("now", 480)


def test_progress_of_capture_and_training(ui: Visitor, distilled: Distillation) -> None:
    done = distilled.artifacts("distill")
    # The first domain waits for the engine; the others may be done in a glance, and then leave none.
    page = ui.open(f"{distilled.server.url}/artifacts/artifact/{done['ddk-root-capture-code']['id']}")
    ui.text("Progress: 100%")
    assert re.search(r"166 of 166 blocks \(15,936 positions\), in [\d.]+ .*, [\d,]+ tokens/s", page.inner_text("body"))
    ui.open(f"{distilled.server.url}/artifacts/artifact/{done['ddk-root-small-training']['id']}")
    ui.text("Progress: 100%")
    said = page.inner_text("body")
    assert re.search(
        rf"{STEPS} of {STEPS} steps, [\d,]+ tokens/s, [\d.]+% of the time waiting for data, ce [\d.]+, kl", said
    )
    ui.shoot("progress", 300)


def test_what_is_kept_of_the_teacher(ui: Visitor, distilled: Distillation) -> None:
    (key,) = [key for key in distilled.artifacts("cache-teacher") if key.endswith("-targets")]
    ui.open(f"{distilled.server.url}/artifacts/artifact/{distilled.artifacts('distill')[key]['id']}")
    headings, *rows = ui.rows()
    table = {row[0]: dict(zip(headings, row, strict=True)) for row in rows}
    assert set(table) == set(DOMAINS)
    for domain, row in table.items():
        store = distilled.root / row["store"]
        assert store.name == f"{domain}.zarr"
        manifest = json.loads((store / "manifest.json").read_text())
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        positions = sum(shard["blocks"] for shard in shards) * 96
        tail = sum(shard["facts"]["tail_mass_sum"] for shard in shards)
        stored = sum(path.stat().st_size for path in store.glob("*/*/c/**/*") if path.is_file())
        assert row["retained mass"].replace("\xa0", " ") == f"{100 - 100 * tail / positions:.2f} %"
        assert row["positions"] == f"{positions:,}"
        assert row["shards"] == str(len(shards))
        assert row["bytes a position"] == f"{stored / positions:.1f}"
        assert row["teacher ppl"] == f"{distilled.history[0]['perplexities'][domain]['teacher']:,.2f}"
    ui.shoot("targets", 480)


def test_the_log_is_read_by_people(ui: Visitor, distilled: Distillation) -> None:
    logs = distilled.server.ask("logs/filter", {"limit": 200})
    assert len(logs) < 120
    for log in logs:
        assert not re.search(r"[\r█▏━╸│]|\d%\||it/s", log["message"]), log
        assert len(log["message"]) < 250, log
        assert log["level"] < 40, log
    ours = [log["message"] for log in logs if log["name"] == "ddk"]
    for beginning in (
        "pack code: 160 train",
        "cache math: 21 of 21 shards",
        f"gap at step {STEPS}: largest",
        "report: ",
    ):
        assert [line for line in ours if line.startswith(beginning)], f"'{beginning}…' is not in the log"
    ui.open(f"{distilled.server.url}/runs/flow-run/{distilled.flow_runs['train-student']['id']}")
    ui.page.get_by_text(f"gap at step {STEPS}: largest ratio").wait_for()


def test_the_report_s_page_stands_alone(browser: Browser, distilled: Distillation) -> None:
    address = (distilled.root / "runs/small/report/index.html").as_uri()
    visitor = Visitor(browser, address)
    visitor.open(address)
    _, *rows = visitor.rows()
    assert {row[0].split()[0]: row[1] for row in rows} == {
        domain: f"{both['teacher']:,.2f}" for domain, both in distilled.history[-1]["perplexities"].items()
    }
    widths = visitor.widths_of_images()
    assert len(widths) == 8, "two plots, wide and narrow, light and dark"
    assert min(widths) > 400
    shown = visitor.page.locator("img:visible")
    assert shown.count() == 2
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 1200, "nothing hangs out at the right"
    visitor.shoot("report", 1150)
    visitor.page.close()
    assert visitor.outside == []
    assert visitor.errors == []
