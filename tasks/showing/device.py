"""The name of what computes, for a reader: 'NVIDIA H200', '2 × NVIDIA H200', 'CPU, 16 cores'."""

from __future__ import annotations

import os
import subprocess
from collections import Counter


def device_name(*, gpus: int) -> str:
    """What the work runs on.

    Args:
        gpus: that take part; 0: the processor alone.
    """
    if gpus == 0:
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    names = Counter(_names()[:gpus]) or Counter({"GPU": gpus})
    return ", ".join(f"{number} × {name}" if number > 1 else name for name, number in names.items())


def _names() -> list[str]:
    """Of the GPUs that can be seen, from the driver: torch would take memory on each of them to say it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = ["--id", visible] if visible else []
    command = ["nvidia-smi", *chosen, "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in said.stdout.splitlines() if line.strip()]
