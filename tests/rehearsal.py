"""The rehearsal: what weeks in the cloud bring, in minutes. `make rehearsal` runs it, and CI does.

A real server on PostgreSQL (on SQLite where that is not installed), two workers on one GPU pool, every stage deployed,
the quickstart's models and corpora, and

1  `distill` runs by its schedule; two workers capture the teacher together
2  kill -9 of the worker that helps, and of its flow, in the middle of the capture: the other one finishes
3  kill -9 of the server while the student trains, and a new server
4  kill -9 of the worker that trains, and of its flow: Retry through the API that the UI calls, on a new worker
5  one domain's data change: only its blocks and targets are made again

What is asserted is read from the stores, not from Prefect: nothing committed was written again, and every byte of
blocks, targets, mixtures, checkpoints and the final student is that of an uninterrupted `ddk distill`. On PostgreSQL
the server's log may have no error of a lock.
"""

from __future__ import annotations

import datetime
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from uuid import UUID

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent / "support"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, where `flows` are the tests of flows

from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import AwaitingRetry, Crashed
from repository import REPOSITORY
from site_of_operation import ASKING, Site
from small_run import files_below

from flows.operating import postgres

PRESETS = REPOSITORY / "flows" / "presets"
PATIENCE = 600.0
"""Seconds, on a machine that does other things too; on two idle cores no step takes 150."""
SECONDS_TO_END = 30.0
"""In which an engine must be gone once its front end was killed."""


