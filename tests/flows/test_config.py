"""What a configuration says of domains with a path, before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from small_run import small_config, write_config

from ddk.errors import UserError
from flows.config import Config, load_config

PLAIN = {"train": "a.jsonl", "validation": "v.jsonl"}
FILED = {**PLAIN, "path_field": "topic"}


def config(domains: dict[str, Any], **changes: Any) -> Config:
    return Config.model_validate({**small_config(**changes), "domains": domains})


@pytest.mark.parametrize("name", ["math/algebra", "math/algebra/linear-2", "m.1/x"])
def test_a_domain_may_be_named_by_a_path(name: str) -> None:
    assert list(config({name: PLAIN, "web": FILED}).domains) == [name, "web"]


@pytest.mark.parametrize("name", ["/math", "math/", "math//algebra", "math/../x", "math/ algebra", "a/" * 99 + "a"])
def test_what_is_no_name_of_a_domain(name: str) -> None:
    with pytest.raises(ValidationError, match="String should"):
        config({name: PLAIN})


def test_a_run_is_no_path() -> None:
    with pytest.raises(ValidationError, match="String should match pattern"):
        config({"math": PLAIN}, run="a/b")


def test_a_domain_above_another_is_refused_unless_its_records_have_paths() -> None:
    with pytest.raises(ValidationError, match="'math' has documents of its own, and 'math/algebra' lies below it"):
        config({"math": PLAIN, "math/algebra": PLAIN})
    assert config({"math": FILED, "math/algebra": PLAIN})


def test_a_field_of_a_domain_with_a_path_can_be_set(tmp_path: Path) -> None:
    path = write_config(tmp_path, domains={"math/algebra": {**FILED, "path_depth": 1}})
    loaded = load_config(path, ["domains.math/algebra.path_depth=3", "mixture.level=2"])
    assert loaded.domains["math/algebra"].path_depth == 3
    assert loaded.domains["math/algebra"].train == [str(tmp_path / "a.jsonl")]
    assert loaded.mixture.level == 2
    with pytest.raises(UserError, match=r"domains.math/algebra.path_feild: there is no such field .*path_field\?"):
        load_config(path, ["domains.math/algebra.path_feild=x"])


@pytest.mark.parametrize(
    ("level", "weights", "message"),
    [
        (None, {"web": 1, "math/algebra": 2, "math/geometry": 3}, None),
        (1, {"web": 1, "math": 2}, None),
        (2, {"web": 1, "math/algebra": 2}, None),
        (None, {"web": 1, "math": 2}, "domain 'math/…' has no weight; give one to each of math/…, web"),
        (1, {"web": 1, "math/algebra": 2}, "domain 'math' has no weight; give one to each of math, web"),
        (None, {"math/algebra": 2}, "domain 'web' has no weight"),
        (None, {"web": 1, "math/algebra": 2, "mathematics": 1}, "there is no domain 'mathematics'"),
    ],
)
def test_weights_of_leaves_that_only_the_records_know(
    level: int | None, weights: dict[str, float], message: str | None
) -> None:
    domains = {"web": PLAIN, "math": FILED}
    settings = {"method": "kd", "mixture": {"level": level, "weights": weights}}
    if message is None:
        assert config(domains, **settings)
    else:
        with pytest.raises(ValidationError, match=message):
            config(domains, **settings)


WITH_KEYS = "s3://SECRETID:s3cr3t@bucket/x"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"root": WITH_KEYS}, "root"),
        ({"teacher": {"model": WITH_KEYS}}, "teacher.model"),
        ({"student": {"model": "https://s3cr3t@host/m"}}, "student.model"),
        ({"domains": {"m": {**PLAIN, "train": ["a.jsonl", WITH_KEYS]}}}, "domains.m.train.1"),
        (
            {"domains": {"m": {**PLAIN, "validation": "https://h/v.jsonl?X-Amz-Signature=s3cr3t"}}},
            "domains.m.validation.0",
        ),
        ({"domains": {"m": {**PLAIN, "compression_config": WITH_KEYS}}}, "domains.m.compression_config"),
        ({"teacher": {"source": "server", "server_url": "http://u:s3cr3t@h/v1"}}, "teacher: server_url"),
        ({"tracking": {"mlflow_uri": "https://u:s3cr3t@h", "mlflow_experiment": "e"}}, "tracking: mlflow_uri"),
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(
    tmp_path: Path, changes: dict[str, Any], place: str
) -> None:
    with pytest.raises(UserError, match=r"hold") as error:
        load_config(write_config(tmp_path, **changes))
    assert place in str(error.value)
    assert "s3cr3t" not in str(error.value)
    # As Prefect checks the parameters of a deployment.
    with pytest.raises(ValidationError) as refused:
        Config.model_validate({**small_config(), **changes})
    assert "SECRETID" not in str(refused.value)


def test_nor_is_one_of_the_command_line(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    for given in ({"root": WITH_KEYS}, {"overrides": [f"root={WITH_KEYS}"]}):
        with pytest.raises(UserError, match=r"root: the address holds a password, key or signature") as error:
            load_config(path, **given)  # type: ignore[arg-type]
        assert "SECRETID" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=true", "train.steps: it must be a number, not true or false"),
        ("train.steps=1" + 40 * "0", "train.steps: Input should be less than or equal to 1000000000"),
        ("train.steps='" + 5000 * "9" + "'", "train.steps: Unable to parse input string as an integer"),
        ("train.steps=" + 5000 * "9", "--set train.steps=9999"),
        ("train.steps=010", "--set train.steps=010: YAML reads 010 as octal"),
        ("train.steps={a: 1, a: 2}", "the key 'a' stands here a second time"),
        ("train.processes=true", "train.processes: it must be a number"),
        ("train.learning_rate=.inf", "train.learning_rate: Input should be a finite number"),
        ("train.learning_rate=1e999", "train.learning_rate: Input should be a finite number"),
        ("train.learning_rate=1e6", "train.learning_rate: Input should be less than or equal to 10"),
        ("train.gradient_clip=.inf", "train.gradient_clip: Input should be a finite number"),
        ("loss.gamma=.nan", "loss.gamma: Input should be a finite number"),
        ("loss.temperature=1e-300", "loss.temperature: Input should be greater than or equal to 0.001"),
        ("mixture.stop_ratio=nan", "mixture.stop_ratio: Input should be a finite number"),
        ("ted.weight=.inf", "ted.weight: Input should be a finite number"),
        ("teacher.tail_temperatures=[0]", "teacher.tail_temperatures.0: Input should be greater than"),
        ("teacher.tail_temperatures=[2, 2]", "name each temperature once"),
        ("teacher.tail_temperatures=[true]", "teacher.tail_temperatures: it must be a number"),
        ("run=no", "run: Input should be a valid string (it is False); write it in quotes if it is a name"),
        ("run=", "run: Input should be a valid string (it is empty)"),
        ('teacher.model=""', "teacher.model: String should have at least 1 character"),
        ('domains.math.train=""', "domains.math.train.0: String should have at least 1 character"),
        ("domains.math.train=[" + 500 * "1, " + "1]", "; and 493 more"),
        ('root=""', "root: it is empty; name a folder, or s3://bucket/prefix"),
        ('root="a\\0b"', "root: it holds a NUL character"),
        ("root=foo://x", "root: there is no protocol 'foo://'"),
        ("root=s3://", "root: s3:// names no bucket; write s3://bucket/prefix"),
        ("root=s3:/bucket/x", "root: s3:/ is taken for a folder; write s3://"),
        ("root=http://127.0.0.1:9/x", "root: nothing can be written to http://"),
        ("root=gs://bucket/x", "root: gs:// needs a package that is not installed"),
        ("loss=", "loss: it must be a section with fields of its own, and is empty"),
    ],
)
def test_what_is_no_value_is_refused_by_its_name(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(write_config(tmp_path), [override])
    message = str(refused.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 1000
    assert "SECRET" not in message


def test_an_empty_root_of_the_command_line_is_not_the_folder_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="root: it is empty"):
        load_config(write_config(tmp_path), root="")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is a folder; name the YAML file in it"),
        (b"run: caf\xe9\n", "is no text in UTF-8 (byte 0xe9 at 8)"),
        ("run: a\n".encode("utf-16"), "is no text in UTF-8"),
        (b"\0" * 99, "not valid YAML"),
        (b"", "must hold a mapping of sections"),
        (b"domains:\n  no: {train: x.jsonl}\n", "c.yaml:2:3: YAML reads the key no as true or false"),
    ],
)
def test_what_is_no_configuration_file(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "c.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_config(str(path))
    assert says in str(refused.value)
    assert "c.yaml" in str(refused.value)
