"""The runs of a root for a person (`table`, `notes`) and for a program (`as_json`): `ddk runs`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from ddk.errors import UserError
from storage.files import uri
from storage.files.root import check_root
from storage.runs.overview import RunOverview, RunTimes, overviews
from tasks.showing.formats import UNKNOWN, count, duration, number_or_unknown, size, speed


def runs_of(root: str) -> list[RunOverview]:
    """Every run below a root, the one that was worked on last at the end.

    Raises:
        UserError: the root is no place for one, or has no runs.
    """
    check_root(root)
    found = overviews(root)
    if not found:
        raise UserError(f"there are no runs below {uri.join(root, 'runs')}; correct the root, or run `ddk train` first")
    return sorted(found, key=lambda one: (one.ended or 0.0, one.name))


def as_json(runs: Sequence[RunOverview]) -> list[dict[str, Any]]:
    """Plain data; times in ISO 8601, UTC."""
    rows = []
    for one in runs:
        row = asdict(one)
        times = row.pop("times")
        rows.append(
            {
                **row,
                **times,
                "tokens_per_second": one.times.tokens_per_second,
                "began": _iso(one.began),
                "ended": _iso(one.ended),
                "ancestry": list(one.ancestry),
            }
        )
    return rows


def table(runs: Sequence[RunOverview]) -> Table:
    """One row a run."""
    found = Table(
        title="Runs, the newest last (gap: the largest of all domains)",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    found.add_column("run", overflow="fold")
    found.add_column("state", no_wrap=True)
    found.add_column("last step", no_wrap=True)
    for heading in ("steps", "gap", "tokens/s", "training", "bytes"):
        found.add_column(heading, justify="right", no_wrap=True)
    for one in runs:
        found.add_row(
            Text(one.name),  # no str: '[red]' is no markup
            one.state,
            UNKNOWN if one.ended is None else f"{_date(one.ended):%Y-%m-%d}",
            _steps(one),
            number_or_unknown(one.worst_ratio, 3),
            speed(one.times.tokens_per_second),
            _training(one.times),
            size(one.bytes),
            style="red" if one.state == "damaged" else None,
        )
    return found


def notes(runs: Sequence[RunOverview]) -> Iterator[str]:
    """What has no room in the table: where a run began, why it stopped early, what is wrong with it."""
    for one in runs:
        if one.ancestry:
            yield f"{one.name}: began from {', which began from '.join(one.ancestry)}"
        if one.state == "damaged":
            yield f"{one.name}: damaged: {one.reason}"
        elif one.reason is not None:
            yield f"{one.name}: stopped early: {one.reason}"


def _steps(one: RunOverview) -> str:
    whole = one.planned_steps is None or one.state == "complete"
    return count(one.steps) if whole else f"{count(one.steps)}/{count(one.planned_steps or 0)}"


def _training(times: RunTimes) -> str:
    """What training took as a whole; of runs of older versions only that of the steps is known."""
    if times.wall_seconds is not None:
        return duration(times.wall_seconds)
    return UNKNOWN if times.training_seconds is None else f"≥ {duration(times.training_seconds)}"


def _date(unix: float) -> datetime:
    return datetime.fromtimestamp(unix, tz=UTC)


def _iso(unix: float | None) -> str | None:
    return None if unix is None else _date(unix).isoformat(timespec="seconds")
