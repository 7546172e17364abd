"""prefect.yaml, `prefect deploy --all` and `ddk serve` against a real server."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import PrefectHTTPStatusError, SignatureMismatchError
from prefect.states import Completed, Running
from prefect.workers.process import ProcessWorker
from repository import REPOSITORY
from small_run import Ddk, small_config, write_config

from flows.config import Config, load_config
from flows.operating.deployments import DEPLOYABLE, configuration, say_that_it_crashed
from flows.operating.schedules import warn_of_schedules
from tasks.evaluation.names import EvaluationConfig

POOLS = {
    "pack-corpus": "cpu",
    "cache-teacher": "gpu",
    "select-blocks": "gpu",
    "train-student": "gpu",
    "rebalance": "cpu",
    "distill": "gpu",
    "report": "cpu",
    "evaluate": "gpu",
    "clean": "cpu",
}
STORE_PARAMETERS = {"root", "domains", "teacher", "packing", "student", "storage_block"}
YAML = REPOSITORY / "prefect.yaml"


class Deployed:
    """What one `prefect deploy --all` made of one configuration."""

    def __init__(self, client: SyncPrefectClient, config: Config, environment: dict[str, str], output: str) -> None:
        self.client = client
        self.config = config
        self.environment = environment
        self.output = output

    def __getitem__(self, name: str) -> DeploymentResponse:
        return self.client.read_deployment_by_name(f"{name}/{name}")

    def start(self, name: str, **parameters: Any) -> FlowRun:
        return self.client.create_flow_run_from_deployment(self[name].id, parameters=parameters)


@pytest.fixture(scope="module")
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployed(client: SyncPrefectClient, prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """The real command, in a folder where nothing but prefect.yaml lies, with no way out to a network."""
    for pool in ("gpu", "cpu"):
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(YAML, folder)
    path = write_config(tmp_path_factory.mktemp("config"))
    environment = {
        **os.environ,
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "DDK_CONFIG": path,
        "DO_NOT_TRACK": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deploy", "--all"],
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,  # the output belongs in the message
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Deployed(client, load_config(path), environment, done.stdout + done.stderr)


def test_one_deployment_a_stage_on_the_pool_of_its_kind(deployed: Deployed, client: SyncPrefectClient) -> None:
    ours = [deployment for deployment in client.read_deployments(limit=200) if deployment.name in POOLS]
    assert {deployment.name: deployment.work_pool_name for deployment in ours} == POOLS
    for deployment in ours:
        # A module: the folder of a file would go first on sys.path.
        assert deployment.entrypoint == f"flows.operating.deployments.{deployment.name.replace('-', '_')}"
        assert client.read_flow(deployment.flow_id).name == deployment.name
        assert deployment.tags == ["ddk", POOLS[deployment.name]]
        assert deployment.description
        assert "Returns" not in deployment.description
        assert deployment.enforce_parameter_schema
        assert deployment.job_variables["env"]["PREFECT_LOGGING_EXTRA_LOGGERS"] == "ddk"
        assert deployment.job_variables["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert deployment.job_variables["env"]["PREFECT_LOGGING_TO_API_BATCH_INTERVAL"] == "5"
        assert not deployment.paused


def test_runs_of_one_deployment_wait_for_each_other(deployed: Deployed) -> None:
    assert deployed["cache-teacher"].global_concurrency_limit is None, "captures share the work"
    for name in set(POOLS) - {"cache-teacher"}:
        deployment = deployed[name]
        assert deployment.global_concurrency_limit is not None, name
        assert deployment.global_concurrency_limit.limit == 1
        assert deployment.concurrency_options is not None
        assert deployment.concurrency_options.collision_strategy.value == "ENQUEUE"


def test_schedules_are_there_and_off(deployed: Deployed) -> None:
    schedules = {name: deployed[name].schedules for name in POOLS}
    assert {name for name, found in schedules.items() if found} == {"rebalance", "distill"}
    (hourly,), (nightly,) = schedules["rebalance"], schedules["distill"]
    assert isinstance(hourly.schedule, IntervalSchedule)
    assert hourly.schedule.interval.total_seconds() == 3600
    assert isinstance(nightly.schedule, CronSchedule)
    assert (nightly.schedule.cron, nightly.schedule.timezone) == ("0 2 * * *", "UTC")
    assert not hourly.active
    assert not nightly.active


def test_schedules_that_deploying_replaces_are_named_with_what_makes_them_again(
    deployed: Deployed, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "Deploying replaces" not in deployed.output, "there was nothing yet"
    warn_of_schedules.__wrapped__()
    assert not capsys.readouterr().out, "those of prefect.yaml, which are off"
    report, rebalance = deployed["report"], deployed["rebalance"]
    by_hand = CronSchedule(cron="0 5 * * 1", timezone="Europe/Berlin")
    (made,) = client.create_deployment_schedules(report.id, [(by_hand, True)])
    client.update_deployment_schedule(rebalance.id, rebalance.schedules[0].id, active=True)
    try:
        warn_of_schedules.__wrapped__()
        _, *lines = capsys.readouterr().out.splitlines()
        assert (
            lines[0]
            == "  rebalance/rebalance: 'hourly' is on; to keep it so, set `active: true` for it in prefect.yaml"
        )
        said, _, command = lines[1].partition("again: ")
        assert said == "  report/report: made by hand; to have it "
        client.delete_deployment_schedule(report.id, made.id)
        subprocess.run(
            [sys.executable, "-m", *shlex.split(command)], env=deployed.environment, check=True, capture_output=True
        )
        (again,) = deployed["report"].schedules
        assert (again.schedule, again.active) == (by_hand, True)
    finally:
        for schedule in deployed["report"].schedules:
            client.delete_deployment_schedule(report.id, schedule.id)
        client.update_deployment_schedule(rebalance.id, rebalance.schedules[0].id, active=False)


def test_parameters_are_the_configuration_with_every_field_spelt_out(deployed: Deployed) -> None:
    everything = deployed.config.model_dump(mode="json")
    for name in ("train-student", "rebalance", "distill", "clean"):
        assert deployed[name].parameters == everything, "prefect.yaml must name every section of flows.config.Config"
    for name in ("pack-corpus", "cache-teacher"):
        assert deployed[name].parameters == {key: everything[key] for key in STORE_PARAMETERS}
    assert deployed["report"].parameters == {key: everything[key] for key in ("run", "root", "storage_block")}
    asked = {key: everything[key] for key in ("run", "root", "storage_block", "domains", "teacher", "student")}
    assert deployed["evaluate"].parameters == {**asked, "evaluation": EvaluationConfig().model_dump(mode="json")}


def test_the_form_says_what_a_field_is(deployed: Deployed) -> None:
    for name in ("pack-corpus", "distill", "evaluate"):
        schema = deployed[name].parameter_openapi_schema
        assert schema is not None
        undescribed = [field for field, of in schema["properties"].items() if not of.get("description")]
        assert undescribed == []
        definitions = schema["definitions"]
        assert {"TeacherConfig", "DomainConfig"} <= set(definitions)
        for title, definition in definitions.items():
            assert all(field.get("description") for field in definition["properties"].values()), title
            assert definition["additionalProperties"] is False, title


def refused(deployed: Deployed, name: str, **parameters: Any) -> str:
    """What the server says; nothing was started."""
    before = {run.id for run in deployed.client.read_flow_runs(limit=200)}
    with pytest.raises(PrefectHTTPStatusError) as error:
        deployed.start(name, **parameters)
    assert {run.id for run in deployed.client.read_flow_runs(limit=200)} == before
    return str(error.value.response.json()["detail"])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"steps": 0}, "0 is less than the minimum of 1"),
        ("train", {"stepps": 9}, "'stepps' was unexpected"),
        ("teacher", {"codec": {"name": "exact", "levels": 254, "keep_mass": 1.0, "lvl": 2}}, "'lvl' was unexpected"),
    ],
)
def test_a_bad_value_and_an_unknown_key_are_refused(
    deployed: Deployed, section: str, change: dict[str, Any], message: str
) -> None:
    whole = deployed["distill"].parameters[section]
    assert message in refused(deployed, "distill", **{section: {**whole, **change}})


def test_an_unknown_parameter_is_refused_before_the_flow_s_first_line(deployed: Deployed) -> None:
    """Not by the server: Prefect's schema of a flow forbids no further parameters."""
    run = deployed.start("distill", mixtures={})
    with pytest.raises(SignatureMismatchError, match="mixtures"):
        DEPLOYABLE["distill"].validate_parameters(run.parameters)
    deployed.client.delete_flow_run(run.id)


