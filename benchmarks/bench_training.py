"""What a training step with a teacher costs beside one without: `make bench-training`, minutes on two cores.

Ratios of medians, measured side by side: `training_loss` (the fused loss at V = 151,936), `training_step` (whole steps
of the quickstart's student from stores on disk and S3, the gap's evaluation, growth of memory).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median

import training_loss
import training_step
from harness import Row, publish, row, s3_server

ROUNDS = 5


def loss_rows() -> list[Row]:
    script = training_loss.__file__
    done = subprocess.run(
        [sys.executable, script, "time", str(ROUNDS)], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
    )
    times = json.loads(done.stdout)
    plain, naive = median(times["plain"]), median(times["naive"])
    peaks = {}
    for variant in training_loss.VARIANTS:
        asked = subprocess.run(
            [sys.executable, script, variant], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
        )
        peaks[variant] = float(asked.stdout)
    return [
        row("F.cross_entropy(hidden @ W.T), forward and backward", times["plain"], "s"),
        row("fused CE + KL / F.cross_entropy", [one / plain for one in times["fused"]], "x", 1.15),
        row("fused CE alone / F.cross_entropy", [one / plain for one in times["fused_ce"]], "x"),
        row("fused CE + KL / naive sparse distillation", [one / naive for one in times["fused"]], "x", 0.8),
        row("peak memory of F.cross_entropy", [peaks["plain"]], "MiB"),
        row("peak memory of naive sparse distillation", [peaks["naive"]], "MiB"),
        row("peak memory: fused CE + KL / F.cross_entropy", [peaks["fused"] / peaks["plain"]], "x", 0.35),
    ]


def main() -> int:
    rows = loss_rows()
    with s3_server() as url:
        rows += training_step.rows(ROUNDS, url)
    rows += training_step.memory_rows()
    return 0 if publish("training", "make bench-training", rows) else 1


if __name__ == "__main__":
    sys.exit(main())
