"""From draws to batches: reads the drawn blocks and their targets, ahead of the training step.

One thread reads and decodes the next batches while the current one trains. If blocks and targets are remote, other
threads prefetch those of later steps (`ddk.ahead`). The readers are Protocols (`ddk.values`), so that this package does
not depend on where blocks and targets are stored.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from ddk.ahead import FetchAhead, FetchesAhead
from ddk.errors import LostPartError
from ddk.sampler import Window
from ddk.values import (
    BlockReader,
    BoolArray,
    Draw,
    Float32Array,
    Int32Array,
    SampledTokens,
    SparseTargets,
    TargetReader,
)

_PATIENCE_S = 1.0
_Order = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank reads at one step."""

    tokens_BL1: Int32Array
    """[B, L + 1]: position j's input is token j, its label token j + 1."""
    targets: SparseTargets | None
    """None where the loss reads none."""
    valid_BL: BoolArray | None = None
    """Whether a position carries loss, where the corpus marks some that do not; None: all do."""
    domains: tuple[str, ...] = ()
    """Of each block."""

    def valid(self, separator: int | tuple[int, ...] | None) -> BoolArray | None:
        """`valid_BL`, less the positions that foretell a document's first token.

        Args:
            separator: the token behind which a document begins, or several such; None leaves those positions in.
        """
        if separator is None:
            return self.valid_BL
        inside_BL: BoolArray = ~np.isin(self.tokens_BL1[:, :-1], separator)
        return inside_BL if self.valid_BL is None else inside_BL & self.valid_BL


