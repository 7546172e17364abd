"""A model with random weights, small enough for any test, as a folder that transformers and vLLM read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SMALLEST: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""Of a configuration of the Llama kind: what fits in the fewest bytes. vLLM takes larger heads only."""


def make_tiny_model(folder: Path, *, rows: int, context: int) -> str:
    """Two layers of Qwen2.

    Args:
        rows: tokens that it predicts.
        context: longest input.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            vocab_size=rows,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,  # of 32 each: vLLM's CPU attention takes no smaller ones
            num_key_value_heads=1,
            max_position_embeddings=context,
            initializer_range=0.2,  # large enough for distributions with a top and a tail
            eos_token_id=0,
            dtype="float32",
        )
        transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def true_logprobs(folder: str, tokens_BL1: np.ndarray) -> torch.Tensor:
    """[B, L, rows] of a float32 forward pass, normalised in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens_BL1[:, :-1].astype(np.int64))).logits
    return logits.double().log_softmax(-1)
