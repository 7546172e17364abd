"""Thousands of faults in a root of real stores and runs: `make faults` (`--trials`, `--seed`).

The root is made here, without an engine: two domains whose targets are imported, two runs, a comparison, an evaluation.
Prints, for each kind of file, how many faults `ddk verify` found, how many stopped the reader, and how many were
accepted in silence, which must be none. `tests/support/fault_trials.py` says what a fault is and how it is judged.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# In the place of tests/, whose folders are named as the packages are.
sys.path[0] = str(Path(__file__).parent / "support")

from fault_trials import run_trials, table  # noqa: E402
from faults_root import make_root  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddk-faults-") as folder:
        root, corpus = make_root(Path(folder))
        tallies = run_trials(root, corpus, seed=asked.seed, trials=asked.trials)
    print(table(tallies))
    print(f"{asked.trials} faults, seed {asked.seed}, {time.monotonic() - started:.0f} s")
    examples = [example for tally in tallies.values() for example in tally.examples]
    for example in examples[:20]:
        print(f"SILENT {example}")
    return 1 if examples else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
