"""What a model computes is found by its structure, where its present weights would hide it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny_model import SMALLEST

from ddk.cost.shape import longest_input
from ddk.structure import attention_of, is_projection

SMALL: dict[str, Any] = {**SMALLEST, "vocab_size": 96}
GEMMA2: dict[str, Any] = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16}


def gpt2(**changes: Any) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, **changes
    )


class Scaled(transformers.LlamaForCausalLM):
    """A change between decoder and logits that a subclass makes."""

    change: Callable[[Any], Any] = staticmethod(lambda logits: logits)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = self.change(output.logits)
        return output


class Normed(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **named: Any) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = torch.nn.functional.normalize(hidden, dim=-1)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


class WithDropout(Normed):
    def forward(self, input_ids: Any = None, **named: Any) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = torch.nn.functional.dropout(hidden, 0.5, self.training)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


def masked(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 5] = torch.finfo(logits.dtype).min
    return logits


@pytest.mark.parametrize("zero", [False, True], ids=["as made", "a projection of zeros"])
@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (transformers.LlamaConfig(**SMALL), True),
        (transformers.Qwen2Config(**SMALL, tie_word_embeddings=True), True),
        (gpt2(), True),
        (transformers.GraniteConfig(**SMALL, logits_scaling=8.0), False),
        (transformers.CohereConfig(**SMALL, logit_scale=0.0625), False),
        (transformers.Gemma2Config(**GEMMA2, final_logit_softcapping=30.0), False),
        (transformers.Gemma2Config(**GEMMA2, final_logit_softcapping=None), True),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_a_scale_and_a_soft_cap_show_whatever_the_weights(config: Any, plain: bool, zero: bool) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    head = model.get_output_embeddings()
    if zero:
        torch.nn.init.zeros_(head.weight)
    before, state = head.weight.clone(), torch.get_rng_state()
    assert is_projection(model) is plain
    assert model.training
    assert torch.equal(head.weight, before)
    assert "forward" not in vars(head)
    assert torch.equal(torch.get_rng_state(), state), "the training's random numbers are as they were"


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Scaled, lambda logits: logits * 1.001),
        (Scaled, lambda logits: 100.0 * torch.tanh(logits / 100.0)),
        (Scaled, masked),
        (Normed, None),
        (WithDropout, None),
    ],
    ids=["a scale", "a soft cap", "a token ruled out", "a norm", "dropout in training"],
)
def test_whatever_stands_between_shows(kind: type, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind(transformers.LlamaConfig(**SMALL))
    assert is_projection(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)))
    if change is not None:
        monkeypatch.setattr(Scaled, "change", staticmethod(change))
    assert not is_projection(model)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (transformers.LlamaConfig(**SMALL), None),
        (transformers.Gemma2Config(**GEMMA2, attn_logit_softcapping=50.0), "eager"),
        (transformers.Gemma2Config(**GEMMA2, attn_logit_softcapping=None), None),
        (
            transformers.Qwen3MoeConfig(
                **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            ),
            None,
        ),
        (gpt2(), None),
    ],
    ids=["llama", "gemma2", "gemma2 without a cap", "experts", "gpt2"],
)
def test_the_attention_that_computes_what_the_model_is(config: Any, wanted: str | None) -> None:
    assert attention_of(config) == wanted


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, **changes}


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (gpt2(), 32),
        (transformers.LlamaConfig(**SMALL), 32),
        (transformers.LlamaConfig(**SMALL, rope_parameters=yarn(original_max_position_embeddings=32)), 128),
        (transformers.LlamaConfig(**SMALL, rope_parameters=yarn(original_max_position_embeddings=8)), 32),
        (transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2), None),
    ],
    ids=["learned", "rotary", "stretched", "stretched already", "none"],
)
def test_how_many_positions_a_model_takes(config: Any, longest: int | None) -> None:
    assert longest_input(config.get_text_config()) == longest