@pytest.mark.parametrize("name", ["distill", "rebalance"])
@pytest.mark.parametrize(
    ("section", "part", "missing"),
    [
        ("mixture", {"alpha": 0.9}, "interval"),  # none of its fields is required by the flow itself
        ("train", {"steps": 100, "batch_size": 8}, "micro_batch_size"),
        ("domains", {"math": {"train": ["x"], "validation": ["y"]}}, "max_train_blocks"),
    ],
)
def test_a_part_of_a_section_is_refused_instead_of_resetting_its_neighbours(
    deployed: Deployed, name: str, section: str, part: dict[str, Any], missing: str
) -> None:
    Config.model_validate(small_config(**{section: part}))  # on the command line it is as good as any
    assert "is a required property" in refused(deployed, name, **{section: part})
    whole = deployed[name].parameters[section]
    inner = whole["math"] if section == "domains" else whole
    without = {key: value for key, value in inner.items() if key != missing}
    said = refused(deployed, name, **{section: {"math": without} if section == "domains" else without})
    assert f"'{missing}' is a required property" in said


def test_a_part_of_a_section_within_a_section_is_refused(deployed: Deployed) -> None:
    teacher = deployed["cache-teacher"].parameters["teacher"]
    assert "is a required property" in refused(deployed, "cache-teacher", teacher={**teacher, "codec": {}})


