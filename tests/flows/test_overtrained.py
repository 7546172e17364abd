"""Runs that see a domain too often: `train.overtrained`, shown, and the same after a resume."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_run import Ddk, SmallRun

from flows.stores.describe import describe
from storage.checking.verify_runs import run_findings
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord

OPTIONS = (
    *("--set", "method=kd", "--set", "mixture.weights={math: 0.6, code: 0.2, zh_books: 0.2}"),
    *("--set", "train.epoch_limit=0.4"),
)
"""Of 40 blocks a domain: after 4 steps of 8, 'math' has been read 0.48 times, the others 0.16 times."""


def history(run: Path) -> list[MixtureRecord]:
    return MixtureHistory(str(run)).records()


def train(ddk: Ddk, small_run: SmallRun, name: str, *options: str) -> tuple[Path, str]:
    done = ddk("train", small_run.config, "--run", name, *OPTIONS, *options)
    assert done.code == 0, done.err
    return small_run.root / "runs" / name, done.out


def test_what_is_held_out_is_measured_and_recorded(small_run: SmallRun) -> None:
    for record in history(small_run.run):
        assert record.train_blocks == dict.fromkeys(("code", "math", "zh_books"), 40)
        assert record.kl is not None
        assert set(record.kl) == set(record.perplexities)
        assert all(0.1 < kl < 3.0 for kl in record.kl.values())
        assert record.capped is None


def test_a_capped_domain_is_drawn_less_and_a_resume_does_the_same(small_run: SmallRun, ddk: Ddk) -> None:
    run, said = train(ddk, small_run, "capped", "--set", "train.overtrained=cap")
    records = history(run)
    assert [record.capped for record in records] == [None, None, ("math",), ("math",)]
    assert records[2].probabilities == pytest.approx({"math": 1 / 6, "code": 5 / 12, "zh_books": 5 / 12})
    drawn = [after.blocks_drawn["math"] - before.blocks_drawn["math"] for before, after in pairwise(records)]
    assert min(drawn[:2]) >= 9
    assert drawn[2] <= 4
    sentence = (
        f"step 4, math: its 40 train blocks were read {records[2].blocks_drawn['math'] / 40:.1f} times; the limit"
    )
    assert "Seen too often: math (since step 4)" in said
    assert sentence in said
    lines = list(describe(str(run)))
    assert any(line.startswith(f"  seen too often: {sentence}") for line in lines)
    assert any(line.startswith("  code 0.0 epochs, held-out CE 5.") and ", KL 0." in line for line in lines)
    page = (run / "report" / "index.html").read_text()
    assert "Seen too often: math (since step 4)." in page
    assert run_findings(str(small_run.root), "capped", full=True) == []
    # Killed, as it were, in the interval before the alarm: everything later is gone.
    before = {name: (run / name).read_bytes() for name in ("mixtures/00002.json", "mixtures/00003.json")}
    weights = (run / "student" / "model.safetensors").read_bytes()
    for name in (*before, "summary.json", "student.json", "report.json"):
        (run / name).unlink()
    for folder in ("student", "report", "checkpoints/step-00000004", "checkpoints/step-00000006"):
        shutil.rmtree(run / folder)
    train(ddk, small_run, "capped", "--set", "train.overtrained=cap")
    assert {name: (run / name).read_bytes() for name in before} == before
    assert (run / "student" / "model.safetensors").read_bytes() == weights


def test_a_run_may_end_there(small_run: SmallRun, ddk: Ddk) -> None:
    run, _ = train(ddk, small_run, "ended", "--set", "train.overtrained=stop")
    summary: dict[str, Any] = RunFolder(str(small_run.root), "ended").summary() or {}
    assert summary["steps"] == 4
    assert summary["stopped_early"].startswith(
        "train.overtrained is stop, and a domain was seen too often: step 4, math: its 40 train blocks were read"
    )
    assert len(history(run)) == 3
    assert run_findings(str(small_run.root), "ended", full=True) == []


def test_only_what_changes_the_student_makes_another_run(small_run: SmallRun, ddk: Ddk) -> None:
    """The limit of a run that only warns may be changed; not of one that acts on it."""
    assert ddk("train", small_run.config, "--set", "train.epoch_limit=2").code == 0
    refusal = ddk.refusal("train", small_run.config, "--set", "train.overtrained=cap")
    assert "was started with other settings" in refusal
    assert "train.overtrained" in refusal
