"""Capture under what engines do: tensor parallelism, sliding windows, experts, bfloat16, quantised weights.

Models of two layers with random weights, each against a plain transformers forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ddk.errors import UserError
from ddk.values import SparseTargets
from tasks.teachers import vllm_engine
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher

ROWS, VOCAB, SEQ_LEN, K = 512, 500, 80, 12
pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own warnings are not ours to mend

COMMON: dict[str, Any] = {
    "vocab_size": ROWS,  # 12 more than the tokenizer's tokens
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "eos_token_id": 0,
}


def save(folder: Path, config: transformers.PretrainedConfig) -> str:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return str(folder)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (4, SEQ_LEN + 1)).astype(np.int32)


def capture(model: str, **settings: Any) -> SparseTargets:
    """Pieces of at most 128 tokens: blocks run in parts, and parts of several blocks together."""
    config = TeacherConfig(model=model, k=K, shard_blocks=4, max_batch_tokens=128, **settings)
    with VllmTeacher(config, seq_len=SEQ_LEN, vocab_size=VOCAB) as teacher:
        return teacher.capture(tokens())


def forward(model: str, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.Tensor:
    """Log-probabilities [B, L, V] of a plain forward pass."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **changes).eval()
    with torch.inference_mode():
        logits = loaded(torch.from_numpy(tokens()[:, :-1].astype(np.int64))).logits
    return logits[..., :VOCAB].double().log_softmax(-1)


def difference(captured: SparseTargets, truth: torch.Tensor) -> float:
    """Mean |difference| of the stored log-probabilities from the truth's at the same ids."""
    at_ids = truth.gather(-1, torch.from_numpy(captured.ids.astype(np.int64))).numpy()
    assert captured.ids.max() < VOCAB
    mass = np.exp(captured.logprobs, dtype=np.float64).sum(-1) + captured.tail_mass
    np.testing.assert_allclose(mass, 1.0, atol=1e-4)
    return float(np.abs(captured.logprobs - at_ids).mean())


def check_exact(captured: SparseTargets, truth: torch.Tensor) -> None:
    assert (captured.ids == truth.topk(K).indices.numpy()).mean() >= 0.999
    np.testing.assert_allclose(captured.logprobs, truth.topk(K).values.numpy(), atol=2e-4)


@pytest.mark.engine
def test_a_mixture_of_experts_tensor_parallel_on_two_processes(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    model = save(tmp_path, config)
    check_exact(capture(model, dtype="float32", tensor_parallel_size=2), forward(model))


@pytest.mark.engine
def test_an_activation_that_vllm_has_otherwise(tmp_path: Path) -> None:
    """Bloom's GELU is the tanh form, and vLLM's the exact one (1.8e-3 nat): `vllm_extension` puts that right."""
    config = transformers.BloomConfig(
        **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "initializer_range", "eos_token_id")},
        n_layer=2,
        n_head=4,
    )
    model = save(tmp_path, config)
    captured, truth = capture(model, dtype="float32"), forward(model)
    check_exact(captured, truth)
    assert difference(captured, truth) < 2e-5


@pytest.mark.engine
def test_a_sliding_window_in_bfloat16(tmp_path: Path) -> None:
    model = save(tmp_path, transformers.MistralConfig(**COMMON, sliding_window=16))
    captured = capture(model, dtype="bfloat16")
    near = difference(captured, forward(model))
    far = difference(captured, forward(model, sliding_window=None))
    assert near < 0.05, "as near as bfloat16 comes"
    assert far > 5 * near, "the test must notice a window that is not kept"


@pytest.mark.engine
def test_quantised_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight-bit weights and activations, as compressed-tensors stores them."""
    model = save(tmp_path / "plain", transformers.Qwen2Config(**COMMON))
    quantised = quantise(model, tmp_path / "quantised")
    if vllm_engine._has_int8_products():
        captured = capture(quantised, dtype="bfloat16")
        near = difference(captured, forward(model))
        assert 1e-4 < near < 0.15, "not the same numbers as without quantisation, and not others altogether"
    monkeypatch.setattr(vllm_engine, "_has_int8_products", lambda: False)
    with pytest.raises(UserError, match=r"quantised' multiplies activations of 8-bit integers.*without VNNI"):
        capture(quantised, dtype="bfloat16")


@pytest.mark.parametrize(
    ("described", "int8"),
    [
        (None, False),
        ({"quant_method": "gptq", "bits": 8}, False),  # weights alone
        ({"config_groups": {"a": {"input_activations": None}}}, False),
        ({"config_groups": {"a": {"input_activations": {"num_bits": 8, "type": "float"}}}}, False),
        ({"config_groups": {"a": {}, "b": {"input_activations": {"num_bits": 8, "type": "int"}}}}, True),
        ({"config_groups": ["a"]}, False),
    ],
)
def test_which_quantisations_round_activations_to_integers(described: dict[str, Any] | None, int8: bool) -> None:
    assert vllm_engine.activations_are_int8(SimpleNamespace(quantization_config=described)) is int8


def quantise(model: str, folder: Path) -> str:
    """Weights of the linear layers rounded to int8 a row; activations are rounded a token, when the engine runs."""
    transformers.AutoConfig.from_pretrained(model).save_pretrained(folder)
    tensors = {}
    for name, weight in load_file(f"{model}/model.safetensors").items():
        if weight.dim() == 2 and "layers" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name + "_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
