"""A smaller model cut out of a larger one: some of its layers, and some of their heads and channels.

**Depth.** Whole layers are kept, by default spread evenly with the first and the last among them: of 30 layers, 11 are
0, 3, 6, 9, 12, 14, 17, 20, 23, 26, 29.

**Width.** Of every layer, the heads and the channels with the largest weights are kept, by the sum of squares of all
weights that read or write them (Muralidharan et al. 2024, 'Minitron', arXiv 2407.14679, compares such measures; theirs
need data, this one needs none). Channels of the residual stream are the same in all layers. Key and value heads stay
with query heads of their own group, and a head keeps its dimension.

A model that was cut predicts badly until it is trained: it is a better start than random weights, and no more.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddk.errors import UserError
from ddk.structure import empty_model
from ddk.student import layers_of

Tensors = Mapping[str, Callable[[], Tensor]]
"""A model's tensors by name, each read when it is called for."""

_ATTENTION = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_ELSE = {
    "self_attn.o_proj.weight": ("hidden", "heads"),
    "mlp.gate_proj.weight": ("inner", "hidden"),
    "mlp.up_proj.weight": ("inner", "hidden"),
    "mlp.down_proj.weight": ("hidden", "inner"),
    "mlp.gate_proj.bias": ("inner",),
    "mlp.up_proj.bias": ("inner",),
    "mlp.down_proj.bias": ("hidden",),
    "self_attn.o_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
}
"""What the axes of a layer's tensors are, by the name within the layer."""
_OUTSIDE = {"embed_tokens.weight": (None, "hidden"), "lm_head.weight": (None, "hidden"), "norm.weight": ("hidden",)}
"""The same of tensors outside the layers, by the end of the name."""
_MULTIPLE = 8
"""Widths that no head counts are rounded to multiples of this."""


def even_layers(total: int, count: int) -> list[int]:
    """So many of `total` layers, evenly, with both ends.

    Raises:
        UserError: there are not so many.
    """
    if not 1 <= count <= total:
        raise UserError(f"--layers is {count}, and the model has {total} layers; name a number from 1 to {total}")
    if count == 1:
        return [total - 1]
    return [round(at * (total - 1) / (count - 1)) for at in range(count)]


@dataclass(frozen=True, slots=True)
class Cut:
    """What is kept of a model, and the smaller model's config."""

    config: Any
    prefix: str
    """Of the names of the layers' tensors: `model.layers.`."""
    layers: tuple[int, ...]
    kept: Mapping[str, Tensor]
    """Indices that are kept, by axis; axes of a layer are `<layer>.<axis>`. Empty where no width is cut."""

    def weights(self, stored: Tensors) -> dict[str, Tensor]:
        """The small model's tensors, by name; of the large one's only those are read."""
        found: dict[str, Tensor] = {}
        for name, read in stored.items():
            layer, inside = _inside(name, self.prefix)
            if layer is not None and layer not in self.layers:
                continue
            value = read()
            for dimension, axis in enumerate(_axes(inside) if self.kept else ()):
                if axis is not None:
                    kept = self.kept[axis if axis == "hidden" else f"{layer}.{axis}"]
                    value = value.index_select(dimension, kept)
            new = name if layer is None else f"{self.prefix}{self.layers.index(layer)}.{inside}"
            found[new] = value.contiguous()
        return found


def plan_cut(config: Any, stored: Tensors, layers: Sequence[int] | int | None, width: float | None) -> Cut:
    """Decide what is kept.

    Args:
        config: the large model's Hugging Face config.
        stored: the large model's tensors; read where a width is cut, and not for the layers alone.
        layers: their numbers from 0, or how many; None: all.
        width: share of heads and channels, in (0, 1); None: all.

    Raises:
        UserError: the layers cannot be found, there are no such layers, or the width cannot be cut.
    """
    model = empty_model(config)
    inside, total = _layers_of(model)
    prefix = _stored_prefix(inside, stored)
    chosen = list(range(total)) if layers is None else even_layers(total, layers) if isinstance(layers, int) else layers
    if len(set(chosen)) < len(chosen) or sorted(chosen) != list(chosen) or not chosen:
        raise UserError(f"--layers is {','.join(map(str, chosen))}; name each layer once, in ascending order")
    if chosen[-1] >= total or chosen[0] < 0:
        raise UserError(f"--layers names layer {chosen[-1]}, and the model has the layers 0 to {total - 1}")
    small = copy.deepcopy(config)
    _cut_depth(small.get_text_config(), total, chosen)
    kept: dict[str, Tensor] = {}
    if width is not None:
        if not 0.0 < width < 1.0:
            raise UserError(f"--width is {width:g}; it must lie between 0 and 1, such as 0.5")
        kept = _cut_width(small.get_text_config(), model, (inside, prefix), chosen, stored, width)
    return Cut(config=small, prefix=prefix, layers=tuple(chosen), kept=kept)


