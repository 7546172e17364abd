"""The paths of questions, from a line of a file to the tallies that a record holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk.errors import UserError
from ddk.values import Tally
from tasks.evaluation.concepts import labelled, tallied, together
from tasks.evaluation.local_files import DataFolder
from tasks.evaluation.names import parse
from tasks.evaluation.questions import Part, build_measures

QUESTION: dict[str, Any] = {"query": "2 + 3 =", "choices": ["5", 6, "7"], "gold": 0}


def part(folder: Path, rows: list[dict[str, Any]], field: str = "concept", task: str = "own_questions") -> Part:
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (measure,) = build_measures(
        [parse(f"{task}@0")], folder=DataFolder(str(folder), field), completions=lambda domain: (), limit=None, seed=1
    )
    return measure.parts[0]


def test_questions_of_ones_own_have_a_path_that_no_model_is_shown(tmp_path: Path) -> None:
    rows = [{**QUESTION, "concept": " arithmetic/addition/ "}, {**QUESTION, "concept": "order"}]
    found = part(tmp_path, rows)
    assert found.paths == {0: "arithmetic/addition", 1: "order"}
    asked = [instance.args for instance in found.task.instances]
    assert asked == [("2 + 3 =", f" {choice}") for choice in (5, 6, 7)] * 2
    assert found.task.process_results(found.task.eval_docs[0], [(0.0, False), (-1.0, False), (-1.0, False)])["acc"] == 1
    # Other paths are the same questions: nothing is asked again.
    assert part(tmp_path, [{**QUESTION, "concept": "x"}, QUESTION | {"concept": "y"}]).requests == found.requests
    bare = part(tmp_path, [QUESTION, QUESTION])
    assert (bare.paths, bare.requests) == ({}, found.requests)
    assert part(tmp_path, rows, field="").paths == {}


def test_several_fields_are_the_parts_of_a_path(tmp_path: Path) -> None:
    row = {"question": "Two and three?", "answer": "#### 5", "cate0": "numbers", "cate1": 2}
    assert part(tmp_path, [row, row], field="cate0, cate1", task="gsm8k").paths == dict.fromkeys((0, 1), "numbers/2")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {},
            r"line 2: no field 'concept', which other lines of the file have; .*--concept-field",
        ),
        ({"concept": ["a"]}, r"line 2: the field 'concept' holds no path \(it is \"\['a'\]\", and no text\)"),
        (
            {"concept": "a//b"},
            r"line 2: the field 'concept' holds no path \(a part of it is empty\); write one such",
        ),
        ({"concept": "a", "gold": 3}, r"line 2: not a question of this task \('gold' is 3; it must be the number of a"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        part(tmp_path, [{**QUESTION, "concept": "a"}, {**QUESTION, **second}])


def test_without_a_file_of_its_own_the_task_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes its questions from a file own_questions.jsonl, and --data names"):
        build_measures([parse("own_questions")], folder=None, completions=lambda domain: (), limit=None, seed=1)


SAMPLES = [
    {"question": 0, "filter": "none", "acc": 1.0, "ppl": 12.5, "f1": 0.5},
    {"question": 1, "filter": "none", "acc": 0.0, "ppl": 3.0, "f1": 0.25},
    {"question": 2, "filter": "none", "acc": 1.0, "ppl": 3.0, "f1": 1.0},
    {"question": 3, "filter": "none", "acc": 1.0, "ppl": 0.5, "f1": 0.0},
]


def test_answers_are_tallied_by_path_and_metric() -> None:
    found = tallied(SAMPLES, {0: "a", 1: "a", 2: "b"}, ["acc,none", "ppl,none", "f1,none", "acc,other"])
    assert found == {
        "a": {"acc,none": Tally(right=1, asked=2), "f1,none": Tally(right=0.75, asked=2)},
        "b": {"acc,none": Tally(right=1, asked=1), "f1,none": Tally(right=1, asked=1)},
    }, "a perplexity is no accuracy; a question without a path does not count"
    programs = [{"question": 0, "filter": "none", "outcome": "passed"}, {"question": 1, "outcome": "TypeError"}]
    assert tallied(programs, {0: "a", 1: "a"}, ["pass@1"]) == {"a": {"pass@1": Tally(right=1, asked=2)}}


def test_parts_are_added_up_and_an_unchanged_record_is_left() -> None:
    one = tallied(SAMPLES[:2], {0: "a", 1: "a"}, ["acc,none"])
    record = labelled({"task": "t"}, one)
    assert record == {"task": "t", "concepts": {"a": {"acc,none": {"right": 1.0, "asked": 2}}}}
    assert labelled(record, one) is None
    assert labelled({"task": "t"}, {}) is None
    assert together([record, record, {"task": "bare"}]) == {"a": {"acc,none": Tally(right=2, asked=4)}}