class Rehearsal:
    """One after the other; each step prints what it found, and how long it took."""

    def __init__(self, folder: Path, site: Site) -> None:
        self.site = site
        self.began = time.monotonic()
        self.root = folder / "root"
        self.run = self.root / "runs" / "quickstart"
        self.reference = folder / "reference"
        shutil.copytree(PRESETS / "quickstart", folder / "quickstart")
        self.corpora = folder / "quickstart" / "corpora"
        sections = yaml.safe_load((PRESETS / "quickstart.yaml").read_text())
        sections["teacher"]["workers"] = 2
        sections["teacher"]["shard_blocks"] = 16
        self.config = str(folder / "config.yaml")
        Path(self.config).write_text(yaml.safe_dump(sections))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f} s  {text}", flush=True)

    def uninterrupted(self) -> None:
        command = [sys.executable, "-m", "flows", "distill", self.config, "--root", str(self.reference)]
        environment = {name: value for name, value in self.site.environment.items() if name != "PREFECT_API_URL"}
        environment["PREFECT_HOME"] = str(self.reference.parent / "alone")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.say("uninterrupted `ddk distill`, to compare with")

    def begin_by_schedule(self) -> UUID:
        self.site.deploy(self.config, str(self.root))
        for number in (1, 2):
            self.site.start_worker(f"gpu-{number}", "gpu")
        self.say("server, two workers, all deployments")
        client = self.site.client
        deployment = client.read_deployment_by_name("distill/distill")
        soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5)
        schedule = IntervalSchedule(interval=datetime.timedelta(days=1), anchor_date=soon)
        client.create_deployment_schedules(deployment.id, [(schedule, True)])
        run = self.wait(lambda: self._running("distill"), "distill runs by its schedule", PATIENCE, ASKING)
        self.say("`distill` was started by its schedule")
        return run

    def kill_in_capture(self) -> dict[str, int]:
        """Returns the objects of shards that were committed at the kill, with their times of writing."""
        self.wait(lambda: self._running("cache-teacher", part=2), "a second run captures", PATIENCE, ASKING)
        helper = self._worker_of(part=2)
        self.wait(lambda: self._owners() >= 2 and len(self._commits()) >= 8, "both capture", PATIENCE)
        committed = self._commits()
        written = {str(path): path.stat().st_mtime_ns for path in self._objects(committed)}
        started = self.site.kill(helper)
        flow = next(process for process in started if _is_flow(process))
        flow.send_signal(signal.SIGKILL)
        self._gone(started)
        self.say(f"kill -9 of {helper} and its flow after {len(committed)} shards; no process of theirs is left")
        return written

    def kill_the_server(self, run: UUID) -> None:
        self.wait(lambda: self._step() > 0, "the first checkpoint", PATIENCE)
        self.site.kill("server", whole_tree=True)
        time.sleep(3)
        before = self._step()
        self.site.start_server()
        self.say(f"kill -9 of the server at step {before} of the training, and a new server")
        self.wait(lambda: self._step() > before or self._final(run), "the training goes on", PATIENCE, ASKING)
        if self._final(run):
            # Prefect ends a run whose concurrency slot it could not renew, so that no two share one.
            self._retry(run)
            self.wait(lambda: self._step() > before, "the training goes on", PATIENCE)
            self.say("the run had ended with the server; after Retry it goes on")
        else:
            self.say("the run went on meanwhile")

    def kill_in_training(self) -> None:
        before = self._step()
        self.wait(lambda: self._step() > before, "a further checkpoint", PATIENCE)
        trainer = next(name for name in self.site.workers if self._flows_below(name))
        started = self.site.kill(trainer)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._gone(started)
        assert not (self.run / "summary.json").exists(), "killed in the middle of the training"
        self.say(f"kill -9 of {trainer} and its flow at step {self._step()}")
        self.site.start_worker("gpu-3", "gpu")

    def retry(self, run: UUID) -> None:
        """What the UI's buttons do: the run, whose death nobody could report, is set to Crashed, then retried."""
        if not self._final(run):
            self.site.client.set_flow_run_state(run, Crashed(message="its worker was killed"), force=True)
        self._retry(run)
        self.ended(run, PATIENCE)
        self.say("Retry: the same run went on at its newest checkpoint, and completed")

    def _retry(self, run: UUID) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self.site.client.set_flow_run_state(run, AwaitingRetry(scheduled_time=now), force=True)

    def _final(self, run: UUID) -> bool:
        state = self.site.client.read_flow_run(run).state
        return state is not None and state.is_final()

    def ended(self, run: UUID, timeout: float) -> None:
        self.wait(lambda: self._final(run), "the run ends", timeout, ASKING)
        state = self.site.client.read_flow_run(run).state
        assert state is not None
        assert state.type == StateType.COMPLETED, f"{state}\n{self.site.logs()[-8000:]}"

    def compare(self, written: dict[str, int]) -> None:
        rewritten = [path for path, time_ns in written.items() if Path(path).stat().st_mtime_ns != time_ns]
        assert rewritten == [], "a committed shard is never captured again"
        compared = 0
        for part in (
            "blocks",
            "targets",
            *(f"runs/quickstart/{part}" for part in ("mixtures", "checkpoints", "student")),
        ):
            ours, theirs = (_bytes(root / part) for root in (self.root, self.reference))
            assert ours.keys() == theirs.keys(), part
            assert [name for name in ours if ours[name] != theirs[name]] == [], part
            compared += len(ours)
        self.say(
            f"{len(written)} objects of before the kills untouched; {compared} files equal, the student among them"
        )

    def change_one_domain(self) -> None:
        path = self.corpora / "math" / "train.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
        document = json.loads(lines[0])
        document["text"] = "One document more. " + document["text"]
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines([json.dumps(document) + "\n", *lines])
        before = _times(self.root)
        train = self.site.client.read_deployment_by_name("distill/distill").parameters["train"]
        self.ended(self.site.start("distill", run="changed", train={**train, "steps": 30}), PATIENCE)
        after = _times(self.root)
        changed = [path for path, time_ns in before.items() if after.get(path) != time_ns]
        assert changed == [], "stores of the other domains, and the old ones of this, stay as they are"
        new = {tuple(Path(path).parts[:3:2]) for path in after.keys() - before.keys()}
        assert new == {("blocks", "math.zarr"), ("targets", "math.zarr")}, new
        self.say("one domain's data changed: its blocks and targets were made anew, and nothing else")

    def verify(self) -> None:
        command = [sys.executable, "-m", "flows", "verify", str(self.root)]
        done = subprocess.run(command, env=self.site.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.say("ddk verify: every byte of every store is what was written")

    def count_lock_errors(self, on_postgres: bool) -> None:
        said = self.site.log("server")
        found = {words: said.count(words) for words in ("database is locked", "deadlock detected")}
        assert not on_postgres or not any(found.values()), found
        self.say("errors of locks in the server's log: " + ", ".join(f"{found[one]} '{one}'" for one in found))

    def wait(self, condition: Callable[[], object], what: str, timeout: float, every: float = 0.05) -> UUID:
        return self.site.wait_until(condition, what, timeout, every)  # type: ignore[no-any-return]

    def _running(self, flow: str, part: int = 1) -> UUID | None:
        client = self.site.client
        deployment = client.read_deployment_by_name(f"{flow}/{flow}")
        for run in client.read_flow_runs(limit=50):
            mine = run.deployment_id == deployment.id and run.parameters.get("part", 1) == part
            if mine and run.state is not None and run.state.is_running():
                return run.id
        return None

    def _worker_of(self, part: int) -> str:
        """The worker below which the run of that part is."""
        run = str(self._running("cache-teacher", part))
        for name in self.site.workers:
            for process in self._flows_below(name):
                with suppress(psutil.Error):
                    if run in process.environ().get("PREFECT__FLOW_RUN_ID", ""):
                        return name
        raise AssertionError(f"no worker has run {run}")

    def _flows_below(self, worker: str) -> list[psutil.Process]:
        return [process for process in self.site.below(worker) if _is_flow(process)]

    def _commits(self) -> list[Path]:
        return list(self.root.glob("targets/*/*.zarr/commits/*.json"))

    def _owners(self) -> int:
        return max((len(list(f.iterdir())) for f in self.root.glob("targets/*/*.zarr/claims/owners")), default=0)

    def _objects(self, commits: list[Path]) -> list[Path]:
        found = []
        for commit in commits:
            split, number = commit.stem.split("-")
            found += [path for path in commit.parents[1].glob(f"{split}/*/c/{int(number)}/**/*") if path.is_file()]
        assert found
        return found

    def _step(self) -> int:
        """Of the newest checkpoint; 0 before there is one."""
        return max((int(path.parent.name[5:]) for path in self.run.glob("checkpoints/*/state.json")), default=0)

    def _gone(self, processes: list[psutil.Process]) -> None:
        _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_END)
        assert not alive, (
            f"still there {SECONDS_TO_END:.0f} s after the kill: {[_command(process) for process in alive]}"
        )