def test_a_whole_section_replaces_one_field_and_nothing_else(deployed: Deployed) -> None:
    defaults = deployed["distill"].parameters
    assert defaults["mixture"]["interval"] == 2, "not the default: a reset would show"
    run = deployed.start("distill", mixture={**defaults["mixture"], "alpha": 0.9}, run="other")
    expected = {**defaults, "mixture": {**defaults["mixture"], "alpha": 0.9}, "run": "other"}
    assert run.parameters == expected
    taken = DEPLOYABLE["distill"].validate_parameters(run.parameters)
    assert taken["mixture"].interval == 2
    assert taken["train"] == deployed.config.train
    deployed.client.delete_flow_run(run.id)


def test_a_run_s_last_words_change_no_ending(deployed: Deployed) -> None:
    run = deployed.start("report").id
    for state, becomes in ((Running(), "Crashed"), (Completed(), "Completed")):
        deployed.client.set_flow_run_state(run, state, force=True)
        say_that_it_crashed(run)
        assert deployed.client.read_flow_run(run).state_name == becomes


def test_a_worker_finds_the_flow_and_runs_it(deployed: Deployed, tmp_path: Path) -> None:
    """As a process worker does it: the same command, in a folder of its own."""
    run = deployed.start("pack-corpus", root=str(tmp_path / "root"))
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "flow-run", "execute", str(run.id)],
        cwd=tmp_path,
        env={**deployed.environment, **deployed["pack-corpus"].job_variables["env"]},
        capture_output=True,
        check=False,  # the output belongs in the message
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert deployed.client.read_flow_run(run.id).state_name == "Completed"
    assert {store.name for store in tmp_path.glob("root/blocks/*/*.zarr")} == {
        "math.zarr",
        "code.zarr",
        "zh_books.zarr",
    }


def test_the_quickstart_is_deployed_where_no_configuration_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sections = configuration()
    assert (sections["run"], sections["root"]) == ("quickstart", str(tmp_path / "quickstart-run"))
    assert os.path.isdir(sections["teacher"]["model"])
    path = write_config(tmp_path)
    assert configuration(path)["root"] == str(tmp_path / "root")
    assert configuration(path, "s3://bucket/prefix")["root"] == "s3://bucket/prefix"


def test_a_wrong_configuration_is_not_deployed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no configuration file"):
        configuration(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(SystemExit, match=r"train\.steps"):
        configuration(write_config(tmp_path, train={"steps": 0}))


def ended(client: SyncPrefectClient, run: UUID, timeout: float = 300) -> FlowRun:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = client.read_flow_run(run)
        if found.state is not None and found.state.is_final():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{client.read_flow_run(run).state} after {timeout} s")


def wait_for_an_engine(process_id: int, timeout: float = 300) -> list[psutil.Process]:
    """Until vLLM's engine runs somewhere below; returns all processes there."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = psutil.Process(process_id).children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("VLLM::EngineCore" in "".join(process.cmdline()) for process in found):
                return found
        time.sleep(0.2)
    raise AssertionError("no engine was started")


@pytest.mark.engine
def test_serve_runs_every_stage_from_one_process_and_leaves_none_behind(
    client: SyncPrefectClient, ddk: Ddk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_RUNNER_POLL_FREQUENCY", "1")
    config = write_config(tmp_path)
    # As a script's background job, which ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = ddk.start("serve", config)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 180
        while len(served := [d for d in client.read_deployments(limit=200) if d.name == "dev"]) < len(POOLS):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert {client.read_flow(deployment.flow_id).name for deployment in served} == set(POOLS)
        assert client.read_deployment_by_name("distill/dev").parameters == load_config(config).model_dump(mode="json")
        distilling, reporting = (
            client.create_flow_run_from_deployment(client.read_deployment_by_name(f"{name}/dev").id)
            for name in ("distill", "report")
        )
        failed = ended(client, reporting.id)
        assert failed.state is not None
        assert failed.state.name == "Failed"
        assert "'small'" in str(failed.state.message), "which run there is none of"
        started = wait_for_an_engine(process.pid)
        assert client.read_flow_run(distilling.id).state_name == "Running"
        assert len(list(tmp_path.glob("root/blocks/*/*.zarr"))) == 3

        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
        assert not err, "no warnings, no tracebacks"
        left = psutil.wait_procs(started, timeout=10)[1]
        assert not left
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
