"""Prefetches the data that the loader will read next: some threads work ahead of the thread that reads.

For every coming step, in the order of need, each reader that supports it (`FetchesAhead`) is told which blocks will be
needed. Errors here are not reported; the read itself meets them again, at the batch that they concern.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ddk.values import Draw

_AT_ONCE = 8
"""Fetches at the same time."""
_PATIENCE_S = 0.5
"""How long closing waits for a fetch in flight. It ends by itself later, and nobody needs it."""


@runtime_checkable
class FetchesAhead(Protocol):
    """A reader of remote data that can be prefetched."""

    def fetch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> bool:
        """Fetch the shards that hold the given blocks, without decoding them.

        Returns:
            False if there is no room until more of the fetched data has been read; ask again then.
        """
        ...


class FetchAhead:
    """Prefetches the data of the steps after the one that is being read. Call `close` at the end.

    Args:
        plans: of every step, what it reads.
        readers: by domain, all whose blocks a draw of that domain stands for.
        steps: how many of them ahead.
    """

    def __init__(
        self, plans: Sequence[Sequence[Draw]], readers: Mapping[str, Sequence[FetchesAhead]], steps: int
    ) -> None:
        self._plans, self._readers, self._steps = plans, readers, steps
        self._reading = 0
        self._planned = 1
        """The first step whose fetches are not among `_jobs` yet; step 0 is read at once."""
        self._jobs: deque[tuple[int, FetchesAhead, list[int]]] = deque()
        self._stopped = False
        self._changed = threading.Condition()
        count = _AT_ONCE if any(readers.values()) and steps > 0 and len(plans) > 1 else 0
        self._threads = [threading.Thread(target=self._work, name="ddk-fetch", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def reading(self, step: int) -> None:
        """Step `step` is read now: nothing needs to be fetched for it any more."""
        with self._changed:
            self._reading = step
            self._changed.notify_all()

    def close(self) -> None:
        """No fetch begins any more, and the threads end."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=_PATIENCE_S / len(self._threads))

    def _work(self) -> None:
        while (job := self._next()) is not None:
            step, reader, indices = job
            with contextlib.suppress(Exception):  # the read itself raises it, in its place
                while not reader.fetch(indices) and self._more_was_read(step):
                    pass

    def _next(self) -> tuple[int, FetchesAhead, list[int]] | None:
        with self._changed:
            while not self._stopped:
                while self._jobs and self._jobs[0][0] <= self._reading:
                    self._jobs.popleft()
                if self._jobs:
                    return self._jobs.popleft()
                self._planned = max(self._planned, self._reading + 1)
                if self._planned >= len(self._plans):
                    return None
                if self._planned <= self._reading + self._steps:
                    self._plan(self._planned)
                    self._planned += 1
                else:
                    self._changed.wait()
        return None

    def _plan(self, step: int) -> None:
        indices: dict[str, list[int]] = {}
        for drawn in self._plans[step]:
            indices.setdefault(drawn.domain, []).append(drawn.index)
        for domain, blocks in indices.items():
            self._jobs.extend((step, reader, blocks) for reader in self._readers.get(domain, ()))

    def _more_was_read(self, step: int) -> bool:
        """Waits until the reading has come further; False where it has reached `step`, or all is over."""
        with self._changed:
            seen = self._reading
            self._changed.wait_for(lambda: self._stopped or self._reading > seen)
            return not self._stopped and self._reading < step
