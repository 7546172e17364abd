"""Several processes on one store: in a capture they share the shards; in other stages they wait for each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ddk.values import SPLITS, Split
from storage.files.claims import Claims
from storage.targets import TargetWriter
from tasks.showing.progress import logger

Shard = tuple[Split, int]
SECONDS_BETWEEN_LOOKS = 2.0


@contextmanager
def alone(url: str, what: str) -> Iterator[None]:
    """Nobody else is at this store or run while the context lasts; waits for who is. What they did, look up after.

    Args:
        what: for the log, e.g. 'pack math'.
    """
    with Claims(url) as claims:
        claims.wait_for("all", lambda: logger.info("%s: another process is doing this; waiting for it to finish", what))
        yield


class ShardQueue:
    """The missing shards of a store that no other process is capturing, for this process to capture.

    Each process begins at its own place and goes round, so that two processes seldom want the same shard. A process
    that has finished its own part helps with the others. A shard that its owner abandons is taken over.

    Args:
        shards: how many there are of each split.
        part, parts: this process begins at the missing shards' part `part` of `parts`, counted from 1.
    """

    def __init__(
        self, writer: TargetWriter, claims: Claims, shards: dict[Split, int], part: int = 1, parts: int = 1
    ) -> None:
        self._writer = writer
        self._claims = claims
        self._shards = shards
        missing = self._missing()
        first = len(missing) * (part - 1) // parts
        self._left = missing[first:] + missing[:first]
        self._contested: list[Shard] = []

    @property
    def left(self) -> list[Shard]:
        """What is not committed, as far as is known; ours in hand are not among them."""
        return [*self._left, *self._contested]

    def take(self) -> Shard | None:
        """The next shard that is now ours; None where there is none at this moment. Never waits."""
        while self._left:
            shard = self._left.pop(0)
            if self._claims.take(claim_name(shard)) and self._writer.is_missing(*shard):
                return shard
            self._contested.append(shard)
        return None

    def wait(self) -> bool:
        """Where only others' shards are left: look a little later which of them are still missing.

        Returns:
            Whether any is; not where every shard is committed.
        """
        if self._contested:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            missing = set(self._missing())
            self._left = [shard for shard in self._contested if shard in missing]
            self._contested = []
        return bool(self._left)

    def still_ours(self, shard: Shard) -> bool:
        """Whether nobody has taken the shard over, because we seemed dead."""
        return self._claims.holds(claim_name(shard)) and self._writer.is_missing(*shard)

    def _missing(self) -> list[Shard]:
        if self._writer.completed_by_another():
            return []
        return [
            (split, shard)
            for split in SPLITS
            for shard in sorted(set(range(self._shards[split])) - set(self._writer.committed(split)))
        ]


def claim_name(shard: Shard) -> str:
    """`('train', 7)` → `'train-00000007'`."""
    return f"{shard[0]}-{shard[1]:08d}"
