"""What a run has measured, as trackers take it.

    train/ce  train/kl  train/loss  train/learning_rate  train/gradient_norm  train/tokens_per_second
    train/waiting_share                                  every step
    gap/<domain>/ratio  gap/<domain>/student_ppl  gap/<domain>/teacher_ppl  gap/<domain>/kl
    gap/<domain>/epochs  mixture/<domain>
                                                         every measurement of the gap

The x-axis is optimizer steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord


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
        upto: steps that the training has done. Later ones, of an attempt that was killed, do not count.
        trained_from: first step of an interval that has just been trained, perhaps for a second time.
    """

    def __init__(self, folder: RunFolder, upto: int, trained_from: int | None = None) -> None:
        self._folder = folder
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
            self._read[first] = [_step(row) for row in rows if row["step"] <= self.upto]
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
        for domain, kl in (record.kl or {}).items():
            values[f"gap/{domain}/kl"] = kl
        for domain, blocks in (record.train_blocks or {}).items():
            values[f"gap/{domain}/epochs"] = record.blocks_drawn.get(domain, 0) / blocks
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


def _step(row: Mapping[str, Any]) -> Point:
    values = {
        "train/ce": row["ce"],
        "train/kl": row["kl"],
        "train/loss": row["loss"],
        "train/learning_rate": row["learning_rate"],
        "train/gradient_norm": row["gradient_norm"],
        "train/tokens_per_second": row["tokens"] / row["seconds"],
        "train/waiting_share": row["waited_seconds"] / row["seconds"],
    }
    return Point(step=row["step"], time=row.get("time") or time.time(), values=values)
