"""A seeded sample of `make faults`: no fault in a root changes a number without a word."""

from __future__ import annotations

import shutil
from pathlib import Path

from fault_trials import run_trials, table
from faults_root import enrich
from small_run import ASSETS, SmallRun


def test_no_fault_is_accepted_in_silence(small_run: SmallRun, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_run.root, root)
    for run in (root / "runs").iterdir():  # those that other tests have added: every trial would read them too
        if run.name != small_run.run.name:
            shutil.rmtree(run)
    enrich(root)
    tallies = run_trials(root, ASSETS / "corpora" / "math" / "train.jsonl.gz", seed=1, trials=60)
    print(table(tallies))
    assert [example for tally in tallies.values() for example in tally.examples] == []
    # Not because nothing happened: every kind was struck, and most of it was found by both.
    assert len(tallies) == 19
    assert sum(tally.found for tally in tallies.values()) > 50
    assert sum(tally.stopped for tally in tallies.values()) > 30
