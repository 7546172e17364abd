"""The estimate of a run's cost for a person (`table`) and for a program (`as_json`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.costing.estimate import GIB, Cost, Figure, Section
from flows.costing.run_size import GPUS
from tasks.showing.formats import UNKNOWN, count, duration, size


def table(cost: Cost, run: str) -> Table:
    """One row a figure, by sections."""
    assumed = cost.assumed
    found = Table(
        title=f"What {run} will take, on {assumed.gpu.upper()} GPUs of {assumed.gib:g} GiB",
        caption="Calculated from the configuration and the models' configs. GPU time is an estimate at "
        f"{GPUS[assumed.gpu].flops / 1e12:.0f} TFLOP/s × a utilisation of {assumed.mfu:g} (--mfu), not measured.",
        title_justify="left",
        caption_justify="left",
    )
    found.add_column("what", no_wrap=True)
    found.add_column("estimate", justify="right", no_wrap=True)
    found.add_column("how", overflow="fold")
    section = ""
    for figure in cost.figures:
        if figure.section != section:
            section = figure.section
            found.add_section()
            found.add_row(f"[bold]{section}[/bold]", "", "")
        found.add_row(figure.what, shown(figure), figure.how)
    return found


def measured_table(cost: Cost, costs: Mapping[str, Any]) -> Table:
    """What a run that was begun has really taken, beside the estimate.

    Args:
        costs: as `tasks.reporting.costs.costs_of` has them.
    """
    found = Table(
        title="What it has taken so far",
        caption="Planned is the time of all GPUs together, measured is the time on the clock.",
        title_justify="left",
        caption_justify="left",
    )
    for heading, left in (("what", True), ("planned", False), ("measured", False), ("on", True)):
        found.add_column(heading, justify="left" if left else "right", no_wrap=left is False, overflow="fold")
    capture = costs.get("capture") or {}
    gpu = f"planned: {cost.assumed.gpu.upper()}"

    def planned(section: Section, what: str) -> str:
        return next((shown(one) for one in cost.figures if (one.section, one.what) == (section, what)), UNKNOWN)

    def took(seconds: float | None) -> str:
        return UNKNOWN if seconds is None else duration(seconds)

    def on(device: str | None) -> Text:
        return Text(f"{device or UNKNOWN} ({gpu})")

    found.add_row("capture", planned("GPU time", "capture"), took(capture.get("seconds")), on(capture.get("device")))
    training = (planned("GPU time", "training"), took(costs.get("training_seconds")))
    found.add_row("optimizer steps", *training, on(costs.get("device")))
    found.add_row("training in all", "", took(costs.get("wall_seconds")), "with measurements and checkpoints")
    tokens = costs.get("training_tokens")
    found.add_row(
        "tokens trained on", count(costs.get("planned_tokens") or 0), UNKNOWN if tokens is None else count(tokens)
    )
    found.add_row("targets", planned("disk", "targets, expected"), size(capture["bytes"]) if capture else UNKNOWN)
    return found


def as_json(cost: Cost, costs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Plain data; sizes in bytes.

    Args:
        costs: of the run, where it was begun.
    """
    gpu = GPUS[cost.assumed.gpu]
    return {
        "assumed": asdict(cost.assumed) | {"gpu_memory": cost.assumed.gib, "gpu_flops": gpu.flops},
        "figures": [asdict(figure) for figure in cost.figures],
        "warnings": cost.warnings,
        **({"measured": dict(costs)} if costs is not None else {}),
    }


def warning_lines(cost: Cost) -> Iterator[str]:
    for warning in cost.warnings:
        yield f"note: {warning}"


def shown(figure: Figure) -> str:
    """A figure for reading: disks in decimal units, memory in binary ones."""
    value = figure.value
    match figure.unit:
        case "bytes" if figure.section == "disk":
            return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))
        case "bytes":
            return f"{value / GIB:.1f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"
        case "parameters" | "positions":
            return _scaled(value, 1000, ("", "thousand", "million", "billion", "trillion"), digits=2)
        case "FLOP":
            return f"{value:.3g} FLOP"
        case "GPU hours" | "hours":
            return hours_shown(value, "GPU " if figure.unit == "GPU hours" else "")
        case _:
            return f"{_rounded(value)} {figure.unit}"


def hours_shown(hours: float, of: str) -> str:
    """0.77 → '0.77 h'; what takes less than a minute, in seconds: 2.96e-06 → '0.0107 s'."""
    if 60.0 * hours >= 1.0:
        return f"{_rounded(hours)} {of}h"
    seconds = 3600.0 * hours
    return f"{'< 0.001' if 0.0 < seconds < 0.001 else _rounded(seconds)} {of}s"


def _scaled(value: float, step: int, units: tuple[str, ...], digits: int = 1) -> str:
    scaled, unit = float(value), 0
    while scaled >= step and unit < len(units) - 1:
        scaled, unit = scaled / step, unit + 1
    return f"{scaled:.{digits if unit else 0}f} {units[unit]}".rstrip()


def _rounded(value: float) -> str:
    """Three figures, and no more of an estimate."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