def _layers_of(model: Any) -> tuple[str, int]:
    """Prefix of the decoder's layers, and how many there are.

    Raises:
        UserError: not exactly one list of modules is as long as the config says that there are layers.
    """
    text = model.config.get_text_config()
    total = int(getattr(text, "num_hidden_layers", 0))
    blocks = {type(module) for module in layers_of(model)}
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == total and {type(one) for one in module} <= blocks
    ]
    if len(lists) != 1:
        raise UserError(
            f"where the layers of a model of type '{text.model_type}' are cannot be told; cut it by hand, or choose a "
            f"smaller model of the family as student"
        )
    return f"{lists[0]}.", total


def _stored_prefix(inside: str, stored: Tensors) -> str:
    """The prefix in the files: some families leave out the name of the decoder there (`h.0.`, not `transformer.h.0.`).

    Raises:
        UserError: the files hold no layer.
    """
    for prefix in (inside, inside.partition(".")[2]):
        if prefix and any(name.startswith(prefix) for name in stored):
            return prefix
    raise UserError(f"the weights hold no tensor '{inside}…', as this model's layers are called; fetch the model again")


def _cut_depth(text: Any, total: int, chosen: Sequence[int]) -> None:
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == total and name in ("layer_types", "no_rope_layers"):
            setattr(text, name, [value[at] for at in chosen])
        elif name == "mlp_only_layers" and isinstance(value, list):
            setattr(text, name, [new for new, at in enumerate(chosen) if at in value])
        elif name == "max_window_layers" and isinstance(value, int):
            setattr(text, name, sum(at < value for at in chosen))
    text.num_hidden_layers = len(chosen)


def _cut_width(
    text: Any, model: Any, prefixes: tuple[str, str], chosen: Sequence[int], stored: Tensors, width: float
) -> dict[str, Tensor]:
    inside, prefix = prefixes
    strange = [name for name, _ in model.named_parameters() if _axes(_inside(name, inside)[1]) == ()]
    if strange:
        raise UserError(
            f"the width of a model of type '{text.model_type}' cannot be cut: what '{strange[0]}' is, is not known; "
            f"leave --width out, and cut its layers alone (--layers)"
        )
    heads, groups = (
        int(text.num_attention_heads),
        int(getattr(text, "num_key_value_heads", 0) or text.num_attention_heads),
    )
    dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    new_groups = max(1, round(width * groups))
    new_each = min(heads // groups, max(1, round(width * heads / new_groups)))
    by_heads = text.hidden_size == heads * dim
    hidden = new_groups * new_each * dim if by_heads else _rounded(width * text.hidden_size)
    inner = _rounded(width * text.intermediate_size)
    weight = _importance(stored, prefix, set(chosen), dim)
    kept = {"hidden": _largest(weight["hidden"], hidden)}
    for layer in chosen:
        kept[f"{layer}.inner"] = _largest(weight[f"{layer}.inner"], inner)
        queries = weight[f"{layer}.heads"].view(groups, heads // groups)
        group = _largest(queries.sum(1) + weight[f"{layer}.groups"], new_groups)
        each = torch.stack([at * (heads // groups) + _largest(queries[at], new_each) for at in group.tolist()])
        kept[f"{layer}.heads"] = _of_heads(each.flatten(), dim)
        kept[f"{layer}.groups"] = _of_heads(group, dim)
    had = "head_dim" in text.to_dict()
    text.hidden_size, text.intermediate_size = hidden, inner
    text.num_attention_heads, text.num_key_value_heads = new_groups * new_each, new_groups
    if had or not by_heads:
        text.head_dim = dim
    return kept


def _importance(stored: Tensors, prefix: str, chosen: set[int], dim: int) -> dict[str, Tensor]:
    """Sum of squares of the weights along each axis, by axis; of heads and groups one number a head."""
    found: dict[str, Tensor] = {}
    for name, read in stored.items():
        layer, inside = _inside(name, prefix)
        axes = _axes(inside)
        if len(axes) < 2 or (layer is not None and layer not in chosen):  # norms and biases say little of a channel
            continue
        value = read()
        for dimension, axis in enumerate(axes):
            if axis is None:
                continue
            square = value.double().square().sum(1 - dimension)
            if axis in ("heads", "groups"):
                square = square.view(-1, dim).sum(1)
            key = axis if axis == "hidden" else f"{layer}.{axis}"
            found[key] = found.get(key, 0.0) + square
    return found


def _largest(weight: Tensor, count: int) -> Tensor:
    """Indices of the largest, in ascending order."""
    return weight.topk(count).indices.sort().values


def _of_heads(heads: Tensor, dim: int) -> Tensor:
    return (heads[:, None] * dim + torch.arange(dim)).flatten()


def _rounded(size: float) -> int:
    return max(1, round(size / _MULTIPLE)) * _MULTIPLE


def _inside(name: str, prefix: str) -> tuple[int | None, str]:
    """Number of the layer and the name within it; None and the name's end outside of the layers."""
    if name.startswith(prefix):
        layer, _, rest = name.removeprefix(prefix).partition(".")
        return int(layer), rest
    return None, name.removeprefix("model.")


def _axes(inside: str) -> tuple[str | None, ...]:
    """What the axes of a tensor are; () where that is not known."""
    if match := _ATTENTION.fullmatch(inside):
        rows = "heads" if match[1] == "q" else "groups"
        return (rows, "hidden") if match[2] == "weight" else (rows,)
    return _ELSE.get(inside) or _OUTSIDE.get(inside) or ()
