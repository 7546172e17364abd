"""`mixture.follow` through the command: what an earlier run answered decides what is drawn."""

from __future__ import annotations

import json

import pytest
from small_run import Ddk, SmallRun

from ddk.concepts import Accuracies, concept_mixture, weaknesses
from ddk.values import Tally
from storage.runs.evaluations import CONCEPTS, EvaluationFolder, stored_concepts

DOMAINS = ["code", "math", "zh_books"]
RIGHT = {"code": 9, "math/addition": 1, "zh_books": 5}
FOLLOW = ("--run", "weak", "--set", "mixture.follow=accuracy", "--set", "mixture.accuracy_run=small")


def evaluated(run: SmallRun, right: dict[str, int], at: float = 1.0) -> None:
    """As `ddk eval` leaves the run: ten questions of each path, answered by its student."""
    tallies = {path: {"acc,none": Tally(right=one, asked=10)} for path, one in right.items()}
    record = {
        "model": "student",
        "task": "own_questions",
        "question": "q",
        "measured_at": at,
        "shots": 0,
        "source": "",
        "asked": 30,
        "available": 30,
        CONCEPTS: stored_concepts(tallies),
        "metrics": {"acc,none": {"value": 0.5, "stderr": 0.1, "higher_is_better": True}},
    }
    EvaluationFolder(str(run.root), "small").write("student", "own_questions-0a", record)


def test_weak_concepts_are_drawn_most_and_other_answers_are_another_run(small_run: SmallRun, ddk: Ddk) -> None:
    refused = ddk.refusal("plan", small_run.config, *FOLLOW)
    assert "mixture.accuracy_run 'small' has no evaluations below" in refused
    assert "run `ddk eval` on that run" in refused
    evaluated(small_run, {"physics": 3})
    assert "the questions have the paths 'physics', and none" in ddk.refusal("train", small_run.config, *FOLLOW)

    evaluated(small_run, RIGHT)
    planned = ddk("plan", small_run.config, *FOLLOW)
    assert "its mixture follows accuracy: 30 answers of run 'small' (student)" in planned.out, planned.err
    done = ddk("train", small_run.config, *FOLLOW)
    assert done.code == 0, done.err
    student = {path: Tally(right=one, asked=10) for path, one in RIGHT.items()}
    weak = weaknesses(Accuracies(student=student), DOMAINS)
    expected = concept_mixture(DOMAINS, weak, alpha=0.5, temperature=0.25)
    folder = small_run.root / "runs" / "weak"
    mixtures = [json.loads(path.read_text())["probabilities"] for path in sorted((folder / "mixtures").iterdir())]
    assert mixtures == [pytest.approx(dict(expected.probabilities))] * 4
    identity = json.loads((folder / "identity.json").read_text())
    assert identity["accuracies"] == {"student": {path: [float(one), 10] for path, one in RIGHT.items()}}
    # The uninterrupted run of the fixture followed the gap, and its identity knows nothing of accuracies.
    small = json.loads((small_run.run / "identity.json").read_text())
    assert "follow" not in small["mixture"]
    assert "accuracies" not in small

    # Asked again with other answers: what was begun with the first is not continued with the second.
    evaluated(small_run, {**RIGHT, "code": 0}, at=2.0)
    assert "accuracies.student.code" in ddk.refusal("train", small_run.config, *FOLLOW)
