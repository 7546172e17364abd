"""What a person sees while something long runs: a bar in a terminal, now and then a line elsewhere.

Logs of flows and files never hold bars. Lines go to the logger `ddk`, which the command line prints and Prefect
keeps with the run.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import rich.progress

logger = logging.getLogger("ddk")
SECONDS_BETWEEN_LINES = 15.0


class Meter(Protocol):
    def advance(self, amount: float, note: str = "") -> None:
        """So much more is done; `note` stands behind the bar."""
        ...


@contextmanager
def meter(label: str, total: float, unit: str) -> Iterator[Meter]:
    """Shows how far something is.

    Args:
        label: e.g. 'capture math'.
        total: amount in all, in `unit`s.
    """
    if not sys.stderr.isatty():
        yield _Lines(label, total, unit)
        return
    columns = (
        rich.progress.TextColumn("{task.description:<22}"),
        rich.progress.BarColumn(bar_width=30),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as progress:
        yield _Bar(progress, progress.add_task(label, total=total, note=""))


class _Bar:
    def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, amount: float, note: str = "") -> None:
        self._progress.update(self._task, advance=amount, note=note)


class _Lines:
    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0.0
        self._started = self._last_line = time.monotonic()

    def advance(self, amount: float, note: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = (now - self._started) * (self._total - self._done) / max(self._done, 1e-9)
        logger.info(
            "%s: %s of %s %s, %.0f s left%s",
            self._label,
            f"{self._done:,.0f}",
            f"{self._total:,.0f}",
            self._unit,
            left,
            f", {note}" if note else "",
        )
