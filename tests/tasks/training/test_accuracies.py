"""What a run's mixture follows of an earlier run's evaluations, and what it refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ddk.concepts import Accuracies
from ddk.errors import UserError
from ddk.mixture import MixtureConfig
from ddk.values import Tally
from storage.runs.evaluations import CONCEPTS, EvaluationFolder, stored_concepts
from tasks.training.accuracies import as_identity, read_accuracies, say_what_does_not_match

FOLLOW = MixtureConfig(follow="accuracy", accuracy_run="first")
DOMAINS = ["math/add", "math/mul", "web"]


def write(root: Path, model: str, right: dict[str, float], task: str = "own_questions", **changes: Any) -> None:
    """Ten questions of each path."""
    tallies = {
        path: {"acc,none": Tally(right=one, asked=10), "acc_norm,none": Tally(right=0, asked=10)}
        for path, one in right.items()
    }
    record = {
        "model": model,
        "task": task,
        "question": f"{task} q",
        "measured_at": 1.0,
        "shots": 0,
        "source": "a file",
        "asked": 10 * len(right),
        "available": 10 * len(right),
        CONCEPTS: stored_concepts(tallies),
        "metrics": {name: {"value": 0.5, "stderr": 0.1, "higher_is_better": True} for name in ("acc,none",)},
        **changes,
    }
    EvaluationFolder(str(root), "first").write(model, f"{task}-{record['measured_at']}", record)


def tally(right: float, asked: int = 10) -> Tally:
    return Tally(right=right, asked=asked)


def test_the_gap_alone_reads_nothing(tmp_path: Path) -> None:
    assert read_accuracies(str(tmp_path), MixtureConfig(), DOMAINS) is None


def test_benchmarks_are_pooled_and_the_newest_answers_count(tmp_path: Path) -> None:
    write(tmp_path, "student", {"math/add": 9, "web": 3})
    write(tmp_path, "student", {"math/add": 8, "web": 3}, measured_at=2.0)
    write(tmp_path, "student", {"math/add": 1, "math/mul/by two": 2}, task="arc_easy")
    write(tmp_path, "before", {"math/add": 0})
    found = read_accuracies(str(tmp_path), FOLLOW, DOMAINS)
    assert found == Accuracies(student={"math/add": tally(9, 20), "math/mul/by two": tally(2), "web": tally(3)})
    assert as_identity(found) == {"student": {"math/add": [9.0, 20], "math/mul/by two": [2.0, 10], "web": [3.0, 10]}}
    before = read_accuracies(str(tmp_path), FOLLOW.model_copy(update={"accuracy_model": "before"}), DOMAINS)
    assert before == Accuracies(student={"math/add": tally(0)})


def test_a_teacher_that_was_asked_the_same_says_how_much_there_is_to_learn(tmp_path: Path) -> None:
    write(tmp_path, "student", {"math/add": 1, "web": 3})
    write(tmp_path, "teacher", {"math/add": 5, "web": 4}, task="arc_easy")
    assert read_accuracies(str(tmp_path), FOLLOW, DOMAINS) == Accuracies(
        student={"math/add": tally(1), "web": tally(3)}
    )
    write(tmp_path, "teacher", {"math/add": 5, "web": 4})
    found = read_accuracies(str(tmp_path), FOLLOW, DOMAINS)
    assert found is not None
    assert found.teacher == {"math/add": tally(5), "web": tally(4)}


def test_what_does_not_match_is_said_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "student", {"math/add": 1, "physics": 3})
    found = read_accuracies(str(tmp_path), FOLLOW, DOMAINS)
    assert found is not None
    with caplog.at_level(logging.WARNING, logger="ddk"):
        say_what_does_not_match(found, FOLLOW, DOMAINS)
    assert "its questions of 'physics' belong to no domain" in caplog.text
    assert "it asked nothing of the domains 'math/mul', 'web'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ddk"):
        say_what_does_not_match(found, FOLLOW.model_copy(update={"level": 1}), DOMAINS)
    assert "of the domains 'web'" in caplog.text


def test_what_cannot_be_followed_is_refused_with_the_remedy(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            read_accuracies(str(tmp_path), FOLLOW, DOMAINS)

    refused(r"mixture.accuracy_run 'first' has no evaluations below .*; run `ddk eval` on that run with --data")
    write(tmp_path, "before", {"math/add": 1})
    refused("'first' has no evaluation of its student; run")
    write(tmp_path, "student", {}, task="arc_easy", asked=10, available=10)
    refused("'first' has answers of its student, and none of the questions has a path")
    write(tmp_path, "student", {"physics": 1})
    refused(r"the questions have the paths 'physics', and none .*domains 'math/add', 'math/mul', 'web'; give questions")
