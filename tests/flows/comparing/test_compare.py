"""`ddk compare` as a user calls it: two methods, two seeds, one cache; then again after something has been lost."""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, FlowRunFilterParentFlowRunId
from safetensors import safe_open
from small_run import ASSETS, DOMAINS, Ddk, Finished, SmallRun, files_below, write_config

from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from tasks.comparing.data import Comparison
from tasks.comparing.report import read_comparison

pytestmark = pytest.mark.timeout(1500)  # the first test waits for five runs

RUNS = [f"small-{method}-s{seed}" for seed in (0, 1) for method in ("kd", "ddk")]
BROKEN = "code only: mixture.weights={code: 1, math: 1}; method=kd"
TOO_LONG = "too long: packing.seq_len=2048"
CALL = ("--methods", "kd,ddk", "--seeds", "0,1", "--variant", BROKEN, "--variant", TOO_LONG)


@dataclass(frozen=True)
class Compared:
    config: str
    root: Path
    output: Finished

    @property
    def folder(self) -> Path:
        return self.root / "comparisons" / "small"

    @property
    def comparison(self) -> Comparison:
        return read_comparison(str(self.root), "small")


@pytest.fixture(scope="module")
def compared(small_run: SmallRun, ddk: Ddk, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """On the stores of the small run, so that no engine is started."""
    folder = tmp_path_factory.mktemp("compare")
    for part in ("blocks", "targets"):
        shutil.copytree(small_run.root / part, folder / "root" / part)
    config = write_config(folder)
    return Compared(config, folder / "root", ddk("compare", config, *CALL))


def test_every_run_is_an_ordinary_run(compared: Compared) -> None:
    assert "Traceback" not in compared.output.err
    for name in RUNS:
        folder = RunFolder(str(compared.root), name)
        config = folder.config()
        assert folder.summary() is not None
        assert config is not None
        assert name == f"small-{config['method']}-s{config['seed']}"
        assert [path.name for path in (compared.root / "runs" / name / "checkpoints").iterdir()] == ["step-00000006"]
    assert sorted(path.name for path in (compared.root / "runs").iterdir()) == sorted(RUNS)


def test_one_cache_serves_them_all(compared: Compared, small_run: SmallRun) -> None:
    assert "captured" not in compared.output.err, "the stores were there"
    assert files_below(compared.root / "targets") == files_below(small_run.root / "targets")
    stores = compared.comparison.stores
    assert sorted(stores) == sorted(str(path.relative_to(compared.root)) for path in compared.root.glob("targets/*/*"))
    assert {store.positions for store in stores.values()} == {46 * 96}


def test_prefect_has_a_run_for_each_below_one_for_all(compared: Compared) -> None:
    with get_client(sync_client=True) as client:
        named = FlowRunFilter(name=FlowRunFilterName(any_=["compare small"]))
        (parent,) = client.read_flow_runs(flow_run_filter=named, sort="START_TIME_ASC", limit=1)
        below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent.id]))
        children = client.read_flow_runs(flow_run_filter=below)
    assert parent.state_name == "Failed", "one of its variants has failed"
    trained = [run for run in children if run.name.startswith("train ")]
    assert sorted(run.name for run in trained) == sorted(f"train {name}" for name in RUNS)
    assert {run.state_name for run in children} == {"Completed"}


def test_a_variant_that_fails_is_said_and_loses_no_other(compared: Compared) -> None:
    assert compared.output.code == 1
    assert "failed    small-kd-code-only-s0, small-kd-code-only-s1: variant 'code only'" in compared.output.out
    assert "domain 'zh_books' has no weight" in compared.output.out
    assert {run.variant for run in compared.comparison.failed} == {"code only", "too long"}
    page = (compared.folder / "index.html").read_text(encoding="utf-8")
    assert "4 of 8 runs failed" in page


def test_stores_that_cannot_be_had_are_refused_before_any_work_for_others(compared: Compared) -> None:
    output = compared.output.err
    refused = output.index("small-ddk-too-long-s0, small-ddk-too-long-s1 failed: ")
    assert "takes at most 1023" in output[refused:].splitlines()[0]
    assert refused < output.index("pack code"), "the variants before it had not begun"


