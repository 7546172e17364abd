"""All runs of a root at a glance: for each its state, its dates, how far it came, what it cost, and what it came from.

Only the small files of a run are read. A run whose files are not as they were written is listed as damaged, with the
reason; the others are listed all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ddk.values import worst_gap
from storage.errors import StoreError
from storage.files import uri
from storage.files.below import StoredFile, files_below
from storage.files.claims import Watch
from storage.files.names import why_not_plain
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord

RunState = Literal["complete", "running", "unfinished", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimes:
    """What a run's training took; None where it is not recorded, as in runs of older versions."""

    training_seconds: float | None = None
    """Of all optimizer steps together, and of nothing else."""
    training_tokens: int | None = None
    """Positions that these steps trained on."""
    wall_seconds: float | None = None
    """Of the sessions of training as a whole: loading, steps, measurements of the gap, checkpoints. Time in which
    nothing ran, and work that was lost and done again, are not in it."""
    device: str | None = None
    """What the steps ran on, as the last session found it."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of the steps themselves."""
        if not self.training_seconds or self.training_tokens is None:
            return None
        return self.training_tokens / self.training_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOverview:
    """One run."""

    name: str
    state: RunState
    reason: str | None = None
    """Why it is damaged, or why it stopped early."""
    method: str | None = None
    seed: int | None = None
    began: float | None = None
    """Unix time at which its first step began."""
    ended: float | None = None
    """Unix time at which its last step so far was done."""
    steps: int = 0
    planned_steps: int | None = None
    tokens: int = 0
    worst_ratio: float | None = None
    """Largest perplexity of the student over the teacher's, as it was last measured."""
    worst_domain: str | None = None
    mean_ratio: float | None = None
    """Arithmetic mean over the domains."""
    times: RunTimes = field(default_factory=RunTimes)
    bytes: int = 0
    """Of everything in the run's folder; its stores are not in it, which other runs read too."""
    ancestry: tuple[str, ...] = ()
    """`RUN@STEP` that it began from, then what that one began from, and so on."""


def overviews(root: str) -> list[RunOverview]:
    """Every run of a root, by name."""
    by_run: dict[str, list[StoredFile]] = {}
    for file in files_below(uri.join(root, "runs")):
        name, between, _ = file.path.partition("/")
        if between and why_not_plain(name) is None:
            by_run.setdefault(name, []).append(file)
    watch = Watch()
    found = {name: _overview(root, name, files, watch) for name, files in sorted(by_run.items())}
    return [replace(one, ancestry=_ancestry(root, one.name)) for one in found.values()]


def _overview(root: str, name: str, files: Sequence[StoredFile], watch: Watch) -> RunOverview:
    size = sum(one.bytes for one in files)
    try:
        return replace(_read(RunFolder(root, name), watch), bytes=size)
    except StoreError as error:
        why = str(error)
    except (KeyError, TypeError, ValueError) as error:  # sound by its seal, and yet not what a run writes
        why = f"{RunFolder(root, name).url} holds what no run of this version writes ({type(error).__name__}: {error})"
    return RunOverview(name=name, state="damaged", reason=why, bytes=size)


def _read(folder: RunFolder, watch: Watch) -> RunOverview:
    config, summary = folder.config(), folder.summary()
    if folder.identity() is None or config is None:
        missing = "identity.json" if config is not None else "config.json"
        why = f"{uri.join(folder.url, missing)} is missing; run the same `ddk train` again, or remove the folder"
        return RunOverview(name=folder.name, state="damaged", reason=why)
    records = MixtureHistory(folder.url).whole(summary)
    rows = _first_and_last(folder)
    train = config.get("train")
    return RunOverview(
        name=folder.name,
        state="complete" if summary is not None else _state(folder, watch),
        reason=(summary or {}).get("stopped_early"),
        method=config.get("method"),
        seed=config.get("seed"),
        began=rows[0]["time"] - rows[0]["seconds"] if rows else None,
        ended=rows[-1]["time"] if rows else None,
        steps=_steps(folder, summary, rows, records),
        planned_steps=train.get("steps") if isinstance(train, Mapping) else None,
        tokens=summary.get("tokens_seen", 0) if summary is not None else records[-1].tokens_seen if records else 0,
        times=run_times(folder, summary),
        **_gap(records),
    )


