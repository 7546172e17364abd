"""The presets are valid configurations with the paper's numbers, and what they take is worked out and published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from ddk.cost.shape import shape_of
from flows.config import load_config
from flows.costing.estimate import Cost, estimate
from flows.costing.model_configs import BUNDLED
from flows.costing.run_size import Assumptions
from flows.pages.recipes import PAGE, PRESETS, page, preset_path

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

PUBLISHED = {
    "Qwen--Qwen1.5-14B": 14.2,
    "Qwen--Qwen1.5-1.8B": 1.84,
    "meta-llama--Llama-2-13b-hf": 13.0,
    "TinyLlama--TinyLlama-1.1B-intermediate-step-1431k-3T": 1.10,
    "bigcode--starcoder": 15.5,
    "bigcode--starcoderbase-3b": 3.04,
    "Qwen--Qwen2.5-14B": 14.7,
    "Qwen--Qwen2.5-1.5B": 1.54,
    "Qwen--Qwen3-14B-Base": 14.8,
    "Qwen--Qwen3-1.7B-Base": 1.72,
}
"""Billions of parameters, by their model cards and papers."""


def cost(name: str, **assumed: object) -> Cost:
    return estimate(load_config(preset_path(name)), Assumptions(**assumed))  # type: ignore[arg-type]


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_bundled_config_describes_the_model_that_is_published(model: str) -> None:
    path = Path(BUNDLED) / model
    parameters = shape_of(AutoConfig.from_pretrained(str(path))).parameters
    assert parameters == json.loads((path / "config.json").read_text())["parameters"]
    assert parameters / 1e9 == pytest.approx(PUBLISHED[model], rel=0.006)


def test_no_bundled_config_is_left_out() -> None:
    assert sorted(PUBLISHED) == sorted(path.name for path in Path(BUNDLED).iterdir())
    presets = {path.stem for path in Path(BUNDLED).parent.glob("*.yaml")}
    assert presets == {"quickstart", *PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_valid_and_has_the_papers_numbers(name: str) -> None:
    config = load_config(preset_path(name))
    assert config.method == "ddk"
    train, mixture, loss = config.train, config.mixture, config.loss
    assert (mixture.alpha, mixture.interval, loss.gamma, loss.temperature) == (0.5, 1000, 0.2, 1.0)
    assert (train.steps, train.warmup_steps) == (30_000, 1000)
    assert (train.learning_rate, train.min_learning_rate) == (3e-5, 3e-6)
    assert train.steps * train.batch_size * config.packing.seq_len == pytest.approx(15e9, rel=0.05)
    assert all(domain.max_validation_blocks == 500 for domain in config.domains.values())
    # Training draws as many blocks as there are.
    assert sum(d.max_train_blocks or 0 for d in config.domains.values()) == train.steps * train.batch_size
    shard = config.teacher.shard_blocks * config.packing.seq_len
    assert shard % config.teacher.max_batch_tokens == 0, "a shard is whole passes"


def test_the_papers_domains() -> None:
    domains = {name: list(load_config(preset_path(name)).domains) for name in PRESETS}
    assert len(domains["qwen1.5-14b-1.8b"]) == 10
    assert {"zh_books", "zh_common_crawl", "open_web_math"} < set(domains["qwen1.5-14b-1.8b"])
    assert domains["starcoder-15.5b-3b"] == ["python", "java", "typescript", "c_sharp"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_what_it_is_written_for(name: str) -> None:
    found = cost(name, gpu="a100")
    assert found.warnings == []
    assert found.value("student, one GPU", "total") < 0.8 * 80 * 2**30, "room for what is not reckoned with"
    smaller = cost(name, gpu_memory=40.0)
    assert any("training needs" in warning and "which has 40" in warning for warning in smaller.warnings)


def test_the_cost_is_the_papers() -> None:
    """Of 15 billion tokens, in TFLOPs: CPT 1.456e8, KD 5.364e8, DDK 5.401e8; the teacher is 73% of KD's."""
    config = load_config(preset_path("qwen1.5-14b-1.8b"))
    found = cost("qwen1.5-14b-1.8b")
    positions = found.value("positions", "training")
    student = found.value("GPU time", "training, operations") * 15e9 / positions
    teacher = found.value("GPU time", "capture, operations") * 15e9 / found.value("positions", "captured")
    assert not config.train.activation_checkpointing
    assert student == pytest.approx(1.456e20, rel=0.1)
    assert student + teacher == pytest.approx(5.364e20, rel=0.1)
    assert teacher / (student + teacher) == pytest.approx(0.73, abs=0.01)
    gap = found.value("GPU time", "gap, operations") / (found.value("GPU time", "training, operations") + teacher)
    assert gap < 0.007, "0.7% of DDK's in the paper, which measures the teacher again as well"


def test_the_table_in_docs_is_up_to_date() -> None:
    text = Path(PAGE).read_text(encoding="utf-8")
    assert text == page(text), "run `make recipes`"
    assert all(f"[`{name}`]" in text for name in PRESETS)
