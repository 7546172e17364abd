"""A run's metrics beyond our own files: TensorBoard's files in the run, Weights & Biases, MLflow.

All metrics are already stored in the run (`metrics/`, `mixtures/`). A tracker is told how far the training has come,
and reads from there what it does not have yet. A killed run, a service that was unavailable and a tracker that was
switched on later are therefore handled in the same way, and each step arrives once.

`points` defines the metrics and their names. Only the training itself sends metrics, so that a run has one writer; it
also sends what another evaluator measures. A failing service never stops the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ddk.errors import UserError
from storage.runs.folder import RunFolder
from tasks.showing.progress import logger
from tasks.training.tracking.config import TrackingConfig
from tasks.training.tracking.points import RunPoints

SECONDS_BETWEEN_ATTEMPTS = 600.0
"""How long a service that failed is left alone."""


class Tracker(Protocol):
    """One place that metrics go to. Any call may raise; it is then tried again later."""

    name: str

    def log(self, points: RunPoints) -> None:
        """Take what is new."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is complete: after the last `log`."""
        ...

    def close(self, *, failed: bool) -> None:
        """Nothing more comes from this process; `failed`: because of an error."""
        ...


class Tracking:
    """A run's trackers."""

    def __init__(self, trackers: Sequence[Tracker], folder: RunFolder) -> None:
        self._trackers = [_Guarded(tracker) for tracker in trackers]
        self._folder = folder

    def update(self, step: int, trained_from: int | None = None) -> None:
        """Pass on what is new.

        Args:
            step: steps that the training has done.
            trained_from: first step of the interval that it has just trained; None before it trains one.

        Raises:
            UserError: before anything was trained: a tracker is not set up.
        """
        points = RunPoints(self._folder, step, trained_from)
        for tracker in self._trackers:
            tracker.call(lambda one: one.log(points), may_refuse=trained_from is None)

    def finish(self, step: int, summary: Mapping[str, Any]) -> None:
        """The run is complete after `step` steps."""
        points = RunPoints(self._folder, step)

        def end(tracker: Tracker) -> None:
            tracker.log(points)
            tracker.finish(summary)

        for tracker in self._trackers:
            tracker.call(end, at_once=True)

    def close(self, *, failed: bool) -> None:
        for tracker in self._trackers:
            tracker.call(lambda one: one.close(failed=failed), at_once=True)


class _Guarded:
    """A tracker whose failure stops nothing: it is said once, and tried again after a while."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._not_before = 0.0
        self._begun = self._fails = self._warned = False

    def call(self, call: Callable[[Tracker], None], *, may_refuse: bool = False, at_once: bool = False) -> None:
        if time.monotonic() < self._not_before and not at_once:
            return
        may_refuse, self._begun = may_refuse and not self._begun, True
        try:
            call(self._tracker)
        except Exception as error:
            if isinstance(error, UserError) and may_refuse:
                raise
            self._failed(error)
        else:
            if self._fails and not at_once:
                logger.info("tracking: %s accepts metrics again", self._tracker.name)
            self._fails, self._not_before = False, 0.0

    def _failed(self, error: Exception) -> None:
        self._fails, self._not_before = True, time.monotonic() + SECONDS_BETWEEN_ATTEMPTS
        if not self._warned:
            reason = " ".join(str(error).split())[:300]
            logger.warning("tracking: %s failed (%s); training continues without it", self._tracker.name, reason)
        self._warned = True


def open_tracking(config: TrackingConfig, folder: RunFolder, run_config: Mapping[str, Any]) -> Tracking:
    """The trackers that a configuration asks for. Nothing is connected to before the first `update`.

    Args:
        run_config: the run's whole resolved configuration, as it is shown with the run.

    Raises:
        UserError: it is not said where MLflow is.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        from tasks.training.tracking.tensorboard_files import TensorBoardTracker

        trackers.append(TensorBoardTracker(folder))
    if config.wandb_project is not None:
        from tasks.training.tracking.wandb_run import WandbTracker

        trackers.append(WandbTracker(config.wandb_project, config.wandb_entity, folder, run_config))
    if config.mlflow_experiment is not None:
        from tasks.training.tracking.mlflow_run import MlflowTracker

        trackers.append(MlflowTracker(config.mlflow_uri, config.mlflow_experiment, folder, run_config))
    return Tracking(trackers, folder)
