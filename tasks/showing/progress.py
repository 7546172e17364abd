"""Progress of long work: a bar in a terminal, an occasional line elsewhere, and a progress artifact in Prefect's UI.

Logs of flows and files never hold bars. Lines go to the logger `ddk`, which the command line prints and Prefect
keeps with the run. All forms show the same: the work done, its speed, and the time left.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import rich.progress

from storage.files import uri
from tasks.showing.formats import duration

if TYPE_CHECKING:
    from tasks.showing.artifacts import Board

logger = logging.getLogger("ddk")
if logger.level == logging.NOTSET:
    # In a worker the root logger stands at WARNING, and Prefect lends ours its handlers but not their level.
    logger.setLevel(logging.INFO)

SECONDS_BETWEEN_LINES = 15.0
SECONDS_TO_FIRST_UPDATE = 5.0
SECONDS_BETWEEN_UPDATES = 10.0
"""Of the artifact: each is written once for every flow run that shows it."""
LONGEST_PAUSE = 600.0
"""Seconds until a server that did not take an update is asked again, at most."""


class Meter(Protocol):
    def advance(self, amount: float, note: str = "") -> None:
        """Report that `amount` more is done; `note` is shown beside it."""
        ...

    def skip(self, amount: float) -> None:
        """Report that others have done `amount`, which says nothing of the speed here."""
        ...


@contextmanager
def meter(
    label: str,
    total: float,
    unit: str,
    *,
    done: float = 0.0,
    positions: int = 0,
    root: str | None = None,
    artifact: str | None = None,
) -> Iterator[Meter]:
    """Shows the progress of some work.

    Args:
        label: e.g. 'capture math'.
        total: amount in all, in `unit`s.
        done: of it, before this.
        positions: in a unit, for the tokens a second; 0 where a unit is not of tokens.
        root: URL of the root that the work is done for, where there is one. Its name begins the key of a task run's own
            artifact: 'ddk-weekly-capture-math'.
        artifact: key of a progress artifact that the flow run's tasks carry on one after the other. Without it each
            task run has one of its own, if it takes longer than a glance.
    """
    work = Work(label, total, unit, done, positions)
    with _on_terminal(work) as shown, _in_prefect(work, root, artifact) as published:
        yield _Meter(work, shown, published)


class Work:
    """How far something is, and in words: '24 of 46 blocks (2,304 positions), 12.0 s left, 17,339 tokens/s'.

    At the end the speed is that of the whole, start included: '…, in 14.5 s, 305 tokens/s, 1,977 after the start'.
    """

    def __init__(self, label: str, total: float, unit: str, done: float = 0.0, positions: int = 0) -> None:
        self.label, self.total, self._unit, self._positions = label, total, unit, positions
        self.done, self._before = done, done
        self._note = ""
        self._started = time.monotonic()
        self._first: tuple[float, float] | None = None

    def advance(self, amount: float, note: str) -> None:
        self.done += amount
        self._note = note or self._note
        # Measured from the first report on: what comes before it is mostly an engine that starts.
        self._first = self._first or (time.monotonic(), self.done)

    def skip(self, amount: float) -> None:
        self.done += amount
        self._before += amount
        if self._first is not None:
            self._first = (self._first[0], self._first[1] + amount)

    @property
    def percent(self) -> float:
        return min(100.0, 100.0 * self.done / max(self.total, 1e-9))

    @property
    def rate(self) -> float | None:
        """Units a second; None until there is something to measure."""
        if self._first is None or self.done == self._first[1]:
            return None
        return (self.done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-9)

    @property
    def pace(self) -> str:
        """How fast it goes, and what was noted last; may be empty."""
        return ", ".join(part for part in (self._speed, self._note) if part)

    @property
    def _speed(self) -> str:
        if not self._positions:
            return ""
        steady = "" if self.rate is None else f"{self.rate * self._positions:,.0f}"
        if self.done < self.total or self.done == self._before:
            return f"{steady} tokens/s" if steady else ""
        whole = (self.done - self._before) / max(time.monotonic() - self._started, 1e-9)
        said = f"{whole * self._positions:,.0f} tokens/s"
        return f"{said}, {steady} after the start" if self.rate is not None and self.rate > 1.1 * whole else said

    def __str__(self) -> str:
        amount = f"{self.done:,.0f} of {self.total:,.0f} {self._unit}"
        parts = [f"{amount} ({self.done * self._positions:,.0f} positions)" if self._positions else amount]
        if self.done < self.total and self.rate is not None:
            parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        elif self.done >= self.total and not self._before:
            parts.append(f"in {duration(time.monotonic() - self._started)}")
        return ", ".join([*parts, self.pace] if self.pace else parts)


class _Meter:
    """Tells all forms of what is done."""

    def __init__(self, work: Work, shown: _Bar | _Lines, published: _Artifact | None) -> None:
        self._work, self._shown, self._published = work, shown, published

    def advance(self, amount: float, note: str = "") -> None:
        self._work.advance(amount, note)
        self._update()

    def skip(self, amount: float) -> None:
        self._work.skip(amount)
        self._update()

    def _update(self) -> None:
        self._shown.update()
        if self._published is not None:
            self._published.update()


@contextmanager
def _on_terminal(work: Work) -> Iterator[_Bar | _Lines]:
    if not sys.stderr.isatty():
        yield _Lines(work)
        return
    columns = (
        rich.progress.TextColumn("{task.description:<22}", markup=False),  # a domain may be called '[red]'
        rich.progress.BarColumn(bar_width=30),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as progress:
        yield _Bar(work, progress, progress.add_task(work.label, total=work.total, note=""))


class _Bar:
    def __init__(self, work: Work, progress: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._work = work
        self._progress = progress
        self._task = task

    def update(self) -> None:
        self._progress.update(self._task, completed=self._work.done, note=self._work.pace)


class _Lines:
    def __init__(self, work: Work) -> None:
        self._work = work
        self._last = time.monotonic()

    def update(self) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            logger.info("%s: %s", self._work.label, self._work)


@contextmanager
def _in_prefect(work: Work, root: str | None, artifact: str | None) -> Iterator[_Artifact | None]:
    if "prefect" not in sys.modules:  # so no flow is running; to import it takes seconds
        yield None
        return
    from tasks.showing.artifacts import Board, artifact_key, current_place

    if current_place() is None:
        yield None
        return
    own = artifact_key(*([] if root is None else [uri.name_of(root)]), work.label)
    board = Board(artifact or own, "progress", of_task=artifact is None)
    published = _Artifact(work, board, goes_on=board.known)
    yield published
    if artifact is not None or published.tried:
        published.show()


class _Artifact:
    """What it shows now and then, and how often.

    Args:
        goes_on: the artifact is there already, with what an earlier task run left at its end.
    """

    def __init__(self, work: Work, board: Board, goes_on: bool) -> None:
        self._work, self._board = work, board
        self._last = time.monotonic()
        self._pause = SECONDS_BETWEEN_UPDATES if goes_on else SECONDS_TO_FIRST_UPDATE
        self.tried = False

    def update(self) -> None:
        if time.monotonic() - self._last >= self._pause:
            self.show()

    def show(self) -> None:
        self.tried = True
        # A server that does not answer costs a few seconds each time; it is asked ever less often.
        works = self._board.show(self._work.percent, str(self._work))
        self._pause = SECONDS_BETWEEN_UPDATES if works else min(4 * max(self._pause, 1.0), LONGEST_PAUSE)
        self._last = time.monotonic()
