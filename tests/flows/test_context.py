"""A run that prepares its student for longer contexts, on the small run's cache."""

from __future__ import annotations

import json

import pytest
import transformers
from small_run import Ddk, SmallRun

LONG = ("--run", "long", "--set", "student.context={target: 768, trained: 96, max_scale: 12}")

pytestmark = pytest.mark.engine


def test_the_saved_student_is_for_the_target_and_the_run_is_one_of_its_own(small_run: SmallRun, ddk: Ddk) -> None:
    done = ddk("train", small_run.config, *LONG)
    assert done.code == 0, done.err
    folder = small_run.root / "runs" / "long"
    config = transformers.AutoConfig.from_pretrained(folder / "student")
    assert config.max_position_embeddings == 768
    assert config.rope_parameters == {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0}
    assert "declares 768 positions and divides them by 8" in (folder / "student" / "README.md").read_text()

    identity = json.loads((folder / "identity.json").read_text())
    assert (identity["context"]["target"], identity["context"]["block"]) == (768, 96)
    assert "context" not in json.loads((small_run.run / "identity.json").read_text())
    assert "context.target" in ddk.refusal("train", small_run.config, *LONG[:3], LONG[3].replace("768", "960"))

    # The gap is measured at ordinary positions: before the training it is that of any run.
    first, other = (
        json.loads(min((run / "mixtures").iterdir()).read_text())["perplexities"] for run in (folder, small_run.run)
    )
    assert first == other
    last = max((folder / "mixtures").iterdir())
    assert json.loads(last.read_text())["perplexities"] != first


def test_a_context_that_does_not_fit_is_said_in_one_line(small_run: SmallRun, ddk: Ddk) -> None:
    def refused(context: str, *further: str) -> str:
        return ddk.refusal("train", small_run.config, "--set", f"student.context={context}", *further)

    assert "student.context.target is 128, and the student knows 256 positions already" in refused("{target: 128}")
    assert "set max_scale to at least 8" in refused("{target: 2048, max_scale: 4}")
    assert "student.context.target: this field is missing" in refused("{}")
    assert "student.context.offsets: there is no such field (did you mean offset_after?)" in refused(
        "{target: 2048, offsets: 4}"
    )
