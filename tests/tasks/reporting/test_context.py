from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console

from storage.runs.evaluations import CONTEXT_KIND, EvaluationFolder
from tasks.reporting.context import context_rows, terminal_context
from tasks.reporting.scores import evaluation_section, measured_rows, report_evaluation


def record(model: str, task: str, metrics: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "kind": CONTEXT_KIND,
        "model": model,
        "task": task,
        "group": None,
        "limit": None,
        "measured_at": 1.0,
        "question": f"q-{task}",
        "shots": 0,
        "asked": 8,
        "available": 8,
        "source": "validation documents",
        "trained": 256,
        "metrics": {
            name: {"value": value, "stderr": 0.5, "higher_is_better": False} for name, value in metrics.items()
        },
        **changes,
    }


def test_rows_put_the_models_side_by_side(tmp_path: Path) -> None:
    ppl = {"ppl,0-256": 20.0, "ppl_to,256": 20.0, "ppl,256-512": 40.0, "ppl_to,512": 28.3}
    records = [
        record("before", "context:math", {name: 2 * value for name, value in ppl.items()}),
        record("student", "context:math", ppl),
        record("student", "passkey", {"acc,256": 0.5, "acc,512": 0.25}),
        # Measured before on fewer sequences: what is measured last counts.
        record("teacher", "context:math", ppl, question="other", measured_at=0.5),
    ]
    rows = context_rows(records)
    assert [(row["figure"], row["first"], row["last"]) for row in rows] == [
        ("ppl", 0, 256),
        ("ppl", 256, 512),
        ("ppl_to", 0, 256),
        ("ppl_to", 0, 512),
        ("acc", 0, 256),
        ("acc", 0, 512),
    ]
    assert (rows[1]["before"], rows[1]["student"], rows[1]["teacher"]) == (80.0, 40.0, None)

    folder = EvaluationFolder(str(tmp_path), "try")
    for number, one in enumerate(records):
        folder.write(one["model"], f"record-{number}", one)
    assert measured_rows(str(tmp_path), "try") == ([], [])  # they are no benchmarks
    urls = report_evaluation(str(tmp_path), "try")
    kept = list(csv.DictReader(io.StringIO(Path(urls["context.csv"]).read_text())))
    assert [row["student"] for row in kept] == ["20.0", "40.0", "20.0", "28.3", "0.5", "0.25"]
    section = str(evaluation_section(str(tmp_path), "try"))
    assert "256 to 512 (1× to 2×)" in section
    assert "Passkeys found" in section
    assert "No benchmark has been evaluated" not in section

    console = Console(width=120, record=True, file=io.StringIO())
    for table in terminal_context(rows):
        console.print(table)
    said = console.export_text()
    assert "256 to 512 (1× to 2×)" in said
    assert "25 %" in said
    assert "28.3" not in said
