"""A run's metrics in TensorBoard, Weights & Biases and MLflow, each read back by its own reader.

What all three do comes first, as one suite that each of them passes; then what each does by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
from pydantic import ValidationError
from repository import REPOSITORY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddk.errors import UserError
from ddk.values import DomainGap, Mixture
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record
from tasks.training.tracking import trackers as tracking
from tasks.training.tracking import wandb_run as tracking_wandb
from tasks.training.tracking.config import TrackingConfig
from tasks.training.tracking.mlflow_run import flat
from tasks.training.tracking.points import RunPoints
from tasks.training.tracking.trackers import Tracking, open_tracking

GAMMA = 0.2
START = 1_700_000_000.0
CONFIG = {"run": "a", "train": {"steps": 6, "learning_rate": 0.5}, "domains": {"zh.books": {"train": ["x", "y"]}}}
STEP_NAMES = {
    "train/ce",
    "train/kl",
    "train/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "train/tokens_per_second",
    "train/waiting_share",
}
GAP_NAMES = {
    *("gap/math/ratio", "gap/math/student_ppl", "gap/math/teacher_ppl", "mixture/math"),
    *("gap/web/ratio", "gap/web/student_ppl", "gap/web/teacher_ppl", "mixture/web"),
}


class Run:
    """What a training of 2 steps an interval leaves in its folder."""

    def __init__(self, root: str) -> None:
        self.folder = RunFolder(root, "a")

    def train(self, first: int, ce: float = 4.0) -> None:
        rows = [
            {
                "step": step,
                "ce": ce - step / 10,
                "kl": 1.0 + step,
                "loss": ce - step / 10 + GAMMA * (1.0 + step),
                "learning_rate": 1e-3 / step,
                "gradient_norm": 2.0,
                "tokens": 800,
                "seconds": 4.0,
                "waited_seconds": 1.0,
                "time": START + 4 * step,
            }
            for step in (first + 1, first + 2)
        ]
        self.folder.write_metrics(first, rows)

    def measure(self, step: int) -> None:
        history = MixtureHistory(self.folder.url)
        gaps = [
            DomainGap(domain="math", student_ppl=30.0 - step, teacher_ppl=10.0),
            DomainGap(domain="web", student_ppl=12.0, teacher_ppl=8.0),
        ]
        mixture = Mixture(probabilities={"math": 0.75, "web": 0.25})
        version = len(history.records())
        history.append(
            make_record(version=version, step=step, tokens_seen=0, gaps=gaps, mixture=mixture, blocks_drawn={})
        )


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    root = str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3_server')}/{tmp_path.name}"
    return Run(root)


@pytest.fixture
def local_run(tmp_path: Path) -> Run:
    return Run(str(tmp_path / "root"))


def opened(run: Run, **config: Any) -> Tracking:
    """As a process that begins, or goes on with, the run has it."""
    return open_tracking(TrackingConfig(**config), run.folder, CONFIG)


def follow(run: Run, follower: Tracking, *firsts: int) -> None:
    """What `train_interval` does around the intervals that begin there; each is followed by a measurement."""
    for first in firsts:
        if first == 0 and not MixtureHistory(run.folder.url).records():
            run.measure(0)
        follower.update(first)
        run.train(first)
        follower.update(first + 2, trained_from=first)
        run.measure(first + 2)


def read(run: Run) -> EventAccumulator:
    found = EventAccumulator(f"{run.folder.url}/tensorboard", size_guidance={"scalars": 0})
    return found.Reload()


def steps(found: EventAccumulator, name: str) -> list[int]:
    return [event.step for event in found.Scalars(name)]


# What every tracker does


# SQLAlchemy 2.1 deprecates what MLflow 3.17 calls.
with_mlflow = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(scope="module")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of its own; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.delenv("WANDB_DIR", raising=False)


class WandbFolder:
    """What one process has left, read by `wandb leet inspect`."""

    def __init__(self, folder: Path) -> None:
        call = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=60)
        self._records = [json.loads(line) for line in done.stdout.splitlines()]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record[kind] for record in self._records if record["type"] == kind]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [record["item"] for record in self.of("history")]


def wandb_folders(run: Run) -> list[WandbFolder]:
    return [WandbFolder(path) for path in sorted(Path(run.folder.url).glob("wandb/offline-run-*"))]


Told = dict[str, list[tuple[int, float, float]]]
"""What a service has of a run: by metric, the steps with their times and values."""


class TensorBoard:
    config: ClassVar[dict[str, Any]] = {}

    def told(self, run: Run) -> Told:
        found = read(run)
        names = found.Tags()["scalars"]
        return {name: [(event.step, event.wall_time, event.value) for event in found.Scalars(name)] for name in names}

    def check_stopped(self, run: Run) -> None:
        """It knows of no end."""

    def check_finished(self, run: Run) -> None:
        """Nor of a summary."""


class Wandb:
    config: ClassVar[dict[str, Any]] = {"wandb_project": "p", "wandb_entity": "team"}

    def told(self, run: Run) -> Told:
        rows = [row for folder in wandb_folders(run) for row in folder.rows]
        told: Told = {}
        for row in rows:
            for name in (name for name in row if name.startswith(("train/", "gap/", "mixture/"))):
                told.setdefault(name, []).append((row["optimizer_step"], row["_timestamp"], row[name]))
        return told

    def check_stopped(self, run: Run) -> None:
        time.sleep(1.1)  # the client names its folders by the second

    def check_finished(self, run: Run) -> None:
        first, second = wandb_folders(run)
        for folder in (first, second):
            (head,) = folder.of("run")
            assert (head["project"], head["entity"], head["display_name"]) == ("p", "team", "a")
            assert head["run_id"] == run.folder.tracking_id()
        assert first.of("run")[0]["config"]["update"]["train"] == CONFIG["train"]
        assert [folder.of("exit")[0]["exit_code"] for folder in (first, second)] == [1, 0]
        axes = [metric["step_metric"] for metric in first.of("metric") if metric.get("glob_name") == "*"]
        assert axes == ["optimizer_step"]
        trained = [row for row in first.rows if "train/ce" in row]
        assert {name for name in trained[0] if "/" in name} == STEP_NAMES, "a row has what was measured at one time"
        measured = [row for row in first.rows if "gap/math/ratio" in row]
        assert {name for name in measured[0] if "/" in name} == GAP_NAMES
        summary: dict[str, Any] = {}
        for record in second.of("summary"):
            summary |= record["update"]
        assert summary["run/steps"] == 6
        assert summary["gap/math/ratio"] == pytest.approx(2.4)


class MLflow:
    def __init__(self, uri: str, experiment: str) -> None:
        from mlflow import MlflowClient

        self.config = {"mlflow_uri": uri, "mlflow_experiment": experiment}
        self._client = MlflowClient(tracking_uri=uri)

    def found(self) -> Any:
        experiment = self._client.get_experiment_by_name(self.config["mlflow_experiment"])
        assert experiment is not None
        (found,) = self._client.search_runs([experiment.experiment_id])
        return found

    def told(self, run: Run) -> Told:
        found = self.found()
        histories = {name: self._client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
        return {name: sorted((m.step, m.timestamp / 1000, m.value) for m in of) for name, of in histories.items()}

    def check_stopped(self, run: Run) -> None:
        assert self.found().info.status == "FAILED"

    def check_finished(self, run: Run) -> None:
        found = self.found()
        assert (found.info.status, found.info.run_name) == ("FINISHED", "a")
        assert found.data.params == {
            "run": "a",
            "train.steps": "6",
            "train.learning_rate": "0.5",
            "domains.zh.books.train": '["x", "y"]',
        }
        assert (found.data.tags["ddk.steps"], found.data.tags["ddk.url"]) == ("6", run.folder.url)


@pytest.fixture(params=["tensorboard", "wandb", pytest.param("mlflow", marks=with_mlflow)])
def service(request: pytest.FixtureRequest) -> TensorBoard | Wandb | MLflow:
    if request.param == "wandb":
        request.getfixturevalue("offline")
        return Wandb()
    if request.param == "mlflow":
        return MLflow(request.getfixturevalue("mlflow_uri"), request.node.name)
    return TensorBoard()


def check_told(told: Told) -> None:
    """Six steps, measured before the first and after every second, each once."""
    assert set(told) == STEP_NAMES | GAP_NAMES
    # When it happened, whenever it was told; the gap is that of the student after its last step.
    for name in STEP_NAMES:
        assert [(step, at) for step, at, _ in told[name]] == [(s, START + 4 * s) for s in range(1, 7)], name
    for name in GAP_NAMES:
        assert [step for step, _, _ in told[name]] == [0, 2, 4, 6], name
        assert [at for _, at, _ in told[name]][1:] == [START + 4 * s for s in (2, 4, 6)], name

    def values(name: str) -> list[float]:
        return [value for _, _, value in told[name]]

    assert values("train/loss") == pytest.approx([4.0 - s / 10 + GAMMA * (1.0 + s) for s in range(1, 7)])
    assert values("train/tokens_per_second") == [200.0] * 6
    assert values("train/waiting_share") == [0.25] * 6
    assert values("gap/math/ratio") == pytest.approx([3.0, 2.8, 2.6, 2.4])
    assert values("gap/web/teacher_ppl") == [8.0] * 4
    assert values("mixture/math") == [0.75] * 4


def test_it_goes_on_in_the_same_run_and_no_step_comes_twice(
    local_run: Run, service: TensorBoard | Wandb | MLflow
) -> None:
    follower = opened(local_run, **service.config)
    follow(local_run, follower, 0, 2)
    follower.close(failed=True)
    service.check_stopped(local_run)
    again = opened(local_run, **service.config)
    follow(local_run, again, 4)
    again.finish(6, {"steps": 6, "stopped_early": None})
    again.close(failed=False)
    check_told(service.told(local_run))
    service.check_finished(local_run)


def test_switched_on_late_it_gets_all_there_is(local_run: Run, service: TensorBoard | Wandb | MLflow) -> None:
    follow(local_run, opened(local_run, tensorboard=False), 0, 2)
    follower = opened(local_run, **service.config)
    follow(local_run, follower, 4)
    follower.finish(6, {})
    follower.close(failed=False)
    check_told(service.told(local_run))


# TensorBoard


def test_on_either_storage_tensorboard_reads_every_step_once(run: Run) -> None:
    follower = opened(run)
    follow(run, follower, 0, 2, 4)
    follower.finish(6, {"steps": 6})
    check_told(TensorBoard().told(run))


def test_a_run_that_goes_on_and_an_interval_trained_again_keep_each_step_once(run: Run) -> None:
    follow(run, opened(run), 0)
    run.train(2, ce=99.0)  # killed before its checkpoint: nobody has been told
    again = opened(run)
    again.update(2)
    assert steps(read(run), "train/ce") == [1, 2], "steps that the training has not come to do not count"
    follow(run, again, 2)
    found = read(run)
    assert steps(found, "train/ce") == [1, 2, 3, 4]
    assert max(event.value for event in found.Scalars("train/ce")) < 5

    run.train(2, ce=50.0)  # its checkpoint was lost as well: trained a second time, though it has been told
    opened(run).update(4, trained_from=2)
    found = read(run)
    assert steps(found, "train/ce") == [1, 2, 3, 4]
    assert [event.value for event in found.Scalars("train/ce")][2:] == pytest.approx([49.7, 49.6])


class Watching:
    """TensorBoard that was opened at the beginning, with the loader that never goes back to an earlier name."""

    def __init__(self, run: Run) -> None:
        self._found = EventAccumulator(f"{run.folder.url}/tensorboard", size_guidance={"scalars": 0})

    def __call__(self, name: str) -> list[int]:
        return steps(self._found.Reload(), name)


def test_who_watches_sees_gaps_that_another_evaluator_measures_late(local_run: Run) -> None:
    run = local_run
    follower = opened(run)
    run.measure(0)
    follower.update(0)
    watched = Watching(run)
    for first in (0, 2, 4):
        run.train(first)
        follower.update(first + 2, trained_from=first)
        assert watched("train/ce")[-1] == first + 2
    run.measure(2)  # it took two intervals
    follower.update(6)
    run.measure(6)
    follower.finish(6, {})
    assert watched("gap/math/ratio") == [0, 2, 6]
    assert watched("train/ce") == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[Callable[[str], list[int]]]:
    """The program itself on `<root>/runs`, with the loader that it takes by itself; gives a name's steps."""
    port = free_port()
    folder = tmp_path / "root" / "runs"
    folder.mkdir(parents=True)
    call = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    program = subprocess.Popen(
        [*call, "--port", str(port), "--reload_interval", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def ask(name: str) -> list[int]:
        try:
            with httpx.Client(trust_env=False, base_url=f"http://127.0.0.1:{port}/data/plugin/scalars") as client:
                answer = client.get("/scalars", params={"tag": name, "run": "a/tensorboard"})
        except httpx.TransportError:
            return []  # it is starting
        return [event[1] for event in answer.json()] if answer.status_code == 200 else []

    yield ask
    program.terminate()
    program.wait(timeout=30)


def test_the_program_shows_a_run_that_goes_on(local_run: Run, tensorboard: Callable[[str], list[int]]) -> None:
    def shows(name: str, expected: list[int]) -> None:
        deadline = time.monotonic() + 180
        while (found := tensorboard(name)) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)

    follower = opened(local_run)
    follow(local_run, follower, 0)
    shows("train/ce", [1, 2])
    follow(local_run, opened(local_run), 2)
    shows("train/ce", [1, 2, 3, 4])
    shows("gap/math/ratio", [0, 2])


def test_equal_metrics_are_equal_files(tmp_path: Path) -> None:
    contents = []
    for place in ("one", "two"):
        run = Run(str(tmp_path / place))
        follow(run, opened(run), 0, 2)
        folder = tmp_path / place / "runs" / "a" / "tensorboard"
        # The gap before the first step happened at a time that nothing has stored.
        contents.append({p.name: p.read_bytes() for p in folder.iterdir() if "gap-00000" not in p.name})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 3


def test_tensorboard_s_writers_do_not_load_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was loaded')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from tasks.training.tracking.points import Point
assert "tensorboard" not in sys.modules, "loaded at start"
from tasks.training.tracking.tensorboard_files import event_file
assert event_file([Point(step=1, time=2.0, values={{"a": 1.0}})])
assert "tensorflow" not in sys.modules
assert "wandb" not in sys.modules and "mlflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("offline")
def test_what_a_killed_process_had_not_written_is_not_held_for_logged(
    local_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline the client writes its log now and then; the note of how far the run is follows that."""
    run = local_run
    cursor = Path(run.folder.url) / "wandb.json"
    follower = opened(run, wandb_project="p")
    follow(run, follower, 0)
    assert not cursor.exists(), "a kill now would take these steps along"
    monkeypatch.setattr(tracking_wandb, "SECONDS_UNTIL_WRITTEN", 0.05)
    follow(run, follower, 2)
    deadline = time.monotonic() + 120
    while not cursor.exists() or json.loads(cursor.read_text())["step"] < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    follower.close(failed=False)
    assert json.loads(cursor.read_text()) == {"step": 4, "version": 1}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def wandb_server(port: int, history: Path) -> Iterator[None]:
    call = [sys.executable, str(REPOSITORY / "tests" / "support" / "fake_wandb.py"), str(port), str(history)]
    server = subprocess.Popen(call)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def in_a_process_of_its_own(root: Path, port: int, code: str) -> str:
    """Code with `run`, `opened` and `follow`; W&B's client keeps what it has read of the environment. Gives the log."""
    head = f"""
import logging, sys
logging.basicConfig(format="%(message)s")
sys.path[:0] = {[str(Path(__file__).parent), str(REPOSITORY / "tests" / "support")]!r}
from test_trackers import *
logging.getLogger("ddk").setLevel("INFO")
run = Run({str(root)!r})
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    client = {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "3"}
    done = subprocess.run(
        [sys.executable, "-c", head + code],
        env={**environment, **client, "HOME": str(root), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_online_a_run_goes_on_where_the_service_says_that_it_is(tmp_path: Path) -> None:
    port, history = free_port(), tmp_path / "history.json"
    begin = "f = opened(run, wandb_project='p', wandb_entity='team')\n"
    with wandb_server(port, history):
        in_a_process_of_its_own(tmp_path, port, begin + "follow(run, f, 0, 2)\nf.close(failed=True)")
        assert len(json.loads(history.read_text())) == 6
        in_a_process_of_its_own(
            tmp_path, port, begin + "follow(run, f, 4)\nf.finish(6, {'steps': 6})\nf.close(failed=False)"
        )
    rows = json.loads(history.read_text())
    assert [row["_step"] for row in rows] == list(range(10)), "one history"
    assert [row["optimizer_step"] for row in rows if "train/ce" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["optimizer_step"] for row in rows if "gap/math/ratio" in row] == [0, 2, 4, 6]
    assert [row["_timestamp"] for row in rows if "train/ce" in row] == [START + 4 * s for s in range(1, 7)]


def test_online_a_service_that_comes_back_gets_what_it_missed(tmp_path: Path) -> None:
    port, history = free_port(), tmp_path / "history.json"
    err = in_a_process_of_its_own(
        tmp_path,
        port,
        f"""
f = opened(run, wandb_project="p", wandb_entity="team")
follow(run, f, 0)
with wandb_server({port}, Path({str(history)!r})):
    tracking.SECONDS_BETWEEN_ATTEMPTS = 0
    f._trackers[1]._not_before = 0
    follow(run, f, 2)
    f.finish(4, {{}})
    f.close(failed=False)
""",
    )
    assert err.count("Weights & Biases failed (") == 1
    assert "Weights & Biases accepts metrics again" in err
    rows = json.loads(history.read_text())
    assert [row["optimizer_step"] for row in rows if "train/ce" in row] == [1, 2, 3, 4]


def test_wandb_without_a_key_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    code = f"""
from ddk.errors import UserError
from storage.runs.folder import RunFolder
from tasks.training.tracking.trackers import open_tracking
from tasks.training.tracking.config import TrackingConfig
try:
    open_tracking(TrackingConfig(wandb_project="p"), RunFolder({str(tmp_path)!r}, "a"), {{}}).update(0)
except UserError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.startswith("tracking.wandb_project: No API key configured"), done.stderr
    assert "set WANDB_API_KEY, or WANDB_MODE=offline" in done.stdout


@with_mlflow
def test_a_run_begun_anew_where_another_was_removed_is_another_run(local_run: Run, mlflow_uri: str) -> None:
    from mlflow import MlflowClient

    for ce in (4.0, 5.0):
        follower = opened(local_run, mlflow_uri=mlflow_uri, mlflow_experiment="anew")
        local_run.train(0, ce)
        follower.update(2, trained_from=0)
        follower.close(failed=False)
        shutil.rmtree(local_run.folder.url)
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("anew")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.metrics["train/ce"] for run in found) == pytest.approx([3.8, 4.8])


@with_mlflow
def test_an_interval_of_many_steps_goes_to_mlflow_in_several_requests(
    local_run: Run, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    row = {"ce": 1.0, "kl": 1.0, "loss": 1.2, "learning_rate": 1.0, "gradient_norm": 1.0, "tokens": 1, "seconds": 1.0}
    rows = [{**row, "waited_seconds": 0.0, "step": step, "time": START + step} for step in range(1, 301)]
    local_run.folder.write_metrics(0, rows)
    follower = opened(local_run, mlflow_experiment="many")
    follower.update(300, trained_from=0)
    client = MlflowClient(tracking_uri=mlflow_uri)
    experiment = client.get_experiment_by_name("many")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    for name in STEP_NAMES:
        assert len(client.get_metric_history(found.info.run_id, name)) == 300
    assert found.data.tags["ddk.logged_step"] == "300"
    follower.close(failed=False)


def test_a_service_that_does_not_answer_stops_nothing_and_is_said_once(
    local_run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_ATTEMPTS", 0.0)
    follower = opened(local_run, mlflow_uri="http://127.0.0.1:9", mlflow_experiment="x")
    with caplog.at_level(logging.INFO, logger="ddk"):
        follow(local_run, follower, 0, 2)
        follower.finish(4, {"steps": 4})
        follower.close(failed=False)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("tracking: MLflow failed (")
    assert steps(read(local_run), "train/ce") == [1, 2, 3, 4], "the others go on"


class Flaky:
    """Fails while it is told to."""

    name = "flaky"

    def __init__(self) -> None:
        self.broken = True
        self.calls = 0
        self.step = 0

    def log(self, points: RunPoints) -> None:
        self.calls += 1
        if self.broken:
            raise ConnectionError("no answer")
        self.step = max([self.step, *(point.step for point in points.after(self.step, 99))])

    def finish(self, summary: Any) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = 1000.0

    def forward(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    return forward


def test_a_service_that_failed_is_left_alone_for_a_while_and_then_gets_what_it_missed(
    local_run: Run, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky()
    follower = Tracking([flaky], local_run.folder)
    with caplog.at_level(logging.INFO, logger="ddk"):
        follow(local_run, follower, 0, 2)
        assert flaky.calls == 1
        flaky.broken = False
        clock(601)
        follow(local_run, follower, 4)
    assert (flaky.calls, flaky.step) == (3, 6)
    assert "flaky accepts metrics again" in caplog.text

    flaky.broken = True
    follow(local_run, follower, 6)
    flaky.broken = False
    follower.finish(8, {})
    assert flaky.step == 8, "the end does not wait"


def test_a_refusal_after_the_first_step_stops_nothing(local_run: Run) -> None:
    class Refusing(Flaky):
        def log(self, points: RunPoints) -> None:
            if self.broken:
                raise UserError("set it up")

    refusing = Refusing()
    with pytest.raises(UserError, match="set it up"):
        Tracking([refusing], local_run.folder).update(0)
    refusing.broken = False
    follower = Tracking([refusing], local_run.folder)
    follower.update(0)
    refusing.broken = True
    follower.update(2, trained_from=0)
    follower.update(2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mlflow_uri": "https://me:secret@host", "mlflow_experiment": "x"}, "no credentials and no query"),
        ({"mlflow_uri": "https://host?token=secret", "mlflow_experiment": "x"}, "no credentials and no query"),
        ({"mlflow_uri": "mlruns", "mlflow_experiment": "x"}, "must look like https://host"),
        ({"mlflow_uri": "sqlite:///mlflow.db", "mlflow_experiment": "x"}, "must look like https://host"),
        ({"mlflow_uri": "https://host"}, "mlflow_experiment is not; name one"),
        ({"wandb_entity": "team"}, "wandb_project is not; name a project"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        TrackingConfig(**config)  # type: ignore[arg-type]
    assert "secret" not in error.value.errors()[0]["msg"]


@pytest.mark.parametrize(("field", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")])
def test_a_package_that_is_missing_is_named_at_once(field: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValidationError, match=rf"package {package} is not installed.*ddk-distill\[{package}\]"):
        TrackingConfig(**{field: "x"})  # type: ignore[arg-type]
    TrackingConfig()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()  # the client's own, where one has run before
    code = "from tasks.training.tracking.config import _is_installed; assert not _is_installed('wandb')"
    blocked = f"import sys; sys.path = [{str(tmp_path)!r}, *(p for p in sys.path if 'site-packages' not in p)]; "
    preload = "import tasks.training.tracking.config; "
    done = subprocess.run([sys.executable, "-c", preload + blocked + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mlflow_without_a_place_is_refused(local_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"set tracking\.mlflow_uri"):
        opened(local_run, mlflow_experiment="x")


def test_parameters_are_the_configuration_s_fields() -> None:
    assert dict(flat({"a": {"b": None, "c": {}}, "d": True, "e": "é" * 7000})) == {
        "a.b": "null",
        "a.c": "{}",
        "d": "true",
        "e": "é" * 6000,
    }
