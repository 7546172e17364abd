"""From draws to batches: reads the drawn blocks and their targets, ahead of the training step.

One thread reads and decodes the next batches while the current one trains. The readers are Protocols
(`ddk.types`), so that this package does not know where blocks and targets are stored.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddk.types import BlockReader, Draw, Int32Array, SparseTargets, TargetReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank reads at one step."""

    tokens_BL1: Int32Array
    """[B, L + 1]: position j's input is token j, its label token j + 1."""
    targets: SparseTargets | None
    """None where the loss reads none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainData:
    """The train split of every domain."""

    blocks: Mapping[str, BlockReader]
    targets: Mapping[str, TargetReader] | None
    """None where the loss reads none."""

    @property
    def sizes(self) -> dict[str, int]:
        """Train blocks by domain."""
        return {domain: len(reader) for domain, reader in self.blocks.items()}

    def load(self, draws: Sequence[Draw]) -> Batch:
        """The drawn blocks and targets, in the order of the draws; one read a domain."""
        rows_by_domain: dict[str, list[int]] = {}
        for row, drawn in enumerate(draws):
            rows_by_domain.setdefault(drawn.domain, []).append(row)
        # The reads' rows follow one another by domain; `order` puts them back into the order of the draws.
        order = np.argsort(np.concatenate([np.array(rows) for rows in rows_by_domain.values()]))
        tokens, targets = [], []
        for domain, rows in rows_by_domain.items():
            indices = [draws[row].index for row in rows]
            tokens.append(self.blocks[domain].read(indices))
            if self.targets is not None:
                targets.append(self.targets[domain].read(indices))
        return Batch(
            tokens_BL1=np.concatenate(tokens)[order],
            targets=_concatenated(targets, order) if self.targets is not None else None,
        )


def _concatenated(parts: Sequence[SparseTargets], order: np.ndarray[tuple[int], np.dtype[np.int64]]) -> SparseTargets:
    return SparseTargets(
        ids_BLK=np.concatenate([part.ids_BLK for part in parts])[order],
        logprobs_BLK=np.concatenate([part.logprobs_BLK for part in parts])[order],
        tail_mass_BL=np.concatenate([part.tail_mass_BL for part in parts])[order],
        true_logprobs_BL=np.concatenate([part.true_logprobs_BL for part in parts])[order],
    )


def prefetch(plans: Iterable[Sequence[Draw]], data: TrainData, ahead: int = 2) -> Iterator[Batch]:
    """The batches of `plans` in order, `ahead` of them read in advance by one thread.

    An error of the reading thread is raised here, at the batch that it concerns. Closing the iterator early stops
    the thread.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for draws in plans:
                if stopped.is_set():
                    return
                put(data.load(draws))
            put(None)
        except BaseException as error:  # handed over, not handled: the training step raises it
            put(error)

    thread = threading.Thread(target=read, name="ddk-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
