"""The teacher's memory: against saved weights, generation's own cache and the buffer that capture really makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tiny_model
from transformers import AutoConfig

from ddk.cost.memory import Part
from ddk.cost.shape import ModelShape, shape_of
from tasks.teachers.config import TeacherConfig
from tasks.teachers.memory import engine_bytes, shared_memory, teacher_memory, weight_bytes
from tasks.teachers.vllm_worker import ResultBuffer


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return shape_of(
        AutoConfig.for_model(
            "qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=1000, tie_word_embeddings=False, dtype="bfloat16",
        )
    )  # fmt: skip


def config(**changes: Any) -> TeacherConfig:
    return TeacherConfig(**{"model": "m", "k": 8, **changes})


def of(parts: list[Part], what: str) -> float:
    return next(part.bytes for part in parts if part.what == what)


def test_weights_are_as_large_as_the_file(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", rows=300, context=64)
    saved = (tmp_path / "model" / "model.safetensors").stat().st_size
    found, how = weight_bytes(config(), shape_of(AutoConfig.from_pretrained(folder)))
    header = saved - found
    assert 0 < header < 4096
    assert "4 bytes (float32)" in how


def test_dtype_and_quantisation(shape: ModelShape) -> None:
    assert weight_bytes(config(), shape)[0] == 2 * shape.parameters
    assert weight_bytes(config(dtype="float32"), shape)[0] == 4 * shape.parameters
    inside = shape.products - shape.head
    rest = 2 * (shape.parameters - inside)
    assert weight_bytes(config(quantization="fp8"), shape)[0] == inside + rest
    assert weight_bytes(config(quantization="awq"), shape)[0] == inside / 2 + rest
    unknown, how = weight_bytes(config(quantization="mystery"), shape)
    assert unknown == 2 * shape.parameters
    assert "'mystery' is unknown here" in how


def test_what_is_shared_by_several_gpus(shape: ModelShape) -> None:
    alone, shared = (teacher_memory(shape, config(tensor_parallel_size=n), seq_len=128) for n in (1, 2))
    assert of(shared, "weights") * 2 == of(alone, "weights")
    assert of(shared, "KV cache in use") * 2 == of(alone, "KV cache in use")
    assert of(shared, "logits of capture") == of(alone, "logits of capture")
    # 2 heads of keys and values: four GPUs hold one each, and so twice as much as there is.
    four = teacher_memory(shape, config(tensor_parallel_size=4), seq_len=128)
    assert of(four, "KV cache in use") == of(shared, "KV cache in use")
    outside = of(alone, "logits of capture")
    assert engine_bytes(alone) == sum(part.bytes for part in alone) - outside


def test_more_positions_a_pass_take_more(shape: ModelShape) -> None:
    small, large = (teacher_memory(shape, config(max_batch_tokens=n), seq_len=128) for n in (1024, 4096))
    assert of(large, "activations") == 4 * of(small, "activations")
    assert of(large, "KV cache in use") > of(small, "KV cache in use")
    assert of(teacher_memory(shape, config(draws=5), seq_len=128), "logits of capture") > of(small, "logits of capture")


def test_the_portable_path_holds_its_logits_whole(shape: ModelShape) -> None:
    parts = teacher_memory(shape, config(source="prompt_logprobs", max_batch_tokens=1024), seq_len=128)
    assert of(parts, "logits") == 3 * 4 * 1024 * 1000


def test_a_server_takes_nothing_here(shape: ModelShape) -> None:
    served = config(source="server", server_url="http://localhost:8000/v1")
    assert teacher_memory(shape, served, seq_len=128) == []
    assert shared_memory(served, seq_len=128) == 0


@pytest.mark.parametrize(("draws", "temperatures"), [(0, ()), (7, (2.0, 0.5))])
def test_shared_memory_is_that_of_the_buffer(tmp_path: Path, draws: int, temperatures: tuple[float, ...]) -> None:
    wanted = config(draws=draws, tail_temperatures=temperatures, shard_blocks=4)
    path = tmp_path / "buffer"
    ResultBuffer(str(path), 4, 128, (8, len(temperatures), draws), create=True)
    assert shared_memory(wanted, seq_len=128) == path.stat().st_size - 1  # the note of why the worker has gone
