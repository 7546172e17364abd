"""Shows a model's rotary embedding other positions than the ordinary ones.

The models of transformers calculate cosine and sine of all positions once per forward pass, in one module, from
`position_ids`. A hook on that module of that one model exchanges them; the attention masks, which are made from
`position_ids` too, see the ordinary ones. (Given to the model itself, fractional ones would be taken for the starts of
many short sequences in one.) The module runs outside of the decoder's layers, so that neither activation
checkpointing, nor a compiled layer, nor FSDP's wrapping of layers has anything to do with it.

Which models can be stretched is found out from their structure: `check_rotary`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ddk.context import FIELD, Stretch, stretched_config
from ddk.errors import UserError

_TRIED_SCALE, _TRIED_LENGTH = 3.0, 16


class ShownPositions:
    """The rotary embedding of one model, which is shown other positions while `at` is open.

    Args:
        model: as of transformers, on its device.
        layers: of its decoder.

    Raises:
        UserError: see `find_rotary`.
    """

    def __init__(self, model: Any, layers: Sequence[torch.nn.Module]) -> None:
        self._shown: Stretch | None = None
        self._seen = 0
        find_rotary(model, layers).register_forward_pre_hook(self._exchange, with_kwargs=True)

    @contextlib.contextmanager
    def at(self, stretch: Stretch | None) -> Iterator[None]:
        """Within, forward passes show these positions; None: the ordinary ones.

        Raises:
            RuntimeError: the model did not ask for its positions exactly once.
        """
        if stretch is None:
            yield
            return
        self._shown, self._seen = stretch, 0
        try:
            yield
            if self._seen != 1:
                raise RuntimeError(f"the model calculated its rotary positions {self._seen} times in a forward pass")
        finally:
            self._shown = None

    def _exchange(self, module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._shown is None:
            return None
        self._seen += 1
        ordinary = named["position_ids"] if "position_ids" in named else given[1]
        shown = self._shown.positions(ordinary.shape[-1], ordinary.device)
        if "position_ids" in named:
            return given, {**named, "position_ids": shown}
        return (given[0], shown, *given[2:]), named


def find_rotary(model: Any, layers: Sequence[torch.nn.Module]) -> torch.nn.Module:
    """The module that calculates a model's rotary positions: one, outside of the layers, of the default kind.

    Raises:
        UserError: there is none such; the model's type is named.
    """
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    inside = {id(module) for layer in layers for module in layer.modules()}
    found: list[torch.nn.Module] = [
        module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    several = isinstance(rope, dict) and kind is None and bool(rope)
    if kind not in (None, "default"):
        raise _refusal(model, f"already stretches its rotary positions ('{kind}' in its config.json)")
    if several or len(found) > 1:
        raise _refusal(model, "has several rotary embeddings")
    if not found or kind is None:
        raise _refusal(model, "has no rotary embedding that could be found")
    if id(found[0]) in inside or not layers:
        raise _refusal(model, "calculates rotary positions in each of its layers")
    return found[0]


def check_rotary(model: Any, layers: Sequence[torch.nn.Module]) -> None:
    """That positions which are shown as m/g give what the model gives that is saved with the linear scaling g.

    Both are calculated by the model's own module, made from both configs; numbers of the model are not needed.

    Args:
        model: may be on the meta device.

    Raises:
        UserError: they do not, or see `find_rotary`.
    """
    rotary = find_rotary(model, layers)
    hidden = torch.zeros(1, _TRIED_LENGTH, 8)
    places = torch.arange(_TRIED_LENGTH)[None]
    try:
        ordinary = type(rotary)(config=model.config)
        saved = type(rotary)(config=stretched_config(model.config, _TRIED_SCALE, 4 * _TRIED_LENGTH))
        shown = ordinary(hidden, position_ids=places / _TRIED_SCALE)
        wanted, unchanged = saved(hidden, position_ids=places), ordinary(hidden, position_ids=places)
        same = all(torch.allclose(one, other, atol=1e-5) for one, other in zip(shown, wanted, strict=True))
        differs = not torch.allclose(shown[1], unchanged[1], atol=1e-3)
    except Exception as error:  # whatever a model's own code raises
        raise _refusal(model, f"has a rotary embedding of its own kind ({type(error).__name__})") from error
    if not (same and differs and _asks_once(model, layers)):
        raise _refusal(model, "has a rotary embedding of its own kind")


@torch.no_grad()
def _asks_once(model: Any, layers: Sequence[torch.nn.Module]) -> bool:
    """Whether a forward pass calculates positions once, from `position_ids` [B or 1, L].

    A model that does not run on the meta device is taken to; `ShownPositions` sees to it in the training.
    """
    asked: list[tuple[int, ...]] = []

    def note(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        asked.append(tuple((named["position_ids"] if "position_ids" in named else given[1]).shape))

    hook = find_rotary(model, layers).register_forward_pre_hook(note, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        # It looks at the positions' values, of which the meta device has none.
        with patch("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None):
            model(input_ids=torch.zeros(1, _TRIED_LENGTH, dtype=torch.int64, device=device), use_cache=False)
    except Exception:  # whatever a model's own code raises on a device without numbers
        return True
    finally:
        hook.remove()
    return len(asked) == 1 and len(asked[0]) == 2


def _refusal(model: Any, why: str) -> UserError:
    kind = model.config.get_text_config().model_type
    return UserError(
        f"{FIELD} is set, and a student of type '{kind}' {why}; leave {FIELD} out, or choose a student with plain "
        f"rotary positions (such as those of Llama 2, Mistral, Qwen2 and Qwen3)"
    )
