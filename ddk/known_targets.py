"""Restricts a teacher's targets to the tokens that the student can predict, if the teacher predicts more.

A tokenizer may end with added tokens that never occur in text (one for images, say). A teacher with rows for them gives
them a little probability. If the student has no such rows, this probability is added to the mass outside the stored
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk.values import BoolArray, Float32Array, SampledTokens, SparseTargets, TargetReader


class KnownTargets:
    """A reader of targets without the ids from `vocab_size` on.

    Args:
        targets: a store's view, whatever else it offers (shards, fetching ahead).
        vocab_size: tokens that the student predicts.
    """

    def __init__(self, targets: TargetReader, vocab_size: int) -> None:
        self._targets: Any = targets
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def k(self) -> int:
        return int(self._targets.k)

    @property
    def shard_blocks(self) -> int:
        return int(self._targets.shard_blocks)

    @property
    def block_bytes(self) -> int:
        return int(self._targets.block_bytes)

    def fetch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> bool:
        return bool(self._targets.fetch(indices))

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> SparseTargets:
        return known(self._targets.read(indices), self.vocab_size)


def known(targets: SparseTargets, vocab_size: int) -> SparseTargets:
    """The same without the entries and draws of ids from `vocab_size` on; their probability is in the tail.

    Example: of p = 0.6, 0.3 at ids 4, 9 and a tail of 0.1, with 8 tokens: 0.6 at id 4 and a tail of 0.4.
    """
    unknown_BLK = (targets.ids_BLK >= vocab_size) & (targets.logprobs_BLK > -np.inf)
    if unknown_BLK.any():
        lost_BL = np.where(unknown_BLK, np.exp(targets.logprobs_BLK), 0.0).sum(-1)
        at = {t: _tail_at(targets, unknown_BLK, t, tail_BL) for t, tail_BL in targets.tail_mass_at.items()}
        targets = replace(
            targets,
            ids_BLK=np.where(unknown_BLK, np.int32(0), targets.ids_BLK),
            logprobs_BLK=np.where(unknown_BLK, np.float32(-np.inf), targets.logprobs_BLK),
            tail_mass_BL=np.minimum(targets.tail_mass_BL + lost_BL, 1.0).astype(np.float32),
            tail_mass_at=at,
        )
    drawn = targets.sampled
    if drawn is not None and (unknown := drawn.ids_BLN >= vocab_size).any():
        targets = replace(
            targets,
            sampled=SampledTokens(
                ids_BLN=np.where(unknown, np.int32(0), drawn.ids_BLN),
                counts_BLN=np.where(unknown, np.int32(0), drawn.counts_BLN),
            ),
        )
    return targets


def _tail_at(targets: SparseTargets, unknown_BLK: BoolArray, temperature: float, tail_BL: Float32Array) -> Float32Array:
    """At a temperature the kept entries share what the tail leaves in proportion to p^(1/T)."""
    scaled_BLK = targets.logprobs_BLK.astype(np.float64) / temperature
    share_BLK = np.exp(scaled_BLK - scaled_BLK.max(-1, keepdims=True))
    lost_BL = np.where(unknown_BLK, share_BLK, 0.0).sum(-1) / share_BLK.sum(-1)
    whole_BL: Float32Array = np.minimum(tail_BL + (1.0 - tail_BL) * lost_BL, 1.0).astype(np.float32)
    return whole_BL
