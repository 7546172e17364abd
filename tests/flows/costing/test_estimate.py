"""`ddk plan --cost`: from configurations and models' configs alone, and against a run that was really made."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_run import ASSETS, SmallRun, files_below, small_config, write_config

from flows.__main__ import main
from flows.config import load_config
from flows.costing.estimate import Cost, Figure, estimate
from flows.costing.run_size import Assumptions
from flows.costing.table import shown, table


def cost(path: str, *overrides: str, **assumed: Any) -> Cost:
    return estimate(load_config(path, overrides), Assumptions(**assumed))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ddk", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Of corpora that are not there, and models of which only the configs are."""
    for model in ("teacher", "student"):
        (tmp_path / model).mkdir()
        shutil.copy(ASSETS / model / "config.json", tmp_path / model)
    nowhere = {"train": "s3://no-such-bucket/*.jsonl", "validation": "s3://no-such-bucket/valid.jsonl"}
    domains = {name: {**domain, **nowhere} for name, domain in small_config()["domains"].items()}
    return write_config(
        tmp_path,
        root="s3://no-such-bucket/ddk",
        domains=domains,
        teacher={"model": "teacher"},
        student={"model": "student"},
    )


def test_a_run_took_what_was_expected(small_run: SmallRun) -> None:
    before = files_below(small_run.root)
    found = cost(small_run.config)
    assert files_below(small_run.root) == before, "nothing is hashed or written"
    sizes = {path: len(content) for path, content in before.items()}

    def stored(folder: str, suffix: str = "") -> int:
        return sum(size for path, size in sizes.items() if path.startswith(folder) and path.endswith(suffix))

    targets = sum(size for path, size in sizes.items() if path.startswith("targets/") and "/c/" in path)
    assert targets < found.value("disk", "targets, at most")
    assert found.value("disk", "targets, expected") == pytest.approx(targets, rel=0.25)
    tokens = sum(size for path, size in sizes.items() if path.startswith("blocks/") and "/c/" in path)
    most = found.value("disk", "token blocks, at most")
    assert 0.5 * most < tokens <= most
    student = found.value("models", "student")
    one = stored("runs/small/checkpoints/step-00000002/", ".safetensors")
    assert one == pytest.approx(12 * student, rel=0.01)
    assert found.value("disk", "checkpoints") == 10 * 12 * student
    assert stored("runs/small/student/", ".safetensors") == pytest.approx(found.value("disk", "student"), rel=0.01)
    assert found.value("positions", "training") == 6 * 8 * 96
    assert found.value("positions", "captured") == 3 * (40 + 6) * 96
    measured = len([path for path in sizes if path.startswith("runs/small/mixtures/")])
    assert found.value("positions", "gap") == measured * 3 * 6 * 96


def test_nothing_but_configs_is_needed(config: str) -> None:
    found = cost(config)
    assert found.value("models", "teacher") == 4_215_040
    assert found.warnings == []
    assert "no-such-bucket" not in json.dumps([figure.how for figure in found.figures])


