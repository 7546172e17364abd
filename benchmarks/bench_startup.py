"""How long commands take that have next to nothing to do: `make bench-startup`.

Each is a process of its own, as in a shell. The root is the quickstart's (`quickstart-run` where it is there and
complete, else one that is made first). Of each command the median of five calls, after one that is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from harness import publish, row

CALLS = 5
PRESET = os.path.join("flows", "presets", "quickstart.yaml")


def main() -> int:
    with complete_root() as root:
        run = os.path.join(root, "runs", "quickstart")
        rows = [
            row("ddk --help", times("--help"), "s", 0.5),
            row("ddk distill, all complete", times("distill", PRESET, "--root", root), "s", 5),
            row("ddk plan, all complete", times("plan", PRESET, "--root", root), "s", 5),
            row("ddk plan, another loss", times("plan", PRESET, "--root", root, "--set", "loss.gamma=0.5"), "s"),
            row("ddk inspect of a run", times("inspect", run), "s", 5),
            row("ddk verify of a run", times("verify", run), "s", 5),
            row("ddk verify of the whole root", times("verify", root), "s"),
        ]
    return 0 if publish("startup", "make bench-startup", rows) else 1


def times(*arguments: str) -> list[float]:
    """Wall time in seconds of each call."""
    found = []
    for _ in range(CALLS + 1):
        started = time.monotonic()
        subprocess.run([ddk(), *arguments], check=True, capture_output=True)
        found.append(time.monotonic() - started)
    return found[1:]


@contextmanager
def complete_root() -> Iterator[str]:
    """A root in which the quickstart is complete."""
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as made:
        there = os.path.exists(os.path.join("quickstart-run", "runs", "quickstart", "summary.json"))
        root = "quickstart-run" if there else made
        subprocess.run([ddk(), "distill", PRESET, "--root", root], check=True, stdout=subprocess.DEVNULL)
        yield root


def ddk() -> str:
    """The command of this environment."""
    return os.path.join(os.path.dirname(sys.executable), "ddk")


if __name__ == "__main__":
    sys.exit(main())
