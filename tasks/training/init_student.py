"""Makes a student out of its teacher, for users who have no smaller model of the family: `ddk init-student`."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError, safe_open

from ddk.cutting import Cut, Tensors, plan_cut
from ddk.errors import UserError, first_line
from ddk.structure import empty_model
from ddk.student import check_loading, load_config
from ddk.train_config import StudentConfig
from tasks.planning.models import local_folder
from tasks.planning.tokenizer_files import tokenizer_files

_CARD, _GENERATION = "README.md", "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A student that was cut out."""

    folder: str
    layers: tuple[int, ...]
    parameters_before: int
    parameters: int


def init_student(teacher: str, folder: str, layers: Sequence[int] | int | None, width: float | None) -> Made:
    """Cut a student out of a teacher and write it as an ordinary Hugging Face folder.

    The weights are read one at a time, so that a teacher of any size goes through little memory.

    Args:
        teacher: a folder, or a name on the hub.
        folder: made; it must not be there.
        layers: numbers of the layers to keep, or how many; None: all.
        width: share of heads and channels to keep; None: all.

    Raises:
        UserError: there is no such teacher, it cannot be cut like that, or the folder is there.
    """
    if layers is None and width is None:
        raise UserError(
            "nothing is cut; say how many layers to keep (--layers 11) or which share of the width (--width)"
        )
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already; name a folder that is not")
    source = local_folder(teacher, None, "TEACHER")
    config = load_config(StudentConfig(model=source), "TEACHER")
    above = os.path.dirname(os.path.abspath(folder))
    os.makedirs(above, exist_ok=True)
    try:
        with ExitStack() as opened:
            stored = _tensors(_weight_files(source), opened)
            cut = plan_cut(config, stored, layers, width)
            weights = cut.weights(stored)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights of '{teacher}' cannot be read ({first_line(error)}); fetch them again") from error
    before = sum(parameter.numel() for parameter in empty_model(config).parameters())
    temporary = os.path.join(above, f".{os.path.basename(os.path.normpath(folder))}-{uuid.uuid4().hex[:8]}")
    os.mkdir(temporary)
    try:
        parameters = _write(cut, weights, source, temporary, teacher, before)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Made(folder=folder, layers=cut.layers, parameters_before=before, parameters=parameters)


def _tensors(files: Sequence[str], opened: ExitStack) -> Tensors:
    """By name, read from the files while these are open."""
    readers = [opened.enter_context(safe_open(path, framework="pt")) for path in files]
    return {name: partial(reader.get_tensor, name) for reader in readers for name in reader.keys()}  # noqa: SIM118


def _weight_files(folder: str) -> list[str]:
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not names:
        raise UserError(f"'{folder}' has no *.safetensors; other formats (pickles) are not read: convert the model")
    return [os.path.join(folder, name) for name in names]


def _write(cut: Cut, weights: dict[str, torch.Tensor], source: str, folder: str, teacher: str, before: int) -> int:
    huggingface_hub.save_torch_state_dict(weights, folder)
    cut.config.dtype = next(iter(weights.values())).dtype
    cut.config.save_pretrained(folder)
    copied = {*tokenizer_files(source), *(one for one in os.listdir(source) if one.endswith((".jinja", ".py")))}
    if os.path.exists(os.path.join(source, _GENERATION)):
        copied.add(_GENERATION)
    for name in copied:
        shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    weights.clear()
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
    )
    if further := sorted(loading["unexpected_keys"]):
        raise UserError(
            f"a student of type '{cut.config.model_type}' cannot be cut out like that: it has no '{further[0]}'; "
            f"please report the model's architecture"
        )
    check_loading(StudentConfig(model=folder), "the student", loading)
    parameters = int(sum(parameter.numel() for parameter in model.parameters()))
    with open(os.path.join(folder, _CARD), "w", encoding="utf-8") as file:
        file.write(_card(cut, teacher, before, parameters))
    return parameters


def _card(cut: Cut, teacher: str, before: int, parameters: int) -> str:
    name = os.path.basename(os.path.normpath(teacher))
    text = cut.config.get_text_config()
    kept = {"layers": list(cut.layers), "hidden_size": text.hidden_size, "attention_heads": text.num_attention_heads}
    return (
        f"# Cut out of {name}\n\n"
        f"This model was cut out of `{name}` by `ddk init-student`: {parameters:,} of {before:,} parameters. It is a "
        f"start for distillation, **not a model to use**: until it is trained, it predicts badly.\n\n"
        f"The licence is that of `{name}`.\n\n```json\n{json.dumps(kept)}\n```\n"
    )
