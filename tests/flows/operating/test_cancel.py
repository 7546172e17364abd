"""Runs that are cancelled as the UI's button does it, or whose worker is killed: real server, worker, engine, torchrun.

Whatever a run has started must be gone within 30 s, in every phase; what it has committed stays.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.states import Cancelling
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker
from site_of_operation import ASKING, Site
from small_run import small_config, write_config

from flows.config import load_config
from flows.operating.deployments import DEPLOYABLE
from tasks.training import worker

SECONDS_TO_END = 30.0
TRAIN_WORKER = worker.__name__
BLOCKS = {name: {**domain, "max_train_blocks": 80} for name, domain in small_config()["domains"].items()}


POOL = "cancel"


@pytest.fixture(scope="module")
def site(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One worker, and `distill` deployed for it."""
    folder = tmp_path_factory.mktemp("site")
    # So many shards, and so many steps, that a cancel comes in the middle.
    path = write_config(
        folder,
        domains=BLOCKS,
        teacher={"shard_blocks": 2},
        train={"steps": 100, "processes": 2},
        mixture={"interval": 20},
    )
    with Site(folder, prefect_server) as site:
        template = ProcessWorker.get_default_base_job_template()
        site.client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        RunnerDeployment.from_flow(
            DEPLOYABLE["distill"],
            "distill",
            parameters=load_config(path).model_dump(mode="json"),
            entrypoint_type=EntrypointType.MODULE_PATH,
            work_pool_name=POOL,
        ).apply()
        site.start_worker("worker", POOL)
        yield site


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Run:
    """A deployment's run, and the processes that it has started: all have its id in their environment."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._id = site.start("distill")
        self._ended = False
        self._asked = 0.0

    def processes(self, part_of_command: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT__FLOW_RUN_ID") == str(self._id):
                    found += [process] * (part_of_command in " ".join(process.cmdline()))
        return found

    def reaches(self, condition: Callable[[], Any], what: str, timeout: float = 900) -> None:
        self._site.wait_until(lambda: condition() or self._has_ended(), what, timeout)
        assert not self._has_ended(), f"{self.state} before: {what}\n{self._site.logs()[-5000:]}"

    def cancel(self) -> None:
        self._site.client.set_flow_run_state(self._id, Cancelling())

    def ends_by(self, cause: Callable[[], object], state: str) -> None:
        before = self.processes()
        assert len(before) > 1, "the flow's process, and what it has started"
        cause()
        deadline = time.monotonic() + SECONDS_TO_END
        # One that has ended and whom a busy worker has not asked for its exit code yet is not there any more.
        while left := [one for one in {*self.processes(), *psutil.wait_procs(before, timeout=0)[1]} if _runs(one)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        self.ends_as(state)

    def ends_as(self, state: str, timeout: float = 900) -> None:
        self._site.wait_until(self._has_ended, f"the run ends, as {state}", timeout)
        assert self.state == state, self._site.logs()[-5000:]

    def _has_ended(self) -> bool:
        """As the server said within the last half second."""
        if not self._ended and time.monotonic() > self._asked + ASKING:
            state = self._site.run_of(self._id).state
            self._ended, self._asked = state is not None and state.is_final(), time.monotonic()
        return self._ended

    @property
    def state(self) -> str | None:
        return self._site.run_of(self._id).state_name


@pytest.mark.timeout(3600)
@pytest.mark.engine
def test_cut_off_in_every_phase_and_started_anew(site: Site) -> None:
    root = site.folder / "root"
    run = root / "runs" / "small"

    def commits() -> list[Path]:
        return list(root.glob("targets/*/*.zarr/commits/*.json"))

    starting = Run(site)
    starting.reaches(lambda: starting.processes("spawn_main"), "the engine starts")
    starting.ends_by(starting.cancel, "Cancelled")
    assert commits() == []

    capturing = Run(site)
    capturing.reaches(lambda: len(commits()) >= 3, "the engine captures")
    assert capturing.processes("VLLM::EngineCore")
    capturing.ends_by(lambda: site.kill("worker"), "Crashed")
    site.start_worker("worker", POOL)
    captured = times_of_writing(objects_of(commits()))

    training = Run(site)
    saved = run / "checkpoints" / "step-00000020" / "state.json"
    training.reaches(saved.exists, "the student trains")
    assert len(training.processes(TRAIN_WORKER)) == 3, "torchrun and its two workers"
    training.ends_by(training.cancel, "Cancelled")
    assert times_of_writing(captured) == captured, "a committed shard is never captured again"
    trained = times_of_writing(saved.parent.iterdir())

    left_alone = Run(site)
    left_alone.reaches(lambda: left_alone.processes(TRAIN_WORKER), "torchrun starts")
    left_alone.ends_by(lambda: site.kill("worker"), "Crashed")

    site.start_worker("worker", POOL)
    last = Run(site)
    last.ends_as("Completed")
    assert (run / "student" / "model.safetensors").exists()
    assert times_of_writing(trained) == trained, "it went on at a checkpoint"


def times_of_writing(files: Iterable[Path]) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in files}


def objects_of(commits: list[Path]) -> list[Path]:
    """The shards' that are committed."""
    found = []
    for commit in commits:
        split, number = commit.stem.split("-")
        found += [path for path in commit.parents[1].glob(f"{split}/*/c/{int(number)}/**/*") if path.is_file()]
    assert len(found) >= len(commits)
    return found
