"""The student, an ordinary Hugging Face causal language model: loads it from a folder and saves it to one."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from ddk.context import Stretch
from ddk.errors import UserError, first_line
from ddk.fused import dense_loss, fused_loss
from ddk.loss import Teacher
from ddk.parallel import World, on_first
from ddk.rotary import ShownPositions
from ddk.structure import attention_of, is_projection
from ddk.train_config import LossConfig, StudentConfig


def load_student(
    config: StudentConfig, vocab_size: int, *, dtype: torch.dtype = torch.float32, field: str = "student.model"
) -> torch.nn.Module:
    """The model on the CPU, in evaluation mode.

    Args:
        vocab_size: tokens of the tokenizer; the model must have at least as many rows (more are padding).
        dtype: of its weights; a student that is to be trained has float32.
        field: of the configuration that names it, for messages.

    Raises:
        UserError: no such model, no (whole) safetensors in it, quantised ones, or too few rows.
    """
    described = load_config(config, field)
    # transformers' own choice may leave out a part of what the model computes.
    attention = attention_of(described, trust_remote_code=config.trust_remote_code)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # said below, by name
            **({} if attention is None else {"attn_implementation": attention}),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise cannot_be_loaded(config, field, error) from error
    check_loading(config, field, loading)
    _check_finite(model, f"{field} '{config.model}'")
    rows = head_rows(model)
    if rows is not None and rows < vocab_size:
        raise UserError(
            f"{field} '{config.model}' predicts {rows} tokens and the tokenizer has {vocab_size}; "
            f"teacher and student must share the tokenizer (they may be padded differently)"
        )
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def _check_finite(model: torch.nn.Module, place: str) -> None:
    for name, parameter in model.named_parameters():
        # NaN and infinity survive a sum, which needs no second tensor.
        if parameter.is_floating_point() and not math.isfinite(parameter.sum(dtype=torch.float32).item()):
            raise UserError(
                f"{place} holds NaN or infinite weights, first in '{name}'; the file is damaged, or was saved after "
                f"its training had diverged: use another"
            )


def load_config(config: StudentConfig, field: str = "student.model") -> Any:
    """The model's Hugging Face config.

    Raises:
        UserError: there is none, it needs code that is not allowed to run, or its weights are quantised.
    """
    try:
        found = transformers.AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise cannot_be_loaded(config, field, error) from error
    settings = getattr(found, "quantization_config", None)
    if settings is None:
        settings = getattr(found.get_text_config(), "quantization_config", None)
    if settings is not None:
        method = (settings if isinstance(settings, dict) else settings.to_dict()).get("quant_method", "unknown")
        raise UserError(
            f"{field} '{config.model}' is quantised ({getattr(method, 'value', method)}, in its config.json), and "
            f"quantised weights cannot be trained; name the unquantised checkpoint that it was made from"
        )
    return found


def cannot_be_loaded(config: StudentConfig, field: str, error: Exception) -> UserError:
    """What to say of an error in loading a model or its config."""
    first = first_line(error)
    if not os.path.isdir(config.model):
        first = f"there is no such folder, and from the hub: {first}"
    elif "trust_remote_code" in str(error):
        section = field.partition(".")[0]
        first = f"its architecture is code in its folder; read that, and set {section}.trust_remote_code: true"
    return UserError(f"{field} '{config.model}' cannot be loaded: {first}")


def check_loading(config: StudentConfig, field: str, loading: Mapping[str, Any]) -> None:
    """Check that no weight was missing; transformers would only warn, and continue with random numbers.

    Args:
        loading: as `from_pretrained` gives it with `output_loading_info`.

    Raises:
        UserError: one is missing, or of another shape.
    """
    whole = "is the folder whole, and its config.json the one that belongs to it?"
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{field} '{config.model}' has no weights for '{missing[0]}'{more}; {whole}")
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UserError(
            f"{field} '{config.model}' cannot be loaded: '{name}' has shape {list(found)}, a mismatch with the "
            f"{list(wanted)} that its config.json asks for; {whole}"
        )


def head_rows(model: Any) -> int | None:
    """Tokens that a model predicts, padding included; None where neither its structure nor its config says."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    rows = getattr(model.config.get_text_config(), "vocab_size", None) if weight is None else weight.shape[0]
    return None if rows is None else int(rows)