def _state(folder: RunFolder, watch: Watch) -> RunState:
    return "running" if watch.look(folder.url) != "dead" else "unfinished"


def _steps(
    folder: RunFolder,
    summary: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[MixtureRecord],
) -> int:
    if summary is not None:
        return int(summary.get("steps", 0))
    checkpoints = CheckpointFolder(folder.url).steps()
    measured = (*checkpoints[-1:], *(record.step for record in records[-1:]), *(row["step"] for row in rows[-1:]))
    return max(measured, default=0)


def _gap(records: Sequence[MixtureRecord]) -> dict[str, Any]:
    if not records:
        return {}
    gaps = records[-1].gaps
    worst = worst_gap(gaps)
    mean = math.fsum(gap.ratio for gap in gaps) / len(gaps)
    return {"worst_ratio": worst.ratio, "worst_domain": worst.domain, "mean_ratio": mean}


def _first_and_last(folder: RunFolder) -> list[dict[str, Any]]:
    """The first and the last measured step; none before the first interval is trained."""
    origin = came_from(folder.identity())
    # Of one that goes on from another, those before are the other one's.
    intervals = [first for first in folder.measured_intervals() if origin is None or first >= (origin[1] or 0)]
    if not intervals:
        return []
    first, last = folder.interval_metrics(intervals[0]), folder.interval_metrics(intervals[-1])
    return [*first[:1], *last[-1:]] if all("time" in row for row in (*first[:1], *last[-1:])) else []


def run_times(folder: RunFolder, summary: Mapping[str, Any] | None) -> RunTimes:
    """What a run's training took, from its summary, or before that from the measurements of its steps.

    Raises:
        StoreDamagedError, FormatVersionError: they are not what was written.
    """
    if summary is not None and "training_seconds" in summary:
        found = {name: summary.get(name) for name in RunTimes.__dataclass_fields__}
        # Summaries of older versions leave it out; their runs trained on all that they had seen.
        return RunTimes(**{**found, "training_tokens": summary.get("training_tokens", summary.get("tokens_seen"))})
    return times_of(own_steps(folder))


def own_steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Measurements of the steps that the run itself has trained: what it has copied of the run that it goes on from was
    paid there.

    Raises:
        StoreDamagedError, FormatVersionError: they are not what was written.
    """
    origin = came_from(folder.identity())
    first = 0 if origin is None or origin[1] is None else origin[1]
    return [row for row in folder.metrics() if row["step"] > first]


def times_of(rows: Sequence[Mapping[str, Any]], wall_seconds: float = 0.0, device: str | None = None) -> RunTimes:
    """The same from the measurements of all steps.

    Args:
        wall_seconds: after the last of them.
    """
    if not rows:
        return RunTimes(device=device)
    wall = [row.get("wall_seconds") for row in rows]
    return RunTimes(
        training_seconds=round(math.fsum(row["seconds"] for row in rows), 3),
        training_tokens=sum(row["tokens"] for row in rows),
        wall_seconds=None if None in wall else round(math.fsum(one for one in wall if one) + wall_seconds, 3),
        device=device,
    )


def came_from(identity: Mapping[str, Any] | None) -> tuple[str, int | None] | None:
    """Run and step that a run's identity says it began from; None where it began with the student as it was."""
    origin = (identity or {}).get("from")
    if not isinstance(origin, Mapping) or why_not_plain(name := origin.get("run")) is not None:
        return None
    step = origin.get("step")
    return str(name), step if isinstance(step, int) else None


def _ancestry(root: str, name: str) -> tuple[str, ...]:
    line: list[str] = []
    seen = {name}
    while True:
        try:
            origin = came_from(RunFolder(root, name).identity())
        except StoreError:
            return tuple(line)
        if origin is None:
            return tuple(line)
        name, step = origin
        line.append(name if step is None else f"{name}@{step}")
        if name in seen:  # sealed files of one's own making; no chain is endless
            return tuple(line)
        seen.add(name)
