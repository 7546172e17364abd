"""What a person sees while something long runs: a bar in a terminal, now and then a line elsewhere, and in Prefect's UI
a progress artifact.

Logs of flows and files never hold bars. Lines go to the logger `ddk`, which the command line prints and Prefect
keeps with the run. Within a task run there is one artifact a meter, with what is done, the note and the time left.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from uuid import UUID

import rich.progress
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

logger = logging.getLogger("ddk")
SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_UPDATES = 5.0


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
    artifact = _Artifact(label, total, unit) if TaskRunContext.get() is not None else None
    with _on_terminal(label, total, unit) as shown:
        yield _Both(shown, artifact) if artifact else shown
    if artifact:
        artifact.close()


@contextmanager
def _on_terminal(label: str, total: float, unit: str) -> Iterator[Meter]:
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


class _Both:
    def __init__(self, shown: Meter, artifact: _Artifact) -> None:
        self._shown = shown
        self._artifact = artifact

    def advance(self, amount: float, note: str = "") -> None:
        self._shown.advance(amount, note)
        self._artifact.advance(amount, note)


class _Artifact:
    """A progress artifact of the task run. What is measured must not stop for what shows it: errors end the showing."""

    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._note = 0.0, ""
        self._started = self._last = time.monotonic()
        self._id: UUID | None = None
        self._works = True

    def advance(self, amount: float, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._last >= SECONDS_BETWEEN_UPDATES:
            self._show()

    def close(self) -> None:
        """The last state; nothing where all went so fast that nobody could have looked."""
        if self._id is not None:
            self._show()

    def _show(self) -> None:
        if not self._works:
            return
        self._last = time.monotonic()
        percent = min(100.0, 100.0 * self._done / max(self._total, 1e-9))
        left = (self._last - self._started) * (self._total - self._done) / max(self._done, 1e-9)
        parts = [f"{self._done:,.0f} of {self._total:,.0f} {self._unit}", self._note, f"{max(left, 0.0):,.0f} s left"]
        text = f"{self._label}: " + ", ".join(part for part in parts if part)
        try:
            if self._id is None:
                self._id = create_progress_artifact(percent, key=None, description=text, _sync=True)  # type: ignore
            else:
                update_progress_artifact(self._id, percent, description=text, _sync=True)  # type: ignore
        except Exception as error:
            self._works = False
            logger.warning("the progress of '%s' is not shown in Prefect's UI any more: %s", self._label, error)


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
