"""What a user gets wrong: one line that names the cause, the place and the remedy; exit code 2; nothing lost."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import ASSETS, write_config

from ddk.errors import LostPartError
from flows.__main__ import _exit_code, main

pytestmark = pytest.mark.usefixtures("prefect_server")


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and what stood on stderr besides the log."""
    monkeypatch.setattr(sys, "argv", ["ddk", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().err


def config_with(folder: Path, **changes: Any) -> str:
    """A configuration with one domain, 'mine', as given, and no other."""
    import yaml

    path = write_config(folder, **{key: value for key, value in changes.items() if key != "mine"})
    if "mine" in changes:
        data = yaml.safe_load(Path(path).read_text())
        data["domains"] = {"mine": {"validation": f"{ASSETS}/corpora/math/validation.jsonl.gz", **changes["mine"]}}
        Path(path).write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"steps": 0}}, "train.steps: Input should be greater than or equal to 1 (it is 0)"),
        ({"train": {"step": 5}}, "train.step: there is no such field (did you mean steps?)"),
        ({"methd": "ddk"}, "methd: there is no such field (did you mean method?)"),
        (
            {"method": "magic"},
            "method: Input should be 'ddk', 'ddk_retain', 'ddk_no_smoothing', 'ddk_equal', 'kd', 'cpt', 'minillm', "
            "'cpt_doremi' or 'ted' (it is 'magic')",
        ),
        ({"loss": {"temperature": 2.0}}, "set loss.tail: renormalise, or loss.temperature: 1.0"),
        ({"loss": {"gamma_of": {"mth": 1.0}}}, "loss.gamma_of: there is no domain 'mth'; the domains are"),
        (
            {"loss": {"min_entropy": 0.5}, "teacher": {"source": "prompt_logprobs"}},
            "loss.min_entropy reads the entropy of the teacher's distribution, and the targets of domain",
        ),
        ({"train": {"micro_batch_size": 3}}, "micro_batch_size 3 does not divide batch_size 8"),
        ({"run": "../escape"}, "run: String should match pattern"),
    ],
)
def test_a_wrong_field_is_named(ddk_error: Any, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    message = ddk_error("pack", config_with(tmp_path, **({"loss": {}} | changes)))
    assert expected in message
    assert "config.yaml" in message


def test_all_wrong_fields_are_named_at_once(ddk_error: Any, tmp_path: Path) -> None:
    message = ddk_error("pack", config_with(tmp_path, train={"steps": 0}, mixture={"alpha": 2}))
    assert "train.steps" in message
    assert "mixture.alpha" in message


def test_broken_yaml_names_line_and_column(ddk_error: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("run: a\ndomains: {math: [\n")
    assert "broken.yaml:3:1: not valid YAML" in ddk_error("pack", str(path))


def test_a_missing_configuration(ddk_error: Any, tmp_path: Path) -> None:
    assert "there is no configuration file" in ddk_error("distill", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (b'{"text": "fine"}\n{"text": \n', "mine.jsonl, line 2"),
        (b'{"text": "fine"}\n{"body": "x"}\n', "mine.jsonl, line 2"),
        (b'{"text": "fine"}\n{"text": "\xff"}\n', "mine.jsonl, line 2"),
        (b"", "domain 'mine'"),
        (b'{"text": "too short"}\n', "domain 'mine' has fewer train tokens than one block of 97"),
    ],
)
def test_bad_data_names_file_and_line_and_leaves_no_complete_store(
    ddk_error: Any, tmp_path: Path, lines: bytes, expected: str
) -> None:
    (tmp_path / "mine.jsonl").write_bytes(lines)
    message = ddk_error("pack", config_with(tmp_path, mine={"train": "mine.jsonl"}))
    assert expected in message
    assert not list((tmp_path / "root").glob("blocks/*/*.zarr/zarr.json"))


def test_too_little_validation_text(ddk_error: Any, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "too short"}\n')
    train = f"{ASSETS}/corpora/math/train.jsonl.gz"
    mine = {"train": train, "validation": "short.jsonl", "max_train_blocks": 5}
    message = ddk_error("pack", config_with(tmp_path, mine=mine))
    assert "domain 'mine' has fewer validation tokens than one block of 97" in message
    assert "give it more validation text" in message


def test_a_weight_that_a_leaf_lacks_is_named_before_anything_is_packed(ddk_error: Any, tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x", "topic": "a"}\n{"text": "y", "topic": "b"}\n')
    mine = {"train": "train.jsonl", "validation": "valid.jsonl", "path_field": "topic"}
    config = config_with(tmp_path, mine=mine, method="kd", mixture={"weights": {"mine/a": 1.0}})
    message = ddk_error("distill", config)
    assert "mixture.weights: domain 'mine/b' has no weight; give one to each of mine/a, mine/b" in message
    assert not (tmp_path / "root" / "blocks").exists()


def test_the_same_file_for_training_and_validation(ddk_error: Any, tmp_path: Path) -> None:
    both = f"{ASSETS}/corpora/math/validation.jsonl.gz"
    assert "for training and for validation" in ddk_error("pack", config_with(tmp_path, mine={"train": both}))


@pytest.mark.parametrize("command", ["cache", "train"])
def test_a_stage_before_its_time_names_the_one_before(ddk_error: Any, tmp_path: Path, command: str) -> None:
    message = ddk_error(command, config_with(tmp_path))
    assert "run `ddk pack` first" in message or "run `ddk cache` first" in message


def test_a_report_of_no_run(ddk_error: Any, tmp_path: Path) -> None:
    assert "has measured nothing yet" in ddk_error("report", config_with(tmp_path))


def test_inspecting_nothing(ddk_error: Any, tmp_path: Path) -> None:
    assert "is neither a store" in ddk_error("inspect", str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": {"model": "./no-teacher"}}, "no-teacher', and there is no such folder; correct the path"),
        ({"teacher": {"k": 5000}}, "teacher.k is 5000"),
        ({"packing": {"seq_len": 2000}}, "packing.seq_len is 2000"),
    ],
)
def test_models_that_do_not_fit(ddk_error: Any, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert expected in ddk_error("pack", config_with(tmp_path, **changes))


def test_a_pickled_model_is_not_read(ddk_error: Any, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(ASSETS / "teacher", tmp_path / "pickled")
    for weights in (tmp_path / "pickled").glob("*.safetensors"):
        weights.rename(weights.with_name("pytorch_model.bin"))
    assert "lacks *.safetensors: its weights are in pytorch_model.bin" in ddk_error(
        "pack", config_with(tmp_path, teacher={"model": "./pickled"})
    )


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["ddk", "pack", str(tmp_path / "none.yaml"), "--debug"])
    with pytest.raises(ValueError, match="there is no configuration file"):
        main()


def test_usage_errors_exit_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = call(capsys, monkeypatch, "distil")
    assert code == 2
    assert "No such command" in err


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ddk", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    commands = ("quickstart", "distill", "pack", "cache", "train", "gap", "report", "inspect", "verify")
    for command in (*commands, "import", "export"):
        assert command in out


def test_a_failure_that_is_no_mistake_of_the_user_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("the engine fell over")

    monkeypatch.setattr("flows.stages.plan_stores", broken)
    code, err = call(capsys, monkeypatch, "pack", config_with(tmp_path))
    assert code == 1
    assert "ddk: RuntimeError: the engine fell over" in err
    assert "this looks like a bug in ddk; --debug shows the traceback" in err
    assert "the same command resumes from there" in err


class PanicError(BaseException):
    """As libraries of Rust raise them: no Exception."""


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (MemoryError("Unable to allocate 9 GiB"), 2, "there is not enough memory (Unable to allocate 9 GiB); lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), 2, "lower train.micro_batch_size"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 2, "/x: this process may open no more files; raise"),
        (RuntimeError("Failed to reach API at http://x/api"), 2, "the Prefect server does not answer any more"),
        (PanicError("index out of range"), 1, "PanicError: index out of range"),
        (KeyError("a\nb" * 5000), 1, "this looks like a bug in ddk"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, expected: int, says: str
) -> None:
    def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("flows.stores.describe.describe", broken)
    code, err = call(capsys, monkeypatch, "inspect", "x")
    assert code == expected
    assert says in err
    assert len(err) < 2000
    assert ("looks like a bug" in err) is (code == 1)


@pytest.mark.parametrize(
    ("root", "says"),
    [
        ("config.yaml", "config.yaml is a file, or a link to nothing; name a folder"),
        ("config.yaml/below", "config.yaml/below lies below a file; name a folder"),
        ("/proc/ddk", "the folder /proc/ddk cannot be made (No such file or directory); name another, or make it"),
    ],
)
def test_a_root_that_is_no_folder(ddk_error: Any, tmp_path: Path, root: str, says: str) -> None:
    message = ddk_error("plan", config_with(tmp_path, root=root))
    assert message.replace(f"{tmp_path}/", "") == f"ddk: root: {says}"


def test_the_loss_of_a_part_is_one_line_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    def lose() -> None:
        raise LostPartError("the engine's process was killed by signal 9")

    assert _exit_code(lose, debug=False) == 1
    assert capsys.readouterr().err == "ddk: the engine's process was killed by signal 9\n"


def test_missing_credentials_are_explained(ddk_error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    from storage.files.s3 import S3

    S3.clear_instance_cache()
    found = "no credentials for S3 were found; set AWS_ACCESS_KEY_ID"
    assert f"s3://nowhere/ddk/complete.json: {found}" in ddk_error(
        "plan", config_with(tmp_path, root="s3://nowhere/ddk")
    )
    S3.clear_instance_cache()
    corpus = config_with(tmp_path, mine={"train": "s3://nowhere/*.jsonl"})
    assert f"domain 'mine', pattern 's3://nowhere/*.jsonl': {found}" in ddk_error("plan", corpus)
    S3.clear_instance_cache()


def test_a_server_that_refuses_the_connection_is_named(ddk_error: Any) -> None:
    message = ddk_error("inspect", "http://127.0.0.1:9/x.zarr")
    assert "http://127.0.0.1:9/x.zarr/manifest.json: the server does not answer" in message
    assert "there is no protocol 'foo://'" in ddk_error("verify", "foo://x")
