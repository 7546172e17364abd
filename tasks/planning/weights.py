"""Checks a model's weight files before anything is loaded: are they complete, and are all weights finite numbers?

A safetensors file begins with a header that gives the position of every tensor. A truncated file or a missing tensor is
therefore found without reading the weights. Only `check_numbers` reads them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open

from ddk.errors import UserError

INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
_LONGEST_HEADER = 100_000_000
"""Bytes; the library's own bound."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class TensorHeader(BaseModel):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def torch_dtype(self) -> torch.dtype:
        """uint8 for what torch has no number of."""
        return _DTYPES.get(self.dtype, torch.uint8)


def check_weights(folder: str, field: str) -> dict[str, TensorHeader]:
    """Check that every weight file exists and is complete.

    Args:
        folder: of the model, a local one.
        field: of the configuration that names it, for messages.

    Returns:
        What the headers say of every tensor that a model is loaded from, by name.

    Raises:
        UserError: there are no safetensors, or one is missing, cut short or not such a file.
    """
    index = _index(folder, field)
    names = weight_files(folder)
    if not names:
        raise UserError(_none(folder, field))
    if lacking := sorted({*index.values(), *_counted(names)} - set(names)):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        where = f"{INDEX} names it" if lacking[0] in index.values() else "its neighbours' names count it"
        raise UserError(f"{field} '{folder}' lacks the weight file {lacking[0]}{more} ({where}); fetch the model again")
    headers = {name: _header(os.path.join(folder, name), field) for name in names}
    for tensor, name in index.items():
        if tensor not in headers[name]:
            raise UserError(
                f"{field} '{folder}': '{tensor}' is not in {name}, where {INDEX} has it; fetch the model again"
            )
    loaded = _loaded(names, index)
    return {tensor: header for name in loaded for tensor, header in headers[name].items()}


def check_numbers(folder: str, field: str) -> None:
    """That every weight is a finite number. Reads them all, at the speed of the disk.

    Raises:
        UserError: one is not; the tensor is named.
    """
    for name in _loaded(weight_files(folder), _index(folder, field)):
        path = os.path.join(folder, name)
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (no mapping)
                    if not _is_finite(file.get_tensor(tensor)):
                        raise UserError(
                            f"{field} '{folder}': the weights of '{tensor}' (in {name}) hold NaN or infinity; nothing "
                            f"can be trained from them: fetch the model again, or take an earlier checkpoint of it"
                        )
        except SafetensorError as error:
            raise UserError(f"{path} ({field}) cannot be read: {error}; fetch the model again") from error


def weight_files(folder: str) -> list[str]:
    """Names of its safetensors files."""
    return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    # One pass and no copy; NaN is passed on.
    return all(torch.isfinite(end).item() for end in torch.aminmax(wide))


def _loaded(names: Sequence[str], index: Mapping[str, str]) -> list[str]:
    """The files that transformers reads: one alone, else those of the index, else all."""
    if "model.safetensors" in names:
        return ["model.safetensors"]
    return sorted(set(index.values())) or list(names)


def _index(folder: str, field: str) -> dict[str, str]:
    """The file of every tensor; nothing where there is no index."""
    path = os.path.join(folder, INDEX)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        found = {str(tensor): str(name) for tensor, name in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} ({field}) is no index of weights ({error}); fetch the model again") from error
    if foreign := [name for name in found.values() if os.path.basename(name) != name or name in ("", ".", "..")]:
        raise UserError(f"{path} ({field}) names '{foreign[0]}', which is no file beside it; fetch the model again")
    return found


def _counted(names: Sequence[str]) -> Iterator[str]:
    """Every name of a numbered set, 'model-00001-of-00003.safetensors', of which one is there."""
    for name in names:
        if match := re.fullmatch(r"(.+-)(\d{5})-of-(\d{5})\.safetensors", name):
            stem, _, of = match.groups()
            yield from (f"{stem}{number:05d}-of-{of}.safetensors" for number in range(1, int(of) + 1))


def _none(folder: str, field: str) -> str:
    others = (name for name in os.listdir(folder) if name.endswith(_OTHER_FORMATS))
    pickles = sorted(name for name in others if name != "training_args.bin")
    if pickles:
        return (
            f"{field} '{folder}' lacks *.safetensors: its weights are in {pickles[0]}, and other formats (pickles) are "
            f"not read; convert the model with save_pretrained"
        )
    return f"{field} '{folder}' lacks config.json or *.safetensors: there are no weights in it; is it the right folder?"


def _header(path: str, field: str) -> dict[str, TensorHeader]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{path} ({field}) is cut short, or no safetensors file; fetch the model again")
        content = file.read(length)
    try:
        entries = json.loads(content)
        headers = {
            name: TensorHeader.model_validate(entry) for name, entry in entries.items() if name != "__metadata__"
        }
    except (ValueError, AttributeError, ValidationError, RecursionError) as error:
        raise UserError(f"{path} ({field}) is no safetensors file: its header cannot be read") from error
    end = 8 + length + max((header.data_offsets[1] for header in headers.values()), default=0)
    if end != size:
        raise UserError(
            f"{path} ({field}) has {size:,} bytes and its header describes {end:,}; it was cut short or is still being "
            f"written: fetch it again"
        )
    return headers
