"""How large a language model is, read from its config alone: parameters, floating-point operations, bytes of its cache.

The architecture is built on torch's meta device, which holds shapes and no numbers, so that a model of 14 billion
parameters takes a fraction of a second and no memory, and whatever transformers knows can be measured.

Operations are counted as the literature does (PaLM, Chowdhery et al. 2022, appendix B): two for each weight that a
position is multiplied with, and four for each pair of positions and channel of the attention, the causal half that is
masked included. Norms, activations and rotations are left out. A backward pass has twice the operations of its forward
pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINING = 3
"""Forward and backward, in forward passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One causal language model."""

    kind: str
    """Its `model_type`."""
    parameters: int
    """All of them; tied ones once."""
    products: int
    """Weights that a position is multiplied with: those of every linear layer and of the output projection, without
    the embeddings that are looked up; of a mixture of experts the share that runs."""
    layers: int
    width: int
    """Of the hidden states, D."""
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    """Width of the feed-forward layers; of a mixture of experts all that run for a position together."""
    gated: bool
    """Whether these have two projections upwards (SwiGLU), or one."""
    rows: int
    """Tokens that it predicts, padding included."""
    tied: bool
    """Whether the output projection is the embedding."""
    positions: int | None
    """Longest input; None where the config does not say."""
    dtype: str
    """Of the published weights."""
    quantization: str | None
    """Method of the published weights' quantisation."""

    @property
    def head(self) -> int:
        """Weights of the output projection."""
        return self.rows * self.width

    def forward_flops(self, seq_len: int) -> int:
        """Operations of one position's forward pass in a sequence of the given length."""
        return 2 * self.products + self._attention_flops(seq_len)

    def train_flops(self, seq_len: int, *, recompute: bool = False) -> int:
        """Operations of one position's forward and backward pass.

        Args:
            recompute: with activation checkpointing the layers run forward once more in the backward pass.
        """
        again = 2 * (self.products - self.head) + self._attention_flops(seq_len) if recompute else 0
        return TRAINING * self.forward_flops(seq_len) + again

    def _attention_flops(self, seq_len: int) -> int:
        """Q·Kᵀ and its product with V: two operations each for every channel of every head."""
        return 4 * self.layers * self.heads * self.head_width * seq_len

    def cache_bytes(self, item: int, ranks: int = 1) -> int:
        """Keys and values of one position, on each of the GPUs that share the heads (at least one head each).

        Args:
            item: bytes of a number.
            ranks: GPUs.
        """
        return 2 * self.layers * -(-self.kv_heads // ranks) * self.head_width * item


def shape_of(config: Any) -> ModelShape:
    """Measure the architecture that a Hugging Face config describes.

    Raises:
        ValueError: it is no causal language model that transformers knows, or its config lacks a dimension.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    heads, width = _number(text, "num_attention_heads"), _number(text, "hidden_size")
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    running, of_all = _experts(text)
    inner_running = running * getattr(text, "moe_intermediate_size", inner) if of_all else inner
    return ModelShape(
        kind=str(config.model_type),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        products=_products(model, running / of_all if of_all else 1.0),
        layers=_number(text, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_width=getattr(text, "head_dim", None) or width // heads,
        inner=inner_running,
        gated=_is_gated(model, inner) or bool(of_all),
        rows=model.get_output_embeddings().weight.shape[0],
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        positions=longest_input(text),
        dtype=str(getattr(text, "dtype", None) or getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        quantization=_quantization(config),
    )


def longest_input(text: Any) -> int | None:
    """Positions that a model takes, learned or rotary, as its config (of the part that reads text) describes them.

    Rotary positions that are stretched reach further, where their way of stretching is one that is set up beside
    `max_position_embeddings` ('yarn', 'linear', 'dynamic') and not contained in it ('llama3', 'longrope'). None where
    the config does not say.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    found = next((n for name in names if isinstance(n := getattr(text, name, None), int) and n > 0), None)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if found is None or not isinstance(rope, dict):
        return found
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) not in ("yarn", "linear", "dynamic") or not factor:
        return found
    before = rope.get("original_max_position_embeddings") or found
    return max(found, int(before * factor))


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ValueError(f"the config of a {config.model_type} model has no {name}")
    return value


def _products(model: Any, share: float) -> int:
    """Every matrix but the embeddings that are looked up; a tied one counts as the projection that it is too.

    Args:
        share: of the experts' weights, which transformers keeps as one tensor of three axes, that runs.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    looked_up.discard(id(model.get_output_embeddings().weight))
    found: float = sum(
        parameter.numel() * (share if parameter.ndim == 3 else 1.0)
        for parameter in model.parameters()
        if parameter.ndim >= 2 and id(parameter) not in looked_up
    )
    return round(found)


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False):
        return 1
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _experts(config: Any) -> tuple[int, int]:
    """How many run for a position, of how many; (0, 0) where there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    of_all = next((value for name in names if (value := getattr(config, name, None))), 0)
    return (getattr(config, "num_experts_per_tok", None) or of_all, of_all) if of_all else (0, 0)


def _is_gated(model: Any, inner: int) -> bool:
    """Whether more channels go up into the feed-forward layers than down from them."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    up = sum(module.out_features for module in linear if module.out_features in (inner, 2 * inner))
    down = sum(module.in_features for module in linear if module.in_features == inner)
    return up > down


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    return str(settings.get("quant_method", "unknown"))
