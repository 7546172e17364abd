"""What the quickstart costs and shows: `make bench-quickstart`.

Runs `ddk quickstart` once, in a process of its own, into an empty folder; samples the memory of the whole process tree
(proportional set size, so that shared pages count once); reads the gap before and after from the run's report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import psutil
from harness import publish, row


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as root:
        seconds, peak_gib = run([sys.executable, "-m", "flows", "quickstart", "--root", root])
        again, _ = run([sys.executable, "-m", "flows", "quickstart", "--root", root])
        with open(os.path.join(root, "runs", "quickstart", "report", "report.json"), encoding="utf-8") as file:
            gaps = json.load(file)["gap"]
    before, after = ([gap[f"ratio_{when}"] for gap in gaps] for when in ("before", "after"))
    by_gap = sorted(gaps, key=lambda gap: gap["ratio_before"])
    half = len(by_gap) // 2
    smaller, larger = (sum(gap["token_share"] for gap in part) / len(part) for part in (by_gap[:half], by_gap[-half:]))
    rows = [
        row("wall time", [seconds], "s", 300),
        row("peak memory of all processes", [peak_gib], "GiB", 6),
        row("wall time of a second call, all complete", [again], "s"),
        row("largest ratio before", [max(before)], ""),
        row("largest ratio after / before", [max(after) / max(before)], "", 1),
        row("mean ratio after / before", [sum(after) / sum(before)], "", 1),
        row("tokens of the larger gaps' half / the smaller's", [larger / smaller], "", 1, ">"),
    ]
    return 0 if publish("quickstart", "make bench-quickstart", rows) else 1


def run(command: list[str]) -> tuple[float, float]:
    """Wall time in seconds, and the largest memory of the process tree that was seen, in GiB."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.5)
    if process.returncode != 0:
        raise SystemExit(process.stderr.read() if process.stderr else "the quickstart failed")
    return time.monotonic() - started, peak / 2**30


def tree_memory(pid: int) -> int:
    """Proportional set size of a process and of all below it, in bytes."""
    total = 0
    try:
        for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        return 0
    return total


if __name__ == "__main__":
    sys.exit(main())
