"""The state of a training besides its tensors, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ddk.sampler import SamplerState
from ddk.trainer import TrainerState
from storage.errors import StoreDamagedError
from storage.files.fields import Whole, first_problem


def state_as_json(state: TrainerState) -> dict[str, Any]:
    return {
        "step": state.step,
        "drawn": dict(state.sampler.drawn),
        "mixture_versions": list(state.mixture_versions),
        **({"optimizer_start": state.optimizer_start} if state.optimizer_start else {}),
    }


class _StoredState(BaseModel):
    model_config = ConfigDict(extra="forbid")

    step: Whole
    drawn: dict[str, Whole]
    mixture_versions: tuple[Whole, ...]
    optimizer_start: Whole = 0


def state_from_json(stored: Mapping[str, Any], place: str) -> TrainerState:
    """The state of a training again.

    Args:
        place: where it was stored, for the error.

    Raises:
        StoreDamagedError: it is none.
    """
    try:
        state = _StoredState.model_validate(stored)
    except ValidationError as error:
        raise StoreDamagedError(f"{place} is no state of a training ({first_problem(error)})") from None
    return TrainerState(
        sampler=SamplerState(step=state.step, drawn=state.drawn),
        mixture_versions=state.mixture_versions,
        optimizer_start=state.optimizer_start,
    )
