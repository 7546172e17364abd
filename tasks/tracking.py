"""A run's metrics beyond our own files: TensorBoard's files in the run, Weights & Biases, MLflow.

All that there is to say lies in the run already (`metrics/`, `mixtures/`). A tracker is told how far the training has
come, and takes from there what it has not got yet. So a run that was killed, a service that was away and a tracker
that was switched on late are one case, and each step arrives once.

    train/ce  train/kl  train/loss  train/learning_rate  train/gradient_norm  train/tokens_per_second
    train/waiting_share                                  every step
    gap/<domain>/ratio  gap/<domain>/student_ppl  gap/<domain>/teacher_ppl  mixture/<domain>
                                                         every measurement of the gap

The x-axis is optimizer steps. Only the training itself tracks, so that a run has one writer; what another evaluator
measures is passed on by it. A service that fails never stops the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ddk.errors import UserError
from storage.mixtures import MixtureHistory, MixtureRecord
from storage.runs import RunFolder
from tasks.progress import logger
from tasks.tracking_config import TrackingConfig

SECONDS_BETWEEN_ATTEMPTS = 600.0
"""How long a service that failed is left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured of the student after one step."""

    step: int
    """Optimizer steps done: the x-axis."""
    time: float
    """Unix time, in seconds, at which that step was done."""
    values: Mapping[str, float]
    """By name, as in the module's docstring."""
    version: int | None = None
    """Of the mixture, where this is a gap; None for a training step."""


class RunPoints:
    """What a run has measured up to a step, read when it is asked for.

    Args:
        gamma: γ of the loss CE + γ·KL.
        upto: steps that the training has done. Later ones, of an attempt that was killed, do not count.
        trained_from: first step of an interval that has just been trained, perhaps for a second time.
    """

    def __init__(self, folder: RunFolder, gamma: float, upto: int, trained_from: int | None = None) -> None:
        self._folder = folder
        self._gamma = gamma
        self._read: dict[int, list[Point]] = {}
        self.upto = upto
        self.trained_from = trained_from

    @cached_property
    def intervals(self) -> list[int]:
        """Steps done where each interval began, ascending."""
        return [first for first in self._folder.measured_intervals() if first < self.upto]

    def interval(self, first: int) -> list[Point]:
        """The steps of one interval."""
        if first not in self._read:
            rows = self._folder.interval_metrics(first)
            self._read[first] = [_step(row, self._gamma) for row in rows if row["step"] <= self.upto]
        return self._read[first]

    @cached_property
    def gaps(self) -> list[MixtureRecord]:
        """The measurements of the gap, ascending."""
        return [record for record in MixtureHistory(self._folder.url).records() if record.step <= self.upto]

    def gap(self, record: MixtureRecord) -> Point:
        """One of `gaps`; its time is that of the student's last step."""
        values = {f"mixture/{domain}": p for domain, p in record.probabilities.items()}
        for gap in record.gaps:
            values[f"gap/{gap.domain}/ratio"] = gap.ratio
            values[f"gap/{gap.domain}/student_ppl"] = gap.student_ppl
            values[f"gap/{gap.domain}/teacher_ppl"] = gap.teacher_ppl
        return Point(step=record.step, time=self._time_of(record.step), values=values, version=record.version)

    def after(self, step: int, version: int) -> list[Point]:
        """Everything of later steps than `step`, and gaps of later versions than `version`, in the order of steps."""
        ends = [*self.intervals[1:], self.upto]
        firsts = [first for first, end in zip(self.intervals, ends, strict=False) if end > step]
        steps = [point for first in firsts for point in self.interval(first) if point.step > step]
        gaps = [self.gap(record) for record in self.gaps if record.version > version]
        return sorted([*steps, *gaps], key=lambda point: (point.step, point.version is not None))

    def _time_of(self, step: int) -> float:
        before = [first for first in self.intervals if first < step]
        found = [point.time for point in self.interval(before[-1]) if point.step == step] if before else []
        return found[0] if found else time.time()


def _step(row: Mapping[str, Any], gamma: float) -> Point:
    values = {
        "train/ce": row["ce"],
        "train/kl": row["kl"],
        "train/loss": row["ce"] + gamma * row["kl"],
        "train/learning_rate": row["learning_rate"],
        "train/gradient_norm": row["gradient_norm"],
        "train/tokens_per_second": row["tokens"] / row["seconds"],
        "train/waiting_share": row["waited_seconds"] / row["seconds"],
    }
    return Point(step=row["step"], time=row.get("time") or time.time(), values=values)


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

    def __init__(self, trackers: Sequence[Tracker], folder: RunFolder, gamma: float) -> None:
        self._trackers = [_Guarded(tracker) for tracker in trackers]
        self._folder = folder
        self._gamma = gamma

    def update(self, step: int, trained_from: int | None = None) -> None:
        """Pass on what is new.

        Args:
            step: steps that the training has done.
            trained_from: first step of the interval that it has just trained; None before it trains one.

        Raises:
            UserError: before anything was trained: a tracker is not set up.
        """
        points = RunPoints(self._folder, self._gamma, step, trained_from)
        for tracker in self._trackers:
            tracker.call(lambda one: one.log(points), may_refuse=trained_from is None)

    def finish(self, step: int, summary: Mapping[str, Any]) -> None:
        """The run is complete after `step` steps."""
        points = RunPoints(self._folder, self._gamma, step)

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
                logger.info("tracking: %s takes metrics again", self._tracker.name)
            self._fails, self._not_before = False, 0.0

    def _failed(self, error: Exception) -> None:
        self._fails, self._not_before = True, time.monotonic() + SECONDS_BETWEEN_ATTEMPTS
        if not self._warned:
            reason = " ".join(str(error).split())[:300]
            logger.warning("tracking: %s failed (%s); the training goes on without it", self._tracker.name, reason)
        self._warned = True


def open_tracking(config: TrackingConfig, folder: RunFolder, run_config: Mapping[str, Any], gamma: float) -> Tracking:
    """The trackers that a configuration asks for. Nothing is connected to before the first `update`.

    Args:
        run_config: the run's whole resolved configuration, as it is shown with the run.
        gamma: γ of the loss.

    Raises:
        UserError: it is not said where MLflow is.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        from tasks.tracking_tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker(folder))
    if config.wandb_project is not None:
        from tasks.tracking_wandb import WandbTracker

        trackers.append(WandbTracker(config.wandb_project, config.wandb_entity, folder, run_config))
    if config.mlflow_experiment is not None:
        from tasks.tracking_mlflow import MlflowTracker

        trackers.append(MlflowTracker(config.mlflow_uri, config.mlflow_experiment, folder, run_config))
    return Tracking(trackers, folder, gamma)
