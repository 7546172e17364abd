"""A run at Weights & Biases, under an id that is stored in the run's folder, so that a resumed run continues there.

The summary of the W&B run records its progress, and the service returns it when the run is resumed. With
WANDB_MODE=offline, `<run>/wandb.json` records the progress instead, and each process leaves a folder for `wandb sync`,
which joins them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddk.errors import UserError
from storage.files.uri import is_local, join, open_fs, read_json, write_json
from storage.runs.folder import RunFolder
from tasks.showing.progress import logger
from tasks.training.tracking.points import RunPoints

SECONDS_UNTIL_WRITTEN = 30.0
"""Offline the client writes its log every 15 s (measured); what it has not written goes with a killed process."""
_STEP = "optimizer_step"
_LOGGED_STEP, _LOGGED_VERSION = "logged/step", "logged/version"
# A user's WANDB_… of the same name goes before these.
_SETTINGS: Mapping[str, Any] = {
    "console": "off",  # the log is Prefect's
    "silent": True,
    "disable_git": True,  # a remote's URL may hold a token
    "login_timeout": 60.0,
    "init_timeout": 30.0,
    "finish_timeout": 60.0,  # else a service that is away would hold the run's end for ever
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """How far the run at the service is."""

    step: int = 0
    """Training steps that it holds."""
    version: int = -1
    """The last mixture that it holds."""


class WandbTracker:
    """Logs a row a point.

    Args:
        config: shown with the run.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, entity: str | None, folder: RunFolder, config: Mapping[str, Any]) -> None:
        self._project = project
        self._entity = entity
        self._folder = folder
        self._config = config
        self._run: Any = None
        self._position = Position()
        self._notes: list[threading.Timer] = []

    def log(self, points: RunPoints) -> None:
        run = self._opened()
        before = self._position
        for point in points.after(before.step, before.version):
            run.log({**point.values, _STEP: point.step, "_timestamp": point.time}, commit=True)
            self._position = moved(self._position, point.step, point.version)
        if self._position != before:
            run.summary.update({_LOGGED_STEP: self._position.step, _LOGGED_VERSION: self._position.version})
            if run.offline:
                self._note_later()

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._opened().summary.update({f"run/{name}": value for name, value in summary.items()})

    def close(self, *, failed: bool) -> None:
        for note in self._notes:
            note.cancel()
        run, self._run = self._run, None
        if run is not None:
            offline = run.offline
            run.finish(exit_code=int(failed))
            if offline:
                write_json(self._cursor, asdict(self._position))

    def _note_later(self) -> None:
        """Note how far the run is, once that is surely in the client's log."""
        note = threading.Timer(SECONDS_UNTIL_WRITTEN, self._note, (self._position,))
        note.daemon = True
        self._notes = [*(one for one in self._notes if one.is_alive()), note]
        note.start()

    def _note(self, position: Position) -> None:
        try:
            write_json(self._cursor, asdict(position))
        except OSError as error:
            logger.warning("tracking: %s was not written (%s)", self._cursor, error)

    @property
    def _cursor(self) -> str:
        return join(self._folder.url, "wandb.json")

    def _opened(self) -> Any:
        if self._run is None:
            self._run = self._open()
            self._position = where(self._run, read_json(self._cursor))
            logger.info("tracking: %s", self._run.settings.sync_dir if self._run.offline else self._run.url)
        return self._run

    def _open(self) -> Any:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to W&B's makers; read at import
        import wandb
        from wandb.errors import UsageError

        settings = {name: value for name, value in _SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ}
        try:
            run = wandb.init(
                project=self._project,
                entity=self._entity,
                id=self._folder.tracking_id(),
                name=self._folder.name,
                resume="allow",
                config=dict(self._config),
                allow_val_change=True,
                dir=self._files,
                settings=wandb.Settings(**settings),
            )
        except UsageError as error:
            raise UserError(f"tracking.wandb_project: {error}; or set WANDB_API_KEY, or WANDB_MODE=offline") from error
        except Exception:
            wandb.teardown()  # its helper process would call the run's id taken, were it tried again
            raise
        run.define_metric("*", step_metric=_STEP)
        return run

    @property
    def _files(self) -> str | None:
        """Where the client keeps its files: in the run, where that is a folder here."""
        if "WANDB_DIR" in os.environ or not is_local(self._folder.url):
            return None
        return open_fs(self._folder.url)[1]


def moved(at: Position, step: int, version: int | None) -> Position:
    """After one more row: of a training step, or of a gap (which has a version)."""
    if version is None:
        return Position(step=step, version=at.version)
    return Position(step=at.step, version=version)


def where(run: Any, stored: Mapping[str, int] | None) -> Position:
    """How far a run is that has just been opened.

    Args:
        stored: what stood in the cursor's file; counts offline only.
    """
    if run.offline:
        return Position(**stored) if stored else Position()
    if not run.resumed:
        return Position()
    summary = run.summary
    return Position(step=summary.get(_LOGGED_STEP, 0), version=summary.get(_LOGGED_VERSION, -1))
