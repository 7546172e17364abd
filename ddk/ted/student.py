"""TED: the student's layers imitate those parts of the teacher's layers that matter for the task.

Liang et al. (ICML 2023), 'Less is More: Task-aware Layer-wise Distillation for Language Model Compression'; a baseline
of the DDK paper. Behind matched layers of both models stand linear filters g with bias, the student's from its width
D_s to the teacher's D_t, the teacher's from D_t to D_t.

1. Stage 1, `ddk.ted.filters`: both models are frozen; each filter by itself learns to predict the next token, its
   output going through the teacher's final norm and output projection. It learns to keep what the task needs of its
   layer. The norm leaves the filters' scale free; in the end it is set so that every output has a mean square of 1.
2. Stage 2, `TedStudent`: the student and its filters train on

       CE + γ·divergence + λ · Σ_l mean_D (g_s,l(h_s,l) − g_t,l(h_t,l))²

   per position that carries loss; h are the matched layers' outputs. The teacher and its filters are frozen.

What differs from the original: the filters share the teacher's own norm and projection in stage 1 (there, each has a
head of its own, which at 152,000 tokens would be larger than the student); they start as the identity (the student's
cut or padded with zeros) and are rescaled after stage 1, so that λ means the same for any pair of models; the layers'
terms are summed, as in the paper, where the authors' code averages them.

This is the only method that needs the live teacher: a transformers model on the student's device, which runs forward at
every step in spite of the cache. It needs additional memory and time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ddk.context import Stretch
from ddk.errors import UserError
from ddk.fused import fused_loss
from ddk.loss import Teacher
from ddk.student import StudentLoss, counted_rows, layers_of
from ddk.train_config import LossConfig, TedConfig

_CROSS_ENTROPY = LossConfig(gamma=0.0)


class TedStudent(StudentLoss):
    """A student with its loss, the distance of its layers from the teacher's included.

    Args:
        model: the student, on its device.
        vocab_size: tokens of the tokenizer.
        loss: γ and the rest.
        teacher: the live teacher, a causal language model of any float dtype. It is moved to the student's device,
            frozen, and no part of this module: neither DDP nor a checkpoint sees it.
        config: λ and the layers.

    Attributes:
        filters: two lists of linear maps, `filters.student` and `filters.teacher`, float32. The teacher's are frozen,
            but belong into checkpoints: stage 1 is not repeated when a run is resumed.

    Raises:
        UserError: more pairs than layers, or a model whose layers, norm or projection cannot be found.
    """

    def __init__(self, model: Any, vocab_size: int, loss: LossConfig, teacher: Any, config: TedConfig) -> None:
        super().__init__(model, vocab_size, loss)
        self.config = config
        head = model.get_output_embeddings().weight
        teacher = teacher.to(head.device).eval().requires_grad_(False)
        student_layers, teacher_layers = _layers(model, "student"), _layers(teacher, "teacher")
        pairs = matched_layers(len(student_layers), len(teacher_layers), config.layers)
        self._caught = _Catch([student_layers[own] for own, _ in pairs])
        self._live = _Live(
            model=teacher,
            caught=_Catch([teacher_layers[its] for _, its in pairs]),
            norm=_final_norm(teacher, teacher_layers[-1]),
            head=_projection(teacher, vocab_size),
        )
        width = _width(teacher)
        self.filters = torch.nn.ModuleDict(
            {
                "student": torch.nn.ModuleList(_identity(_width(model), width) for _ in pairs),
                "teacher": torch.nn.ModuleList(_identity(width, width) for _ in pairs),
            }
        ).to(head.device)
        self.teacher_filters.requires_grad_(False)

    @property
    def student_filters(self) -> torch.nn.ModuleList:
        return cast("torch.nn.ModuleList", self.filters["student"])

    @property
    def teacher_filters(self) -> torch.nn.ModuleList:
        return cast("torch.nn.ModuleList", self.filters["teacher"])

    @property
    def extra_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The filters' parameters, frozen ones included, by their names in a checkpoint: `ted.student.0.weight`, …"""
        return {f"ted.{name}": parameter for name, parameter in self.filters.named_parameters()}

    def forward(
        self,
        inputs_BL: Tensor,
        labels_BL: Tensor,
        valid_BL: Tensor | None = None,
        teacher: Teacher | None = None,
        scale: float = 1.0,
        stretch: Stretch | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `StudentLoss`, with the layers' distances, summed over the positions and scaled likewise, in the total.

        Without gradients, as the gap is measured, the teacher does not run and the total lacks the distances. It reads
        ordinary positions, whatever the student is shown.
        """
        if not torch.is_grad_enabled():
            return super().forward(inputs_BL, labels_BL, valid_BL, teacher, scale, stretch)
        rows = counted_rows(valid_BL)
        with torch.no_grad():
            wanted = [
                filtered(one, hidden_TD)
                for one, hidden_TD in zip(self.teacher_filters, self.teacher_hidden(inputs_BL, rows), strict=True)
            ]
        with self._caught.open() as caught:
            total, ce, kl = super().forward(inputs_BL, labels_BL, valid_BL, teacher, scale, stretch)
        for place, (one, wanted_TD) in enumerate(zip(self.student_filters, wanted, strict=True)):
            found_TD = filtered(one, caught[place].flatten(0, 1)[rows])
            distance = (found_TD - wanted_TD).square().mean(-1).sum()
            total = total + self.config.weight * scale * distance
        return total, ce, kl

    @torch.no_grad()
    def teacher_hidden(self, inputs_BL: Tensor, rows: slice | Tensor) -> list[Tensor]:
        """[T, D_t] of each matched layer, at the given rows of the flattened positions."""
        with self._live.caught.open() as caught:
            self._live.model.base_model(input_ids=inputs_BL, use_cache=False)
        return [caught[place].flatten(0, 1)[rows] for place in range(len(self.teacher_filters))]

    @torch.no_grad()
    def student_hidden(self, inputs_BL: Tensor, rows: slice | Tensor) -> list[Tensor]:
        """[T, D_s] likewise."""
        with self._caught.open() as caught:
            self.model.base_model(input_ids=inputs_BL, use_cache=False)
        return [caught[place].flatten(0, 1)[rows] for place in range(len(self.student_filters))]

    def task_loss(self, filtered_TD: Tensor, labels_T: Tensor, scale: float) -> Tensor:
        """Sum of cross-entropies times `scale`, from a filter's output through the teacher's norm and projection."""
        head = self._live.head
        normed_TD = self._live.norm(filtered_TD.to(head.weight.dtype))
        return fused_loss(
            normed_TD,
            head.weight,
            labels_T,
            None,
            _CROSS_ENTROPY,
            bias_V=head.bias,
            vocab_size=self.vocab_size,
            scale=scale,
        ).total


def matched_layers(student: int, teacher: int, pairs: int | None) -> list[tuple[int, int]]:
    """Which layer of the student follows which of the teacher's, from 0 on: evenly spread, the last to the last.

    Example: of 24 and 48, all 24: (0, 1), (1, 3), … (23, 47); 2 pairs: (11, 23), (23, 47).

    Args:
        student, teacher: their layers.
        pairs: how many; None: as many as the shallower has.

    Raises:
        UserError: the shallower has fewer.
    """
    most = min(student, teacher)
    pairs = most if pairs is None else pairs
    if pairs > most:
        raise UserError(
            f"ted.layers is {pairs}, and the student has {student} layers, the teacher {teacher}; set it to at most "
            f"{most}"
        )
    return [(j * student // pairs - 1, j * teacher // pairs - 1) for j in range(1, pairs + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Live:
    """The teacher, in a plain object: a module would make it part of its owner's parameters."""

    model: Any
    caught: _Catch
    norm: torch.nn.Module
    head: torch.nn.Linear


class _Catch:
    """The outputs [B, L, D] of some layers, by their place in the list, while a forward pass runs."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self._found: dict[int, Tensor] | None = None
        for place, layer in enumerate(layers):
            layer.register_forward_hook(partial(self._keep, place))

    @contextlib.contextmanager
    def open(self) -> Iterator[dict[int, Tensor]]:
        # Closed again before the backward pass, in which checkpointed layers run once more.
        found: dict[int, Tensor] = {}
        self._found = found
        try:
            yield found
        finally:
            self._found = None

    def _keep(self, place: int, layer: torch.nn.Module, inputs: object, output: Any) -> None:
        if self._found is not None:
            self._found[place] = output[0] if isinstance(output, tuple) else output


def filtered(one: torch.nn.Module, hidden_TD: Tensor) -> Tensor:
    """float32, or float64 behind filters of it; autocast casts the product alone."""
    dtype = cast("torch.nn.Linear", one).weight.dtype
    return cast("Tensor", one(hidden_TD.to(dtype))).to(dtype)


def _identity(inputs: int, outputs: int) -> torch.nn.Linear:
    one = torch.nn.Linear(inputs, outputs)
    torch.nn.init.eye_(one.weight)
    torch.nn.init.zeros_(one.bias)
    return one


def _width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _layers(model: Any, who: str) -> list[torch.nn.Module]:
    layers = layers_of(model)
    if not layers:
        raise UserError(f"method ted cannot find the layers of the {who} ({type(model).__name__}); use method kd")
    return layers


def _projection(teacher: Any, vocab_size: int) -> torch.nn.Linear:
    head = teacher.get_output_embeddings()
    if not StudentLoss(teacher, vocab_size, _CROSS_ENTROPY).fused:
        raise UserError(
            f"method ted needs a teacher whose logits are a projection of its hidden states and no more; "
            f"{type(teacher).__name__} does more; use method kd"
        )
    if head.weight.shape[0] < vocab_size:
        raise UserError(
            f"the teacher predicts {head.weight.shape[0]} tokens and the tokenizer has {vocab_size}; teacher and "
            f"student must share the tokenizer (they may be padded differently)"
        )
    return cast("torch.nn.Linear", head)


@torch.no_grad()
def _final_norm(teacher: Any, last_layer: torch.nn.Module) -> torch.nn.Module:
    """What stands between the last layer and the output projection, found by what it reads and gives."""
    seen: list[tuple[torch.nn.Module, Tensor, Tensor]] = []

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            seen.append((module, inputs[0], output))

    last = _Catch([last_layer])
    hooks = [module.register_forward_hook(note) for module in teacher.base_model.modules()]
    try:
        with last.open() as caught:
            tokens = torch.arange(8, device=next(teacher.parameters()).device)[None]
            final_BLD = teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    # Flat: some models fold the batch's dimensions in between.
    for module, given, gave in seen:
        if torch.equal(given.flatten(), caught[0].flatten()) and torch.equal(gave.flatten(), final_BLD.flatten()):
            return module
    raise UserError(f"method ted cannot find the final norm of the teacher ({type(teacher).__name__}); use method kd")