def _is_flow(process: psutil.Process) -> bool:
    return re.search(r"prefect\.(flow_)?engine", " ".join(_command(process))) is not None


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


def _bytes(folder: Path) -> dict[str, bytes]:
    """Without what says how long something took, and where."""
    return {
        name: content
        for name, content in files_below(folder).items()
        if not name.endswith(("manifest.json", "README.md"))
    }


def _times(root: Path) -> dict[str, int]:
    return {
        str(path.relative_to(root)): path.stat().st_mtime_ns
        for kind in ("blocks", "targets")
        for path in (root / kind).rglob("*")
        if path.is_file()
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="ddk-rehearsal-") as name, ExitStack() as stack:
        folder, database = Path(name), None
        if postgres.installed():
            folder.chmod(0o711)  # where root calls this, PostgreSQL runs as another user
            database = stack.enter_context(postgres.running(folder / "postgres"))
        else:
            print(
                "NOT ON POSTGRESQL, which docs/server.md recommends for two workers: there is no initdb. The server "
                "runs on SQLite, and errors of locks are only counted; apt-get install postgresql",
                file=sys.stderr,
            )
        site = stack.enter_context(Site(folder, database_url=database))
        rehearsal = Rehearsal(folder, site)
        try:
            rehearsal.uninterrupted()
            run = rehearsal.begin_by_schedule()
            written = rehearsal.kill_in_capture()
            rehearsal.kill_the_server(run)
            rehearsal.kill_in_training()
            rehearsal.retry(run)
            rehearsal.compare(written)
            rehearsal.change_one_domain()
            rehearsal.verify()
            rehearsal.count_lock_errors(database is not None)
        except BaseException:
            print(site.logs()[-20000:], file=sys.stderr)
            raise
        rehearsal.say(f"the rehearsal holds, on {'PostgreSQL' if database else 'SQLite'}")


if __name__ == "__main__":
    os.environ["NO_PROXY"] = "127.0.0.1,localhost"
    main()
