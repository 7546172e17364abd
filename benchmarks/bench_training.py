"""What a training step with a teacher costs beside one without: `make bench-training`, minutes on two cores.

Ratios of medians, measured side by side: `training_loss` (the fused loss at V = 151,936, in wall and in processor time,
with glibc's allocator as it comes and with one that keeps its memory), `training_step` (whole steps of the quickstart's
student from stores on disk and S3, the gap's evaluation, growth of memory).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any

import training_loss
import training_step
from harness import Row, publish, row, s3_server

ROUNDS = 5


ALLOCATORS = {"default allocator": ({}, 0), "memory kept": (training_loss.KEEPING, training_loss.KEPT_GIB)}
"""What the environment says of glibc's, and how much it is to have ahead; training_loss.py says why."""
BARS = {"fused": 1.15, "naive": 1.15}
"""Of the processor time with memory kept: what the loss itself takes, whatever else the machine does."""


def loss_rows() -> list[Row]:
    rows = []
    for allocator, (environment, gib) in ALLOCATORS.items():
        rows += time_rows(allocator, ask(["time", str(ROUNDS), str(gib)], environment))
    peaks = {variant: ask([variant], {}) for variant in training_loss.VARIANTS}
    return [
        *rows,
        row("peak memory of F.cross_entropy", [peaks["plain"]], "MiB"),
        row("peak memory of naive sparse distillation", [peaks["naive"]], "MiB"),
        row("peak memory: fused CE + KL / F.cross_entropy", [peaks["fused"] / peaks["plain"]], "x", 0.35),
        row("peak memory: fused CE + KL / naive sparse distillation", [peaks["fused"] / peaks["naive"]], "x", 0.35),
    ]


def ask(arguments: list[str], environment: dict[str, str]) -> Any:
    """What training_loss.py says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, training_loss.__file__, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout)


def time_rows(allocator: str, found: dict[str, dict[str, list[float]]]) -> Iterator[Row]:
    yield row(f"{allocator}: F.cross_entropy(hidden @ W.T), forward and backward", found["plain"]["wall"], "s")
    yield row(f"{allocator}: page faults of F.cross_entropy", found["plain"]["faults"], "faults")
    yield row(f"{allocator}: page faults of fused CE + KL", found["fused"]["faults"], "faults")
    for clock in ("wall", "processor"):
        plain, naive = median(found["plain"][clock]), median(found["naive"][clock])
        judged = allocator == "memory kept" and clock == "processor"
        for what, times, beside, bar in (
            ("fused CE + KL / F.cross_entropy", found["fused"], plain, BARS["fused"]),
            ("fused CE alone / F.cross_entropy", found["fused_ce"], plain, None),
            ("fused CE + KL / naive sparse distillation", found["fused"], naive, BARS["naive"]),
        ):
            ratios = [one / beside for one in times[clock]]
            yield row(f"{allocator}, {clock} time: {what}", ratios, "x", bar if judged else None)


def main() -> int:
    held = publish("loss", "make bench-training", loss_rows())
    with s3_server() as url:
        rows = training_step.rows(ROUNDS, url)
    rows += training_step.memory_rows()
    return 0 if publish("training", "make bench-training", rows) and held else 1


if __name__ == "__main__":
    sys.exit(main())
