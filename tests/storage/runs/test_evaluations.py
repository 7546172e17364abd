"""Records of evaluations: found again, taken over from other runs, and never half there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddk.values import Tally
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.runs.evaluations import CONCEPTS, EvaluationFolder, concepts_of, record_name, stored_concepts

RECORD = {"task": "arc_easy", "metrics": {"acc,none": {"value": 0.25}}}
SAMPLES = [{"answer": "one\u2028line \x85 of\x0ctext"}, {"answer": "二"}]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_record_and_its_answers_come_back(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = str(tmp_path) if where == "disk" else request.getfixturevalue("s3_server") + "/evaluations"
    folder = EvaluationFolder(root, "first")
    assert folder.find("student", "arc_easy-0a") is None
    assert folder.samples("student", "arc_easy-0a") is None
    folder.write("student", "arc_easy-0a", RECORD, SAMPLES)
    found = folder.find("student", "arc_easy-0a")
    assert found is not None
    assert found.items() >= RECORD.items()
    assert folder.samples("student", "arc_easy-0a") == SAMPLES
    assert folder.find("teacher", "arc_easy-0a") is None
    assert [record["task"] for record in folder.records()] == ["arc_easy"]


def test_another_runs_record_of_the_same_key_is_taken_over(tmp_path: Path) -> None:
    first, second = (EvaluationFolder(str(tmp_path), run) for run in ("first", "second"))
    name = record_name("mmlu_anatomy", "0a", "mmlu")
    first.write("teacher", name, RECORD, SAMPLES)
    assert second.records() == []
    assert second.find("teacher", name) == first.find("teacher", name)
    assert second.samples("teacher", name) == SAMPLES
    uri.remove_tree(first.url)
    assert second.find("teacher", name) is not None, "a copy, not a reference"
    assert second.find("teacher", record_name("mmlu_anatomy", "0b", "mmlu")) is None


def test_parts_of_a_task_are_no_lines_of_a_report(tmp_path: Path) -> None:
    folder = EvaluationFolder(str(tmp_path), "run")
    folder.write("student", record_name("mmlu_anatomy", "0a", "mmlu"), {"task": "mmlu_anatomy"})
    folder.write("student", record_name("mmlu", "0b"), {"task": "mmlu"})
    assert [record["task"] for record in folder.records()] == ["mmlu"]


def test_answers_without_a_record_do_not_count(tmp_path: Path) -> None:
    folder = EvaluationFolder(str(tmp_path), "run")
    folder.write("student", "arc_easy-0a", RECORD, SAMPLES)
    uri.remove_file(uri.join(folder.url, "student", "arc_easy-0a.json"))
    assert folder.find("student", "arc_easy-0a") is None
    assert folder.records() == []


def test_a_record_of_another_format_is_not_read(tmp_path: Path) -> None:
    folder = EvaluationFolder(str(tmp_path), "run")
    uri.write_json(uri.join(folder.url, "student", "arc_easy-0a.json"), {**RECORD, "format_version": 99})
    assert folder.find("student", "arc_easy-0a") is None
    assert folder.records() == []


def test_what_was_changed_is_found(tmp_path: Path) -> None:
    folder = EvaluationFolder(str(tmp_path), "run")
    for name in ("arc_easy-0a", "mmlu/anatomy-0b"):
        folder.write("student", name, RECORD, SAMPLES)
    assert list(folder.findings()) == []
    answers = tmp_path / "runs/run/evaluations/student/mmlu/anatomy-0b.samples.jsonl"
    answers.write_bytes(answers.read_bytes().replace(b"one", b"two"))
    with pytest.raises(StoreDamagedError, match=r"anatomy-0b\.samples\.jsonl does not hold the answers"):
        folder.samples("student", "mmlu/anatomy-0b")
    record = tmp_path / "runs/run/evaluations/student/arc_easy-0a.json"
    record.write_bytes(record.read_bytes().replace(b"0.25", b"0.75"))
    with pytest.raises(StoreDamagedError, match=r"arc_easy-0a\.json is no sound record .*run the same `ddk eval`"):
        folder.records()
    assert [url.rsplit("/", 1)[-1] for url, _ in folder.findings()] == ["arc_easy-0a.json", "anatomy-0b.json"]


def test_names_are_names_of_files() -> None:
    assert record_name("completion:C++ / new", "0a") == "completion-C-new-0a"
    assert record_name("mmlu_anatomy", "0a", "mmlu") == "mmlu/mmlu_anatomy-0a"
    assert "/" not in record_name("../../etc", "0a")


def test_a_folder_on_s3_is_copied_for_as_long_as_it_is_used(s3_server: str, tmp_path: Path) -> None:
    url = f"{s3_server}/copied/student"
    for name in ("config.json", "model.safetensors"):
        uri.write_bytes(uri.join(url, name), name.encode())
    with uri.local_folder_copy(url) as local:
        found = {path.name: path.read_text() for path in Path(local).iterdir()}
    assert found == {"config.json": "config.json", "model.safetensors": "model.safetensors"}
    assert not Path(local).exists()
    (tmp_path / "here").mkdir()
    with uri.local_folder_copy(str(tmp_path / "here")) as local:
        assert local == str(tmp_path / "here")
    assert (tmp_path / "here").exists()


def test_tallies_by_path_come_back_and_are_checked(tmp_path: Path) -> None:
    folder = EvaluationFolder(str(tmp_path), "run")
    tallies = {"math/add": {"acc,none": Tally(right=1.5, asked=2)}}
    folder.write("student", "t-0a", {**RECORD, CONCEPTS: stored_concepts(tallies)})
    (record,) = folder.records()
    assert concepts_of(record) == tallies
    assert concepts_of(RECORD) == {}
    wrong: tuple[tuple[Any, str], ...] = (
        ({"a": {"acc": {"right": 3, "asked": 2}}}, "are no tally"),
        ({"a": {"acc": {"right": 1, "asked": 0}}}, "asked"),
        ({"a": {"acc": {"right": 1, "asked": 2, "more": 1}}}, "more"),
        ({"a/ /b": {}}, "is no path of questions"),
        ([1], "concepts"),
    )
    for concepts, message in wrong:
        folder.write("student", "t-0a", {**RECORD, CONCEPTS: concepts})
        with pytest.raises(StoreDamagedError, match=message):
            folder.records()
        assert folder.find("teacher", "t-0a") is None
