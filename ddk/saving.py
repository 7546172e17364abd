"""The tensors of a training on disk: torch.distributed.checkpoint in safetensors, readable on any number of ranks.

Every rank writes the shares that it holds into one file; its header says which part of which tensor each is (JSON, no
pickle). A reader on another number of ranks puts its own shares together from them. Names in the files:

    model.<parameter>        weights, float32
    exp_avg.<parameter>      AdamW's first moment
    exp_avg_sq.<parameter>   and second

AdamW's step count follows from `TrainerState`: the steps since the optimizer began with empty moments.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.checkpoint.state_dict_saver import save as save_shares

from ddk.trainer import Trainer, TrainerState

_MOMENTS = ("exp_avg", "exp_avg_sq")
_Value = TypeVar("_Value")


def save(trainer: Trainer, folder: str) -> None:
    """Write this rank's part of a checkpoint; every rank must call it.

    Args:
        folder: a local folder, this rank's own or one for all; made if it is not there.

    Raises:
        OSError: a rank could not write its file.
    """
    os.makedirs(folder, exist_ok=True)
    with _quiet(), _root_cause(folder):
        save_shares(
            dict(_live(trainer, trainer.state)),
            storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True),
            no_dist=trainer.world.size == 1,
        )
    for name in os.listdir(folder):
        _order_header(os.path.join(folder, name))


def load(trainer: Trainer, state: TrainerState, folder: str) -> None:
    """Take up where `state` and the files of all ranks were saved; every rank must call it.

    Args:
        folder: a local folder with the files of all ranks that wrote.

    Raises:
        ValueError: the checkpoint is of another model (the first name that differs is given), its optimizer state
            does not cover it, or the state is of other domains.
    """
    _check_domains(trainer, state)
    live = _live(trainer, state)
    with _quiet(), _root_cause(folder):
        reader = HuggingFaceStorageReader(folder)
        found = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
        if 0 < state.step == state.optimizer_start:  # the moments there are those of the run that the weights are from
            live, found = _weights(live), _weights(found)
        _check_names({name: tuple(tensor.shape) for name, tensor in live.items()}, found)
        load_shares(dict(live), storage_reader=reader, no_dist=trainer.world.size == 1)
    trainer.state = state


def _weights(named: Mapping[str, _Value]) -> dict[str, _Value]:
    return {name: value for name, value in named.items() if not name.startswith(tuple(f"{one}." for one in _MOMENTS))}


def _live(trainer: Trainer, state: TrainerState) -> dict[str, Tensor]:
    """The trainer's own tensors by their names in a file, the optimizer's made where it has none yet."""
    live = {f"model.{name}": parameter.detach() for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        if not parameter.requires_grad:
            continue
        held = trainer.optimizer.state[parameter]
        # AdamW keeps its step count on the CPU unless it is fused.
        where = parameter.device if trainer.device.type == "cuda" else torch.device("cpu")
        held["step"] = torch.tensor(float(state.step - state.optimizer_start), device=where)
        for moment in _MOMENTS:
            if moment not in held:
                held[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            live[f"{moment}.{name}"] = held[moment]
    return live


def _order_header(path: str) -> None:
    """Put the entries of a safetensors header in order, in place: the library leaves `__metadata__` in a random one,
    and the same training is to give the same bytes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) != length:  # written in another style: it is right as it is
            return
        file.seek(8)
        file.write(ordered)


def _check_domains(trainer: Trainer, state: TrainerState) -> None:
    if set(state.sampler.drawn) != set(trainer.data.sizes):
        raise ValueError(
            f"the checkpoint is of domains {sorted(state.sampler.drawn)}, this run has {sorted(trainer.data.sizes)}"
        )


def _check_names(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    if differing := sorted(set(wanted) ^ set(found)):
        # A missing moment would restart at zero, and nobody would notice.
        raise ValueError(f"the checkpoint is of another model: '{differing[0]}' is in only one of the two")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"the checkpoint is of another model: '{name}' has shape {found[name]} there and {shape} here"
            )


@contextmanager
def _root_cause(folder: str) -> Iterator[None]:
    """What went wrong on a rank, in place of torch's `CheckpointException`: that is no `Exception`, passes whoever
    clears up after one, and prints the tracebacks of all ranks."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not causes:
            raise RuntimeError(str(error)) from None
        if isinstance(causes[0], OSError) and causes[0].filename is None:
            causes[0].filename = folder
        raise causes[0] from None


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.distributed.checkpoint says on one process that there is only one, and logs each of its steps."""
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            yield
    finally:
        log.setLevel(before)
