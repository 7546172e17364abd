"""A student for longer contexts than its blocks, after E²-LLM (arXiv 2401.06951): what its rotary embedding is shown.

At every step every block draws a scale g and an offset t; position m of the block is shown as

    (m + t)/g      with  g ~ U{g_min … max_scale},   t = 0 for m < offset_after,  else  t ~ U{0 … g·L − R}

where L is the length that the student knows (`trained`), and R the length of a block (`packing.seq_len`), so that no
position shown lies beyond L. g_min is 1, and ⌈R/L⌉ where blocks are longer than what the student knows. One set of
weights then reads many densities of positions and many distances; the saved student divides its positions by
target/L, which transformers and vLLM know as linear scaling. `saved_share` departs from the paper: that share of the
blocks draws g = target/L, the scale that the saved student is read at, and only the rest is uniform.

The teacher's targets are of ordinary positions, whatever the student is shown. Nothing here knows a model:
`ddk.rotary` shows positions to one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddk.errors import UserError
from ddk.train_config import ContextConfig
from ddk.values import BoolArray

FIELD = "student.context"
_STREAM = 0x52_6F_50_45
"""Keeps these draws apart from others that are keyed by seed and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """How the positions of some blocks are shown: (m + t)/g, with t from the position `after` on, and 0 before."""

    scale_B: npt.NDArray[np.float64]
    """g of each block, at least 1 in training."""
    offset_B: npt.NDArray[np.int64]
    """t of each block."""
    after: int = 0

    def __len__(self) -> int:
        return len(self.scale_B)

    def __getitem__(self, rows: slice) -> Stretch:
        return Stretch(scale_B=self.scale_B[rows], offset_B=self.offset_B[rows], after=self.after)

    @property
    def changed(self) -> BoolArray:
        """[B], which blocks are shown at other positions than the ordinary ones."""
        found: BoolArray = (self.scale_B != 1.0) | (self.offset_B != 0)
        return found

    def positions(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """[B, length] float32, rounded once from float64. Ordinary positions are whole numbers, exactly."""
        places = np.arange(length)
        shown_BL = (places + np.where(places < self.after, 0, self.offset_B[:, None])) / self.scale_B[:, None]
        return torch.from_numpy(shown_BL.astype(np.float32)).to(device)


def uniform_stretch(blocks: int, scale: float) -> Stretch | None:
    """Every position divided by the same number, as the saved student does; None where that changes nothing."""
    if scale == 1.0:
        return None
    return Stretch(scale_B=np.full(blocks, scale), offset_B=np.zeros(blocks, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextPlan:
    """The setting for one student and one length of blocks."""

    target: int
    """Positions that the saved student declares."""
    trained: int
    """L, positions that the student knows before."""
    block: int
    """R, positions of a block."""
    max_scale: int
    offset_after: int
    distil: bool
    saved_share: float
    """Share of the blocks that draw the saved student's own scale; the rest is uniform."""

    @property
    def factor(self) -> float:
        """By which the saved student divides its positions, target/L."""
        return self.target / self.trained

    @property
    def min_scale(self) -> int:
        """The smallest g at which a whole block is shown within L."""
        return max(1, math.ceil(self.block / self.trained))

    @property
    def gap_scale(self) -> float:
        """At which the gap is measured: 1, ordinary positions, unless a block is longer than what the student knows."""
        return max(1.0, self.block / self.trained)

    def draw(self, seed: int, step: int, rows: Sequence[int]) -> Stretch:
        """Scale and offset of some blocks of a step: a pure function of (seed, step, row).

        Args:
            seed: of the run.
            step: of the training, from 0.
            rows: numbers of the blocks in the step's whole batch, so that ranks draw what one would.
        """
        scales, offsets = [], []
        for row in rows:
            random = np.random.default_rng([seed, step, row, _STREAM])
            scale = float(random.integers(self.min_scale, self.max_scale, endpoint=True))
            farthest = int(scale) * self.trained
            if self.saved_share and random.random() < self.saved_share:
                scale, farthest = self.factor, self.target
            scales.append(scale)
            offsets.append(int(random.integers(0, max(0, farthest - self.block), endpoint=True)))
        return Stretch(scale_B=np.array(scales), offset_B=np.array(offsets, np.int64), after=self.offset_after)


def plan_context(config: ContextConfig, declared: int | None, seq_len: int, model: str) -> ContextPlan:
    """The setting, checked against the student and the blocks.

    Args:
        declared: positions that the student's config declares; None where it does not say.
        seq_len: R.
        model: the student's name, for messages.

    Raises:
        UserError: they do not fit together.
    """
    trained = config.trained or declared
    if trained is None:
        raise UserError(
            f"{FIELD} needs to know how many positions the student knows, and the config.json of '{model}' does not "
            f"say; set {FIELD}.trained"
        )
    if declared is not None and trained > declared:
        raise UserError(f"{FIELD}.trained is {trained}, and '{model}' declares {declared} positions; lower it")
    if config.target <= trained:
        raise UserError(
            f"{FIELD}.target is {config.target}, and the student knows {trained} positions already; raise it, or set "
            f"{FIELD}.trained to the length that it was trained at"
        )
    if config.target < seq_len:
        raise UserError(f"{FIELD}.target is {config.target}, and packing.seq_len is {seq_len}; raise the one")
    most = config.max_scale * trained
    if most < config.target:
        raise UserError(
            f"{FIELD}.target is {config.target}, and {FIELD}.max_scale {config.max_scale} times the {trained} "
            f"positions that the student knows are {most}; set max_scale to at least "
            f"{math.ceil(config.target / trained)}"
        )
    return ContextPlan(
        target=config.target,
        trained=trained,
        block=seq_len,
        max_scale=config.max_scale,
        offset_after=config.offset_after,
        distil=config.distil,
        saved_share=config.saved_share,
    )


def stretched_config(config: Any, factor: float, positions: int) -> Any:
    """A copy of a Hugging Face config with default rotary positions whose model divides them by `factor`.

    Args:
        positions: that it declares.
    """
    found = copy.deepcopy(config)
    text = found.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_type": "linear", "factor": float(factor)}
    text.max_position_embeddings = positions
    return found