def matrices(role: str) -> int:
    """Weights that a position is multiplied with; the embedding, which is tied, as the projection that it is too."""
    shapes = []
    for path in (ASSETS / role).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (no mapping)
    return sum(rows * columns[0] for rows, *columns in shapes if columns)


def test_the_report_says_what_the_runs_hold(compared: Compared) -> None:
    comparison = compared.comparison
    assert set(comparison.domains) == set(DOMAINS)
    for run in comparison.runs:
        if run.status == "complete":
            assert run.records == tuple(MixtureHistory(str(compared.root / "runs" / run.run)).records())
            assert run.tokens == 6 * 8 * 96
            assert run.validation_positions == 3 * 6 * 96
            assert run.training_flops == 3 * run.tokens * (2 * matrices("student") + 4 * 2 * 128 * 96)
            assert run.teacher_forwards("stored") == run.tokens * (2 * matrices("teacher") + 4 * 4 * 256 * 96)
    with open(compared.folder / "runs.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "complete" and row["domain"]]
    assert len(rows) == 4 * 3
    ratios = {
        (run.run, gap.domain): gap.ratio for run in comparison.runs if run.records for gap in run.records[-1].gaps
    }
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(ratios[row["run"], row["domain"]])
    variants = {variant.name: variant for variant in comparison.variants}
    assert variants["kd"].settings == {}, "the methods differ in nothing else"
    assert comparison.settings["train.steps"] == "6"
    assert f"report    {compared.folder}/index.html" in compared.output.out


def test_the_seed_changes_what_is_drawn_and_nothing_before_it(compared: Compared) -> None:
    by_run = {run.run: run.records for run in compared.comparison.runs}
    first, second = by_run["small-kd-s0"], by_run["small-kd-s1"]
    assert first[0] == second[0]
    assert first[-1].perplexities != second[-1].perplexities


def test_it_goes_on_with_what_is_missing(compared: Compared, ddk: Ddk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(compared.root, root)
    lost = root / "runs" / "small-ddk-s1"
    (lost / "summary.json").unlink()
    shutil.rmtree(lost / "checkpoints")
    for record in ("00002.json", "00003.json"):
        (lost / "mixtures" / record).unlink()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    config = write_config(tmp_path, root=str(root))
    reported = ddk("compare", config, "--methods", "kd,ddk", "--seeds", "0,1", "--report-only")
    assert reported.code == 0, reported.err
    assert "waiting   small-ddk-s1" in reported.out
    output = ddk("compare", config, "--methods", "kd,ddk", "--seeds", "0,1")
    assert output.code == 0, output.err
    assert "small-kd-s0: complete already" in output.err
    assert "captured" not in output.err
    touched = {path.relative_to(root).parts[:2] for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert touched <= {("runs", "small-ddk-s1"), ("comparisons", "small")}
    comparison = read_comparison(str(root), "small")
    assert comparison.failed == []
    assert {run.run: run.records for run in comparison.runs} == {
        run.run: run.records for run in compared.comparison.runs if run.records
    }, "the same numbers, bit for bit"


def test_complete_runs_with_other_settings_are_not_taken_for_these(compared: Compared, ddk: Ddk) -> None:
    before = {name: files_below(compared.root / "runs" / name) for name in RUNS}
    kept = (compared.folder / "comparison.json").read_bytes()
    output = ddk("compare", compared.config, "--methods", "kd", "--seeds", "0", "--set", "loss.gamma=0.5")
    assert output.code == 1
    assert "loss.gamma: 0.2 → 0.5" in output.out
    assert {name: files_below(compared.root / "runs" / name) for name in RUNS} == before
    (compared.folder / "comparison.json").write_bytes(kept)


def test_a_mistake_in_the_call_starts_nothing(compared: Compared, ddk: Ddk) -> None:
    output = ddk("compare", compared.config, "--sweep", "loss.gama=0,1", "--name", "never")
    assert output.code == 2
    assert "did you mean gamma" in output.err
    assert not (compared.root / "comparisons" / "never").exists()
