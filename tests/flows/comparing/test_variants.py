"""From the options of `ddk compare` to the configuration of every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from small_run import write_config

from ddk.errors import UserError
from ddk.methods.registry import MethodName
from flows.comparing.variants import IN_ORDER, Request, planned_runs, request, whole_numbers
from flows.config import Config, load_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


def runs_of(config: Config, **options: Any) -> dict[str, Config]:
    asked = request(config, "/", **{"seeds": [0], **options})
    return {run.run: run.config for run in planned_runs(config, asked) if run.config is not None}


def test_all_methods_have_their_place() -> None:
    assert set(IN_ORDER) == set(get_args(MethodName))


def test_by_default_every_method_that_needs_no_live_teacher(config: Config) -> None:
    asked = request(config, "/")
    assert [variant.name for variant in asked.variants] == [name for name in IN_ORDER if name != "ted"]
    assert asked.left_out == {"ted": "it runs the live teacher beside the student; name it with --methods"}
    assert (asked.name, asked.seeds, asked.baseline) == ("small", (0, 1, 2), "ddk")
    assert [variant.name for variant in request(config, "/", methods=["ted"]).variants] == ["ted"]


def test_methods_that_the_configuration_cannot_run_are_left_out_unless_named(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, loss={"tail": "residual"}))
    asked = request(config, "/")
    assert "minillm" not in [variant.name for variant in asked.variants]
    assert "set tail: bucket" in asked.left_out["minillm"]
    named = request(config, "/", methods=["kd", "minillm"])
    refusals = {run.run: run.refusal for run in planned_runs(config, named)}
    assert refusals["small-kd-s0"] is None
    assert "set tail: bucket" in (refusals["small-minillm-s0"] or "")


def test_runs_go_seed_by_seed_and_differ_in_nothing_else(config: Config) -> None:
    runs = runs_of(config, methods=["kd", "ddk"], seeds=[3, 5])
    assert list(runs) == ["small-kd-s3", "small-ddk-s3", "small-kd-s5", "small-ddk-s5"]
    plain = config.model_dump()
    for run in runs.values():
        changed = {name for name, value in run.model_dump().items() if value != plain[name]}
        assert changed <= {"run", "seed", "method", "train"}
        assert run.train == config.train.model_copy(update={"keep_checkpoints": 1})
    assert [run.seed for run in runs.values()] == [3, 3, 5, 5]


def test_a_sweep_has_a_run_for_each_value(config: Config) -> None:
    runs = runs_of(config, sweeps=["mixture.interval=1,2"])
    assert {name: (run.method, run.mixture.interval) for name, run in runs.items()} == {
        "small-ddk-mixture.interval-1-s0": ("ddk", 1),
        "small-ddk-mixture.interval-2-s0": ("ddk", 2),
    }
    asked = request(config, "/", sweeps=["mixture.interval=1,2"])
    assert [variant.name for variant in asked.variants] == ["mixture.interval=1", "mixture.interval=2"]
    assert asked.baseline == "mixture.interval=1"


def test_two_sweeps_and_two_methods_are_a_grid(config: Config) -> None:
    options = {"methods": ["kd", "ddk_equal"], "sweeps": ["loss.gamma=0.1,1e-3", "loss.tail=bucket,residual"]}
    runs = runs_of(config, **options)
    assert len(runs) == 8
    run = runs["small-kd-loss.gamma-1e-3-loss.tail-residual-s0"]
    assert (run.method, run.loss.gamma, run.loss.tail) == ("kd", 1e-3, "residual")
    names = [variant.name for variant in request(config, "/", **options).variants]
    assert names[0] == "kd, loss.gamma=0.1, loss.tail=bucket"


def test_a_variant_by_hand_is_any_change(config: Config) -> None:
    runs = runs_of(
        config, methods=["ddk"], variants=["half code: method=kd; mixture.weights={code: 2, math: 1, zh_books: 1}"]
    )
    run = runs["small-kd-half-code-s0"]
    assert (run.method, run.mixture.weights) == ("kd", {"code": 2, "math": 1, "zh_books": 1})
    paths = runs_of(config, methods=["ddk"], variants=["other: student.model=./there"])
    assert paths["small-ddk-other-s0"].student.model == "/there", "relative to the configuration's folder"


def test_doremi_is_compared_with_plain_training_of_the_same_seed(config: Config) -> None:
    runs = runs_of(config, methods=["cpt_doremi", "ddk"], seeds=[0, 1])
    assert list(runs)[:3] == ["small-cpt-s0", "small-cpt_doremi-s0", "small-ddk-s0"], "the reference comes first"
    for seed in (0, 1):
        assert runs[f"small-cpt_doremi-s{seed}"].mixture.reference_run == f"small-cpt-s{seed}"
    notes = {one.name: one.note for one in request(config, "/", methods=["cpt_doremi"]).variants}
    assert notes["cpt"] == "the reference of cpt_doremi"
    both = request(config, "/", methods=["cpt_doremi", "cpt"])
    assert [(one.name, one.note is None) for one in both.variants] == [("cpt", True), ("cpt_doremi", False)]


def test_a_reference_shares_what_a_sweep_changes(config: Config) -> None:
    runs = runs_of(config, methods=["cpt_doremi"], sweeps=["train.steps=4,6", "mixture.doremi_step=1,2"])
    assert len(runs) == 4 + 2, "the step size of DoReMi's weights is nothing to its reference"
    run = runs["small-cpt_doremi-train.steps-4-mixture.doremi_step-2-s0"]
    assert run.mixture.reference_run == "small-cpt-train.steps-4-s0"
    assert runs["small-cpt-train.steps-4-s0"].train.steps == 4


def test_a_reference_that_the_file_names_stays_and_is_nobody_elses(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, method="cpt_doremi", mixture={"reference_run": "before"}))
    runs = runs_of(config, methods=["cpt_doremi", "kd"])
    assert {name: run.mixture.reference_run for name, run in runs.items()} == {
        "small-cpt_doremi-s0": "before",
        "small-kd-s0": None,
    }


def test_the_gap_is_measured_inline(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, mixture={"evaluation": "scheduled"}))
    assert {run.mixture.evaluation for run in runs_of(config).values()} == {"inline"}


def test_run_names_stay_short_and_apart(config: Config) -> None:
    sweeps = [f"domains.zh_books.max_train_blocks={n}" for n in ("40,41",)]
    sweeps += ["train.min_learning_rate=0.00001", "train.learning_rate=0.00123"]
    runs = runs_of(config, sweeps=sweeps, seeds=[2**31 - 1], name="n" * 30)
    assert len(runs) == 2
    assert all(len(name) <= 100 for name in runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["magic"]}, "there is no method 'magic'"),
        ({"seeds": []}, "--seeds takes whole numbers"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"sweeps": ["mixture.interval"]}, "--sweep takes section.field=value"),
        ({"sweeps": ["mixture.interval=[1"]}, "not valid YAML"),
        ({"sweeps": ["mixture.intervall=1,2"]}, "did you mean interval"),
        ({"sweeps": ["seed=1,2"]}, "use --seeds"),
        ({"sweeps": ["method=kd,cpt"]}, "use --methods"),
        ({"sweeps": ["loss.gamma=1,1"]}, "two variants have the same name: 'loss.gamma=1'"),
        ({"variants": ["kd: method=kd"]}, "two variants have the same name: 'kd'"),
        ({"variants": ["mine"]}, "--variant takes 'NAME: section.field=value"),
        ({"variants": ["mine: loss.gamma"]}, "'loss.gamma' is not section.field=value"),
        ({"variants": ["mine: root=/"]}, "use --root"),
        ({"baseline": "mine"}, "--baseline 'mine' is not a variant"),
        ({"name": "a/b"}, "choose a --name"),
        ({"name": "n" * 31}, "choose a --name"),
    ],
)
def test_what_is_not_understood_is_refused(config: Config, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        request(config, "/", **options)


def test_seeds_are_numbers() -> None:
    assert whole_numbers("0, 1,7", "--seeds") == [0, 1, 7]
    with pytest.raises(UserError, match="--seeds takes whole numbers"):
        whole_numbers("0;1", "--seeds")


def test_a_request_is_plain_data(config: Config) -> None:
    asked = request(config, "/", sweeps=["loss.gamma=0.1,0.2"], variants=["a: mixture.weights=equal; method=kd"])
    assert Request.model_validate_json(asked.model_dump_json()) == asked
