"""The estimate of a run's cost for a person (`table`) and for a program (`as_json`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table

from flows.costing.estimate import GIB, Cost, Figure
from flows.costing.run_size import GPUS


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


def as_json(cost: Cost) -> dict[str, Any]:
    """Plain data; sizes in bytes."""
    gpu = GPUS[cost.assumed.gpu]
    return {
        "assumed": asdict(cost.assumed) | {"gpu_memory": cost.assumed.gib, "gpu_flops": gpu.flops},
        "figures": [asdict(figure) for figure in cost.figures],
        "warnings": cost.warnings,
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
            return _hours(value, "GPU " if figure.unit == "GPU hours" else "")
        case _:
            return f"{_rounded(value)} {figure.unit}"


def _hours(hours: float, of: str) -> str:
    """0.77 → '0.77 h'; what takes less than a minute, in seconds: 2.96e-06 → '0.0107 s'."""
    return f"{_rounded(hours)} {of}h" if 60.0 * hours >= 1.0 else f"{_rounded(3600.0 * hours)} {of}s"


def _scaled(value: float, step: int, units: tuple[str, ...], digits: int = 1) -> str:
    scaled, unit = float(value), 0
    while scaled >= step and unit < len(units) - 1:
        scaled, unit = scaled / step, unit + 1
    return f"{scaled:.{digits if unit else 0}f} {units[unit]}".rstrip()


def _rounded(value: float) -> str:
    """Three figures, and no more of an estimate."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
