"""Stage 1 of TED: the filters behind the matched layers learn the task, one by one, the models being frozen.

Each is a 'tuned lens': its output goes through the teacher's final norm and output projection, and learns to predict
the next token. See `ddk.ted.student` for what the filters are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ddk.data import Batch, TrainData, prefetch
from ddk.mixture import proportional_mixture
from ddk.parallel import Precision
from ddk.sampler import draw, initial_state
from ddk.student import counted_rows
from ddk.ted.student import TedStudent, filtered
from ddk.values import Draw


def train_filters(
    student: TedStudent,
    data: TrainData,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    micro_batch_size: int | None = None,
    precision: Precision = "fp32",
    separator: int | tuple[int, ...] | None = None,
    on_step: Callable[[int, float, float], None] = lambda step, student_ce, teacher_ce: None,
) -> None:
    """Train the filters on the task, set their scale, and freeze the teacher's again.

    Blocks are drawn by the domains' sizes. Everything follows from the seed: of several processes each does the same.

    Args:
        student: with fresh filters, not yet spread over processes; its weights and mode are left as they are.
        data: train blocks; targets are not read.
        steps: 0 only sets the scale.
        batch_size: blocks a step.
        device: the student's.
        micro_batch_size: blocks a pass; smaller needs less memory. Default: all of the step's.
        separator: as the trainer's, where a document's first token carries no loss.
        on_step: told the steps done, and the mean cross-entropy (nats) behind the student's and the teacher's filters.
    """
    stage = _Stage(
        student=student, device=device, size=micro_batch_size or batch_size, precision=precision, separator=separator
    )
    rate = student.config.filter_learning_rate
    student.filters.requires_grad_(True)
    optimizer = torch.optim.Adam(student.filters.parameters(), lr=rate)
    was_training = student.model.training
    student.model.eval()
    # One batch more than there are steps, for the scale.
    batches = prefetch(_plans(data, seed, steps + 1, batch_size), replace(data, targets=None))
    try:
        with contextlib.closing(batches):  # type: ignore[type-var]
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1.0 - step / steps)
                optimizer.zero_grad(set_to_none=True)
                student_ce, teacher_ce = stage.backward(next(batches))
                optimizer.step()
                on_step(step + 1, student_ce, teacher_ce)
            stage.set_scale(next(batches))
    finally:
        optimizer.zero_grad(set_to_none=True)
        student.teacher_filters.requires_grad_(False)
        student.model.train(was_training)


def _plans(data: TrainData, seed: int, steps: int, batch_size: int) -> Iterator[Sequence[Draw]]:
    sizes = data.sizes
    mixture, state = proportional_mixture(sizes), initial_state(sizes)
    for _ in range(steps):
        batch, state = draw(mixture, sizes, seed, state, batch_size)
        yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What is done with a batch."""

    student: TedStudent
    device: torch.device
    size: int
    """Blocks of a micro-batch."""
    precision: Precision
    separator: int | tuple[int, ...] | None

    def backward(self, batch: Batch) -> tuple[float, float]:
        """Add the gradients of the mean over the positions; returns it, meant over the filters of either side too."""
        parts, positions = self._parts(batch)
        found = torch.zeros(2, device=self.device)
        for inputs_BL, labels_BL, valid_BL in parts:
            rows = counted_rows(valid_BL)
            labels_T = labels_BL.flatten()[rows]
            for side, (filters, hidden) in enumerate(self._sides(inputs_BL, rows)):
                for one, hidden_TD in zip(filters, hidden, strict=True):
                    # One filter at a time: what its projection onto the vocabulary needs is freed before the next.
                    with self._autocast:
                        loss = self.student.task_loss(filtered(one, hidden_TD), labels_T, 1.0 / positions)
                    loss.backward()  # type: ignore[no-untyped-call]
                    found[side] += loss.detach() / len(filters)
        student_ce, teacher_ce = found.tolist()
        return student_ce, teacher_ce

    @torch.no_grad()
    def set_scale(self, batch: Batch) -> None:
        """Scale every filter so that its outputs have a mean square of 1 on these positions."""
        filters = [*self.student.student_filters, *self.student.teacher_filters]
        squares = torch.zeros(len(filters), device=self.device, dtype=torch.float64)
        parts, positions = self._parts(batch)
        for inputs_BL, _, valid_BL in parts:
            hidden = [one for _, side in self._sides(inputs_BL, counted_rows(valid_BL)) for one in side]
            for place, (one, hidden_TD) in enumerate(zip(filters, hidden, strict=True)):
                with self._autocast:
                    squares[place] += filtered(one, hidden_TD).square().mean(-1).sum()
        for one, square in zip(filters, (squares / positions).tolist(), strict=True):
            for parameter in one.parameters():
                parameter.div_(square**0.5 or 1.0)

    @property
    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _parts(self, batch: Batch) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
        """Inputs, labels and whether a position carries loss, [B, L] each, of every micro-batch; how many do, or 1."""
        tokens_BL1 = torch.from_numpy(batch.tokens_BL1.astype(np.int64)).to(self.device)
        counts_BL = batch.valid(self.separator)
        valid_BL = torch.from_numpy(np.ones_like(batch.tokens_BL1[:, 1:], bool) if counts_BL is None else counts_BL)
        cuts = [slice(start, start + self.size) for start in range(0, len(tokens_BL1), self.size)]
        parts = [(tokens_BL1[cut, :-1], tokens_BL1[cut, 1:], valid_BL[cut].to(self.device)) for cut in cuts]
        return parts, max(1, int(valid_BL.sum()))

    def _sides(self, inputs_BL: Tensor, rows: slice | Tensor) -> list[tuple[torch.nn.ModuleList, list[Tensor]]]:
        """Filters and the hidden states that they read: the student's, the teacher's."""
        with self._autocast:
            return [
                (self.student.student_filters, self.student.student_hidden(inputs_BL, rows)),
                (self.student.teacher_filters, self.student.teacher_hidden(inputs_BL, rows)),
            ]