def test_the_command_says_it_in_a_table_and_in_json(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, "plan", config, "--cost", "--gpu", "a100", "--usd-per-hour", "2") == 0
    out = capsys.readouterr().out
    for words in (
        "What small will take, on A100 GPUs of 80 GiB",
        "targets, at most",
        "not measured",
        "USD",
    ):
        assert words in out
    assert call(monkeypatch, "plan", config, "--cost", "--json", "--mfu", "0.2", "--gpu-memory", "24") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["assumed"]["mfu"] == 0.2
    assert (data["assumed"]["gpu_memory"], data["assumed"]["gpu_flops"]) == (24, 989e12)
    assert {figure["section"] for figure in data["figures"]} >= {"positions", "disk", "student, one GPU", "GPU time"}
    assert all(figure["how"] for figure in data["figures"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cost", "--gpu", "b9000"], "--gpu is 'b9000'; there are a100, h100, h200"),
        (["--cost", "--mfu", "1.5"], "--mfu is 1.5; it is a share of the peak"),
        (["--json"], "--json needs --cost"),
        (["--cost", "--gpus", "3"], "batch_size 8 cannot be shared equally by 3 processes"),
        (["--cost", "--set", "teacher.model=nobody/nothing"], "fetch it (`hf download nobody/nothing config.json`)"),
        (["--cost", "--set", "student.model=./gone"], "has no config.json here"),
    ],
)
def test_what_a_user_gets_wrong(
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    assert call(monkeypatch, "plan", config, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_config_that_is_no_language_models(config: str, tmp_path: Path) -> None:
    from ddk.errors import UserError

    (tmp_path / "student" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"the size of student.model .* cannot be worked out from its config"):
        cost(config)
    (tmp_path / "student" / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UserError, match=r"config.json of .* cannot be read, and a plan runs no code"):
        cost(config)


def test_the_models_own_config_comes_before_the_bundled_one(config: str, tmp_path: Path) -> None:
    bundled = cost(config, "teacher.model=Qwen/Qwen2.5-14B").value("models", "teacher")
    assert bundled == 14_770_033_664
    shutil.copytree(tmp_path / "teacher", tmp_path / "Qwen" / "Qwen2.5-14B")
    assert cost(config, "teacher.model=Qwen/Qwen2.5-14B").value("models", "teacher") == 4_215_040


def test_blocks_that_nobody_knows(config: str) -> None:
    limits = [f"domains.{name}.max_train_blocks=null" for name in ("math", "code")]
    found = cost(config, *limits)
    share = 6 * 8 // 3
    assert found.value("positions", "captured") == (40 + 2 * share + 3 * 6) * 96
    assert len(found.warnings) == 1
    assert "max_train_blocks is not set for code, math" in found.warnings[0]
    assert f"{share} blocks each (an equal share of what training draws)" in found.warnings[0]
    found = cost(config, *limits, blocks=1000)
    assert found.value("positions", "captured") == (40 + 2000 + 3 * 6) * 96
    assert "1,000 blocks each (--blocks)" in found.warnings[0]
    found = cost(config, "domains.math.max_validation_blocks=null")
    assert "max_validation_blocks is not set for math; assuming 500 each" in found.warnings[0]


@pytest.mark.parametrize(
    ("overrides", "assumed", "warning"),
    [
        ((), {"gpu_memory": 1.0}, "the teacher needs 1.7 GiB of each GPU"),
        ((), {"gpu_memory": 1.0}, "training needs 1.5 GiB of each GPU, which has 1"),
        (("packing.seq_len=1024",), {}, "teacher.model takes 1,024 positions, and packing.seq_len is 1,024"),
        (("packing.seq_len=512",), {}, "student.model takes 256 positions, and packing.seq_len is 512"),
        (("student.context={target: 128}",), {}, "student knows 256 positions already"),
        (("teacher.model=Qwen/Qwen3-14B-Base",), {}, "do they share a tokenizer?"),
    ],
)
def test_what_does_not_fit(config: str, overrides: tuple[str, ...], assumed: dict[str, Any], warning: str) -> None:
    assert any(warning in found for found in cost(config, *overrides, **assumed).warnings)


def test_a_student_for_longer_contexts_takes_longer_blocks(config: str) -> None:
    found = cost(config, "packing.seq_len=512", "student.context={target: 1024}")
    assert not [one for one in found.warnings if "positions" in one]


def test_each_assumption_has_its_effect(config: str) -> None:
    whole = "train.micro_batch_size=null"
    plain = cost(config, whole, gpus=8)
    assert cost(config, whole, gpus=8, mfu=0.2).value("GPU time", "all") == pytest.approx(
        2 * plain.value("GPU time", "all")
    )
    assert cost(config, whole, gpu="a100", gpus=8).value("GPU time", "all") == pytest.approx(
        plain.value("GPU time", "all") * 989 / 312
    )
    clock = "training and gap, by the clock"
    one = cost(config, whole, gpus=1)
    assert one.value("GPU time", clock) == pytest.approx(8 * plain.value("GPU time", clock))
    # What the configuration says of its processes counts, not --gpus.
    assert cost(config, whole, "train.processes=2", gpus=8).value("GPU time", clock) == pytest.approx(
        one.value("GPU time", clock) / 2
    )
    assert cost(config, usd_per_hour=3.0).value("GPU time", "price") == pytest.approx(
        3 * cost(config).value("GPU time", "all")
    )


def test_methods_and_imported_domains(config: str) -> None:
    ddk, cpt, ted = (cost(config, f"method={method}") for method in ("ddk", "cpt", "ted"))
    operations = "training, operations"
    assert cpt.value("GPU time", operations) == ddk.value("GPU time", operations)
    assert ted.value("GPU time", operations) > 1.5 * ddk.value("GPU time", operations)
    assert ted.value("student, one GPU", "live teacher") > 2 * ted.value("models", "teacher")
    imported = cost(config, "domains.math.targets=topk")
    assert imported.value("GPU time", "capture, operations") == pytest.approx(
        ddk.value("GPU time", "capture, operations") * 2 / 3
    )
    assert imported.value("disk", "targets, expected") == ddk.value("disk", "targets, expected")


@pytest.mark.parametrize(
    ("section", "unit", "value", "text"),
    [
        ("disk", "bytes", 2.1e12, "2.1 TB"),
        ("disk", "bytes", 999, "999 B"),
        ("student, one GPU", "bytes", 3 * 2**30, "3.0 GiB"),
        ("host", "bytes", 68_800_000, "65.6 MiB"),
        ("positions", "positions", 15_728_640_000, "15.73 billion"),
        ("GPU time", "GPU hours", 1361.2, "1,360 GPU h"),
        ("GPU time", "hours", 0.435, "0.435 h"),
        ("GPU time", "FLOP", 4.48e20, "4.48e+20 FLOP"),
        ("GPU time", "USD", 12_345.0, "12,300 USD"),
    ],
)
def test_figures_are_shown_with_the_digits_that_they_have(section: Any, unit: Any, value: float, text: str) -> None:
    assert shown(Figure(section=section, what="", value=value, unit=unit, how="")) == text


def test_the_table_has_every_figure(config: str) -> None:
    found, page = cost(config), io.StringIO()
    Console(width=400, file=page).print(table(found, "small"))  # no path of this machine is broken
    assert all(figure.what in page.getvalue() and figure.how in page.getvalue() for figure in found.figures)


def test_hours_below_a_minute_are_seconds() -> None:
    def said(hours: float) -> str:
        return shown(Figure(section="GPU time", what="gap", value=hours, unit="GPU hours", how=""))

    assert [said(hours) for hours in (1e-9, 2.96e-6, 0.0125, 0.77, 2345.6)] == [
        "< 0.001 GPU s",
        "0.0107 GPU s",
        "45 GPU s",
        "0.77 GPU h",
        "2,350 GPU h",
    ]
