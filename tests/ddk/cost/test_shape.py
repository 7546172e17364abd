"""The size of a model from its config: against published numbers, formulas by hand, and torch's own counters."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ddk.cost.shape import ModelShape, shape_of

# transformers' gpt_bigcode, when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

L = 48
TINY = {
    "qwen2": {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 200, "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 200, "tie_word_embeddings": False,
    },
    "qwen3": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 1, "vocab_size": 200, "tie_word_embeddings": False,
    },
    "gpt_bigcode": {
        "n_embd": 64, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 200,
        "multi_query": True, "bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0,
    },
    "gpt2": {  # its layers are no nn.Linear
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 200, "bos_token_id": 0,
        "eos_token_id": 0,
    },
}  # fmt: skip


def tiny(kind: str) -> tuple[ModelShape, torch.nn.Module]:
    config = AutoConfig.for_model(kind, pad_token_id=None, **TINY[kind])
    return shape_of(config), AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


@pytest.mark.parametrize("kind", TINY)
def test_parameters_are_those_of_the_real_model(kind: str) -> None:
    shape, model = tiny(kind)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layers == (3 if kind == "qwen2" else 2)
    assert shape.gated == (kind in ("qwen2", "llama", "qwen3"))
    assert shape.tied == (kind in ("qwen2", "gpt_bigcode", "gpt2"))
    assert shape.kv_heads == {"qwen2": 2, "llama": 4, "qwen3": 1, "gpt_bigcode": 1, "gpt2": 4}[kind]


def test_parameters_of_llama_by_hand() -> None:
    d, i, v, layers = 64, 96, 200, 2
    each = 4 * d * d + 3 * d * i + 2 * d
    shape, _ = tiny("llama")
    assert shape.parameters == 2 * v * d + layers * each + d
    assert shape.products == v * d + layers * (4 * d * d + 3 * d * i)
    assert shape.head == v * d


def test_a_mixture_of_experts_counts_what_runs() -> None:
    # Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of them activated (its model card), the embedding among these.
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151_936, tie_word_embeddings=False,
    )  # fmt: skip
    shape = shape_of(config)
    assert shape.parameters == pytest.approx(30.5e9, rel=0.005)
    assert shape.products + shape.rows * shape.width == pytest.approx(3.3e9, rel=0.02)
    assert (shape.inner, shape.gated) == (8 * 768, True)


@pytest.mark.parametrize("kind", TINY)
def test_operations_are_those_that_torch_counts(kind: str) -> None:
    shape, model = tiny(kind)
    tokens = torch.arange(2 * L).remainder(200).view(2, L)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    assert 2 * L * shape.forward_flops(L) == pytest.approx(forward.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as both:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    assert 2 * L * shape.train_flops(L) == pytest.approx(both.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_operations_with_activation_checkpointing(kind: str) -> None:
    shape, model = tiny(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.arange(2 * L).remainder(200).view(2, L)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops()
    assert 2 * L * shape.train_flops(L, recompute=True) == pytest.approx(counted, rel=0.06)
    assert counted > 1.1 * 2 * L * shape.train_flops(L)  # the layers did run again


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt2"])
def test_bytes_of_the_cache_are_those_that_generation_keeps(kind: str) -> None:
    shape, model = tiny(kind)
    cache = model.eval()(input_ids=torch.zeros(1, L, dtype=torch.int64), use_cache=True).past_key_values
    kept = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert L * shape.cache_bytes(4) == kept


def test_shared_heads_of_the_cache() -> None:
    shape, _ = tiny("qwen2")  # 2 heads of keys and values
    assert shape.cache_bytes(2, ranks=2) * 2 == shape.cache_bytes(2)
    assert shape.cache_bytes(2, ranks=4) == shape.cache_bytes(2, ranks=2), "a head is not divided"


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        shape_of(AutoConfig.for_model("t5"))