def load_tokenizer(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer in a model's folder, or on the hub.

    Raises:
        UserError: there is none, it is broken, it has no vocabulary, or it is none of the fast ones.
    """
    needed = "it needs a tokenizer.json, or vocab.json and merges.txt, or a tokenizer.model"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code, use_fast=True
        )
    except Exception as error:  # of the file readers, of sentencepiece and of the Rust library, which has no types
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :.;")
        raise UserError(f"the tokenizer of '{model}' cannot be loaded ({cause}); {needed}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of '{model}' is not a fast one; convert it (it needs a tokenizer.json)")
    # transformers then makes one of the special tokens alone.
    if not _encodes_anything(tokenizer):
        raise UserError(f"the tokenizer of '{model}' has no vocabulary; {needed}: copy the model's there")
    return tokenizer


def _encodes_anything(tokenizer: Any) -> bool:
    try:
        return bool(tokenizer.backend_tokenizer.encode("The 1 + 1 of it.", add_special_tokens=False).ids)
    except Exception:  # all that the Rust library raises: of whole words, some of which it does not know
        return True


class StudentLoss(torch.nn.Module):
    """A student with its loss in one forward pass, so that the output projection can be fused with it.

    Where the model's logits are just a projection of its last hidden states (nearly always), they are never formed as
    a whole (`ddk.fused`). Models that do more with them (a soft cap, a scale) are found out by their structure, and go
    through `dense_loss`.

    Args:
        model: a Hugging Face causal language model.
        vocab_size: tokens of the tokenizer; padded rows beyond it are no tokens, and take no part in any normaliser.
        loss: γ and the rest.
    """

    def __init__(self, model: Any, vocab_size: int, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.loss = loss
        self.fused = is_projection(model)
        self.train(model.training)

    @property
    def extra_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, or kept in checkpoints, besides the model: by its names there."""
        return {}

    @cached_property
    def shown(self) -> ShownPositions:
        """Shows the model other positions; a model that never is shown any has no hook.

        Raises:
            UserError: the model's rotary embedding cannot be shown any.
        """
        return ShownPositions(self.model, layers_of(self.model))

    def forward(
        self,
        inputs_BL: Tensor,
        labels_BL: Tensor,
        valid_BL: Tensor | None = None,
        teacher: Teacher | None = None,
        scale: float = 1.0,
        stretch: Stretch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`LossSums` as a tuple (total, ce, kl), which is what DDP and FSDP see through.

        Args:
            inputs_BL: token ids, int64.
            labels_BL: the tokens that come next, int64.
            valid_BL: bool, whether a position carries loss; None: all do.
            teacher: of all B·L positions; None for cross-entropy alone.
            scale: what the total is multiplied by.
            stretch: the positions that the model is shown; None: the ordinary ones.
        """
        rows = counted_rows(valid_BL)
        labels_T = labels_BL.flatten()[rows]
        teacher = None if teacher is None else teacher[rows]
        at_positions = contextlib.nullcontext() if stretch is None else self.shown.at(stretch)
        if not self.fused:
            with at_positions:
                logits_TV = self.model(input_ids=inputs_BL, use_cache=False).logits.flatten(0, 1)[rows]
            sums = dense_loss(logits_TV[:, : self.vocab_size], labels_T, teacher, self.loss, scale=scale)
        else:
            with at_positions:
                hidden_BLD = self.model.base_model(input_ids=inputs_BL, use_cache=False).last_hidden_state
            head = self.model.get_output_embeddings()
            sums = fused_loss(
                hidden_BLD.flatten(0, 1)[rows],
                head.weight,
                labels_T,
                teacher,
                self.loss,
                bias_V=head.bias,
                vocab_size=self.vocab_size,
                scale=scale,
            )
        return sums.total, sums.ce, sums.kl


def counted_rows(valid_BL: Tensor | None) -> slice | Tensor:
    """Of the flattened positions, those that carry loss."""
    return slice(None) if valid_BL is None else valid_BL.flatten().nonzero()[:, 0]


def layers_of(model: Any) -> list[torch.nn.Module]:
    """The decoder's blocks, by the class names that the model gives for splitting; [] where it gives none."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def student_weights(model: Any, world: World) -> dict[str, Tensor]:
    """What `save_student` writes: whole weights in bfloat16 on the CPU, on rank 0; nothing on the others.

    Tied weights are there under their first name only: copies in bfloat16 no longer share memory, and would be
    written twice.
    """
    first_names = {name for name, _ in model.named_parameters()}
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    return on_first(
        {name: value for name, value in model.state_dict().items() if name not in again},
        world,
        lambda value: value.to(torch.bfloat16).cpu() if value.is_floating_point() else value.cpu(),
    )


def save_student(model: Any, weights: Mapping[str, Tensor], folder: str, config: Any = None) -> None:
    """Write an ordinary Hugging Face folder: config, safetensors weights in bfloat16, the model's own code if it has
    any, and the tokenizer.

    Args:
        model: whose configuration is written.
        weights: of `student_weights`.
        folder: a local folder; made if it is not there.
        config: written in the place of the model's own.
    """
    os.makedirs(folder, exist_ok=True)
    # Only the configuration of the live model is used: under FSDP it holds no whole weights.
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config if config is None else config))
    if (generation := saved_generation(model)[0]) is not None:
        shell.generation_config = generation
    shell.save_pretrained(folder, state_dict=dict(weights), safe_serialization=True)
    # save_pretrained names the shell's dtype, float32; whoever loads with dtype 'auto' would get that.
    config = copy.deepcopy(shell.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


def saved_generation(model: Any) -> tuple[Any | None, str | None]:
    """How a model generates, as it can be saved, and what had to be changed for that; None where it says nothing.

    Some published models name a temperature or a top_p without `do_sample`: transformers reads that and refuses to
    write it. They are meant to sample.
    """
    found = getattr(model, "generation_config", None)
    if found is None or _is_valid(found):
        return found, None
    sampling = copy.deepcopy(found)
    sampling.do_sample = True
    if _is_valid(sampling):
        return sampling, "it names sampling parameters without do_sample, and is saved with do_sample: true"
    tokens = {name: getattr(found, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return transformers.GenerationConfig(**tokens), "transformers does not accept it, and only its token ids are saved"


def _is_valid(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True