@runtime_checkable
class MarkedBlocks(Protocol):
    """Blocks of which some positions carry no loss, as a prompt's do."""

    def loss_mask(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> BoolArray | None:
        """[n, L] of the given blocks, true where position j's label (token j + 1) counts; None: all do."""
        ...


def loss_mask(blocks: BlockReader, indices: Sequence[int] | npt.NDArray[np.int64]) -> BoolArray | None:
    """[n, L], true where a position carries loss; None where all do."""
    return blocks.loss_mask(indices) if isinstance(blocks, MarkedBlocks) else None


class First:
    """The first blocks of others."""

    def __init__(self, blocks: BlockReader, number: int) -> None:
        self._blocks = blocks
        self._number = min(number, len(blocks))

    def __len__(self) -> int:
        return self._number

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Int32Array:
        return self._blocks.read(indices)

    def loss_mask(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> BoolArray | None:
        return loss_mask(self._blocks, indices)


@runtime_checkable
class Sharded(Protocol):
    """Blocks that are stored, and fetched, several at a time."""

    @property
    def shard_blocks(self) -> int:
        """Of a shard."""
        ...

    @property
    def block_bytes(self) -> int:
        """Of one block, decoded: the same wherever it is stored, and whatever it compresses to."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainData:
    """One split of every domain: train, or validation where the student is measured."""

    blocks: Mapping[str, BlockReader]
    targets: Mapping[str, TargetReader] | None
    """None where the loss reads none."""

    @property
    def sizes(self) -> dict[str, int]:
        """Train blocks by domain."""
        return {domain: len(reader) for domain, reader in self.blocks.items()}

    def windows(self, mib: int) -> dict[str, Window]:
        """The shuffling window of each domain, such that all windows together hold about that many MiB of decoded data.

        A window consists of whole shards of the reader with the most data (the targets, if there are any),
        and of one at least. A domain whose readers know no shards has no window, and is shuffled as a whole. Depends
        on the format and the number of domains alone, never on the machine: a run that goes on elsewhere draws the
        same.
        """
        found: dict[str, Window] = {}
        for domain in self.blocks:
            readers = [reader for reader in self._readers(domain) if isinstance(reader, Sharded)]
            if readers:
                _, shard_blocks = max((reader.block_bytes, reader.shard_blocks) for reader in readers)
                shard_bytes = shard_blocks * sum(reader.block_bytes for reader in readers)
                shards = mib * 2**20 // (len(self.blocks) * shard_bytes)
                found[domain] = Window(shard_blocks=shard_blocks, shards=max(1, shards))
        return found

    def fetchers(self) -> dict[str, list[FetchesAhead]]:
        """By domain, the readers that can fetch ahead."""
        return {
            domain: [reader for reader in self._readers(domain) if isinstance(reader, FetchesAhead)]
            for domain in self.blocks
        }

    def _readers(self, domain: str) -> list[BlockReader | TargetReader]:
        return [self.blocks[domain]] if self.targets is None else [self.blocks[domain], self.targets[domain]]

    def load(self, draws: Sequence[Draw]) -> Batch:
        """The drawn blocks and targets, in the order of the draws; one read a domain."""
        rows_by_domain: dict[str, list[int]] = {}
        for row, drawn in enumerate(draws):
            rows_by_domain.setdefault(drawn.domain, []).append(row)
        # The reads' rows follow one another by domain; `order` puts them back into the order of the draws.
        order = np.argsort(np.concatenate([np.array(rows) for rows in rows_by_domain.values()]))
        tokens: list[Int32Array] = []
        valid: list[BoolArray | None] = []
        targets: list[SparseTargets] = []
        for domain, rows in rows_by_domain.items():
            indices = [draws[row].index for row in rows]
            tokens.append(self.blocks[domain].read(indices))
            valid.append(loss_mask(self.blocks[domain], indices))
            if self.targets is not None:
                targets.append(self.targets[domain].read(indices))
        return Batch(
            tokens_BL1=np.concatenate(tokens)[order],
            targets=_concatenated(targets, order) if self.targets is not None else None,
            valid_BL=_joined_masks(tokens, valid, order),
            domains=tuple(drawn.domain for drawn in draws),
        )


def _joined_masks(tokens: Sequence[Int32Array], masks: Sequence[BoolArray | None], order: _Order) -> BoolArray | None:
    if all(mask is None for mask in masks):
        return None
    parts = [
        np.ones((len(part), part.shape[1] - 1), np.bool_) if mask is None else mask
        for part, mask in zip(tokens, masks, strict=True)
    ]
    return np.concatenate(parts)[order]


def _concatenated(parts: Sequence[SparseTargets], order: _Order) -> SparseTargets:
    """All parts' positions, with what every one of them keeps."""

    def joined(take: Callable[[SparseTargets], npt.NDArray[Any] | None]) -> Any:
        arrays = [take(part) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(cast("Any", arrays))[order]

    drawn = [part.sampled for part in parts if part.sampled is not None]
    temperatures = set.intersection(*(set(part.tail_mass_at) for part in parts))
    return SparseTargets(
        ids_BLK=joined(lambda part: part.ids_BLK),
        logprobs_BLK=joined(lambda part: part.logprobs_BLK),
        tail_mass_BL=joined(lambda part: part.tail_mass_BL),
        true_logprobs_BL=joined(lambda part: part.true_logprobs_BL),
        entropy_BL=joined(lambda part: part.entropy_BL),
        sampled=SampledTokens(
            ids_BLN=np.concatenate([part.ids_BLN for part in drawn])[order],
            counts_BLN=np.concatenate([part.counts_BLN for part in drawn])[order],
        )
        if len(drawn) == len(parts)
        else None,
        tail_mass_at={t: joined(partial(_tail_mass_at, t)) for t in sorted(temperatures)},
    )


def _tail_mass_at(temperature: float, part: SparseTargets) -> Float32Array:
    return part.tail_mass_at[temperature]


def prefetch(
    plans: Iterable[Sequence[Draw]], data: TrainData, ahead: int = 2, fetch_ahead: int = 64
) -> Iterator[Batch]:
    """The batches of `plans` in order, `ahead` of them read in advance by one thread.

    An error of the reading thread is raised here, at the batch that it concerns; and its death, should it end without
    a word. Closing the iterator early stops
    the threads; a request that is in flight then is waited for a second at most.

    Args:
        plans: a sequence, where readers are to fetch ahead.
        fetch_ahead: for how many steps beyond the one that is read, at most; see `ddk.ahead`.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()
    fetching = FetchAhead(plans if isinstance(plans, Sequence) else (), data.fetchers(), fetch_ahead)

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for step, draws in enumerate(plans):
                if stopped.is_set():
                    return
                fetching.reading(step)
                put(data.load(draws))
            put(None)
        except BaseException as error:  # handed over, not handled: the training step raises it
            put(error)

    thread = threading.Thread(target=read, name="ddk-prefetch", daemon=True)
    thread.start()
    try:
        while (item := _next_of(ready, thread)) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        fetching.close()
        thread.join(timeout=_PATIENCE_S)


def _next_of(
    ready: queue.Queue[Batch | BaseException | None], thread: threading.Thread
) -> Batch | BaseException | None:
    """What the reading thread puts there next.

    Raises:
        LostPartError: it has ended and put nothing: there is nobody to wait for.
    """
    while True:
        alive = thread.is_alive()  # asked for first: what it puts and then ends is found
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=_PATIENCE_S) if alive else ready.get_nowait()
        if not alive:
            raise LostPartError(
                "the thread that reads the training data has ended without an error; run the same command again to "
                "resume at the newest checkpoint"
            )
