"""The student: an ordinary Hugging Face causal language model, from a folder and back into one."""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor

from ddk.errors import UserError


class StudentConfig(BaseModel):
    """Which model is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Folder of a Hugging Face model with safetensors weights, or its name on the hub."""
    revision: str | None = None
    """Commit, branch or tag, for a name on the hub."""
    trust_remote_code: bool = False
    """Whether the model's folder may run code of its own. Leave it off unless you have read that code."""


def load_student(config: StudentConfig, vocab_size: int) -> torch.nn.Module:
    """The model in float32 on the CPU, in evaluation mode.

    Args:
        vocab_size: tokens of the tokenizer; the model must have at least as many rows (more are padding).

    Raises:
        UserError: no such model, no (whole) safetensors in it, or too few rows.
    """
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=torch.float32,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        no_folder = "" if os.path.isdir(config.model) else "there is no such folder, and from the hub: "
        raise UserError(
            f"student.model '{config.model}' cannot be loaded: {no_folder}{str(error).partition(chr(10))[0]}"
        ) from error
    # transformers would only warn, and train on from random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"student.model '{config.model}' has no weights for '{missing[0]}'"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; is the folder whole, and its config.json the one that belongs to it?"
        )
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(
            f"student.model '{config.model}' predicts {rows} tokens and the tokenizer has {vocab_size}; "
            f"teacher and student must share the tokenizer (they may be padded differently)"
        )
    return model.eval()  # type: ignore[no-any-return]


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer in a model's folder, or on the hub.

    Raises:
        UserError: there is none, or it names no end-of-text token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code, use_fast=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of '{model}' cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{model}' has no eos_token, which separates documents; set it there")
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of '{model}' is not a fast one; convert it (it needs a tokenizer.json)")
    return tokenizer


def forward_logits(
    model: torch.nn.Module, inputs_BL: Tensor, vocab_size: int, autocast: torch.autocast | None = None
) -> Tensor:
    """Logits [B, L, V] in the model's compute dtype, the padded vocabulary rows cut off.

    Padded rows (beyond the tokenizer) are no tokens: they take no part in any normaliser, here or in the targets.
    """
    with autocast or contextlib.nullcontext():
        logits: Tensor = model(input_ids=inputs_BL, use_cache=False).logits
    return logits[..., :vocab_size]


def save_student(model: Any, tokenizer: Any, folder: str) -> None:
    """An ordinary Hugging Face folder: config, safetensors weights in bfloat16, tokenizer.

    Args:
        folder: a local folder; made if it is not there.
    """
    os.makedirs(folder, exist_ok=True)
    # Tied weights under their first name only: copies in bfloat16 no longer share memory, and would be written twice.
    first_names = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items() if name not in again}
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    # save_pretrained names the live model's dtype, float32; whoever loads with dtype 'auto' would get that.
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
