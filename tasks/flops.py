"""What a token costs a model, in floating-point operations, from its config alone.

For a decoder of n layers, h query heads of width d, and blocks of L positions, a token's forward pass costs

    2·N + 4·n·h·d·L

and forward and backward together three times that: 6·N + 12·n·h·d·L (Kaplan et al. 2020, arXiv 2001.08361, section
2.1; the attention term as in PaLM, arXiv 2204.02311, appendix B: the causal mask is not taken off). N counts every
parameter that takes part in a product: all but the table of the input embedding, which is only looked up. The output
projection counts, also where it is that same table. Activations that are computed twice (checkpointing) do not count.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from ddk.errors import UserError
from tasks.models import local_folder
from tasks.progress import logger

TRAINING = 3
"""Forward and backward, in forward passes."""


class ModelSize(BaseModel):
    """What of a model decides its cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    """N: all but the input embedding's table; the output projection is among them."""
    layers: int
    attention_width: int
    """h·d: query heads times their width."""

    def forward_flops(self, seq_len: int) -> int:
        """Of one token in a block of so many positions."""
        return 2 * self.parameters + 4 * self.layers * self.attention_width * seq_len


def model_size(model: str, revision: str | None = None) -> ModelSize | None:
    """The size of a Hugging Face model, counted on its empty architecture; no weights are read.

    Returns:
        None where it cannot be had from the config (a server's model without a config here, a model with code of its
        own): a report then says that the cost is not known.
    """
    try:
        folder = local_folder(model, revision, "model", weights=False)
        return size_of(transformers.AutoConfig.from_pretrained(folder))
    except (UserError, OSError, ValueError, KeyError, AttributeError) as error:
        logger.info("the cost of %s is not known: %s", model, str(error).partition("\n")[0])
        return None


def size_of(config: Any) -> ModelSize:
    """The same from a transformers config.

    Raises:
        ValueError, AttributeError: transformers knows no such decoder, or its config names its parts otherwise.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    # Tied weights appear once among the parameters.
    total = sum(parameter.numel() for parameter in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        parameters=total - (0 if head is table else table.numel()),
        layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * head_width,
    )
