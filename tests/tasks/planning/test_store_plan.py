"""What of the configuration decides where a domain's blocks lie."""

# ruff: noqa: S106
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizers import END, byte_tokenizer
from tiny_model import make_tiny_model

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.train_config import StudentConfig
from storage.corpus.domain import DomainConfig
from storage.fingerprint import fingerprint
from storage.stores.layout import FORMAT_VERSION
from tasks.planning.store_plan import StorePlan, plan_stores
from tasks.teachers.config import TeacherConfig

Planner = Callable[..., StorePlan]


@pytest.fixture
def planner(tmp_path: Path, teacher_folder: str) -> Planner:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "prompt": "p"}\n')
    (tmp_path / "v.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "t.txt").write_text("three\n")

    def plan(**domain: Any) -> StorePlan:
        values = {
            "train": "a.jsonl",
            **({} if "validation_fraction" in domain else {"validation": "v.jsonl"}),
            **domain,
        }
        for split in {"train", "validation"} & set(values):
            values[split] = str(tmp_path / values[split])
        teacher = TeacherConfig(model=teacher_folder, k=4, dtype="float32")
        domains = {"mine": DomainConfig.model_validate(values)}
        return plan_stores(str(tmp_path / "root"), domains, PackingConfig(seq_len=7), teacher)["mine"]

    return plan


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ({}, "53389f9584e40751"),
        ({"validation_fraction": 0.5, "max_train_blocks": 3}, "ee6202cd331055aa"),
        ({"targets": "topk"}, "9d43fbcd395b2886"),
    ],
)
def test_what_a_domain_does_not_say_is_not_in_its_address(
    planner: Planner, domain: dict[str, Any], expected: str
) -> None:
    """As before there were prompts, but for the tokenizer's files, which are the quickstart's, and the format."""
    inputs = planner(**domain).blocks_inputs
    assert fingerprint({**inputs, "tokenizer": None, "format": 1}) == expected
    assert inputs["format"] == FORMAT_VERSION
    assert "prompt" not in json.dumps(inputs)


def test_a_prompt_makes_another_store(planner: Planner) -> None:
    plain, marked, other = planner(), planner(prompt_field="prompt"), planner(prompt_field="question")
    assert len({store.blocks_url for store in (plain, marked, other)}) == 3
    assert len({store.targets_url for store in (plain, marked, other)}) == 3
    assert marked.blocks_inputs["corpus"]["prompt_field"] == "prompt"
    assert ("marked" in plain.blocks_inputs, "marked" in marked.blocks_inputs) == (False, True)
    assert marked.blocks_dims == {**plain.blocks_dims, "marked": 1}
    # The teacher is asked at every position, whatever of it will count.
    assert marked.targets_dims == plain.targets_dims


@pytest.mark.parametrize("files", [{"train": "t.txt"}, {"validation": "t.txt"}])
def test_a_prompt_and_text_files_are_refused_at_once(planner: Planner, files: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"domain 'mine': .*t\.txt holds plain text, which has no field 'prompt'"):
        planner(**files, prompt_field="prompt")
    assert planner(**files).corpus.prompt_field is None


def test_what_documents_begin_and_end_with_is_in_the_fingerprint_where_it_differs(tmp_path: Path) -> None:
    """And nothing else of the student is: students with one EOS share blocks and targets."""
    turns = ["<bos>", "<|im_end|>"]
    teacher, plain, chat, other = (
        byte_tokenizer(tmp_path / name, added=turns, eos_token=eos)
        for name, eos in (("teacher", "<|im_end|>"), ("plain", END), ("chat", "<|im_end|>"), ("other", END))
    )
    make_tiny_model(Path(teacher), rows=259, context=16)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "v.jsonl").write_text('{"text": "two"}\n')

    def inputs(student: str | None, *, bos: str | None = None, **domain: str) -> tuple[str, str]:
        byte_tokenizer(tmp_path / "teacher", added=turns, eos_token="<|im_end|>", before=[bos] if bos else [])
        config = {"train": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "v.jsonl"), **domain}
        store = plan_stores(
            str(tmp_path / "root"),
            {"mine": DomainConfig.model_validate(config)},
            PackingConfig(seq_len=7),
            TeacherConfig(model=teacher, k=4, dtype="float32"),
            student=StudentConfig(model=student) if student else None,
        )["mine"]
        tokenizer = {name: value for name, value in store.blocks_inputs["tokenizer"].items() if name != "files"}
        blocks = fingerprint({**store.blocks_inputs, "tokenizer": tokenizer})
        return blocks, "marked" if store.blocks_inputs.get("marked") else "plain"

    assert inputs(plain) == inputs(other)
    assert inputs(chat) == inputs(None)
    assert inputs(plain) != inputs(chat)
    assert inputs(plain, bos="<bos>") != inputs(plain)
    assert inputs(plain)[1] == "plain"
    assert inputs(plain, bos="<bos>")[1] == "marked"
    assert inputs(plain, special_tokens="control") != inputs(plain) == inputs(plain, special_tokens="text")
    rows = {"targets": "topk"}
    assert inputs(plain, bos="<bos>", **rows) == inputs(chat, **rows), "rows of tokens are read as they are"


def test_choosing_blocks_changes_no_store_and_choosing_records_does(planner: Planner) -> None:
    plain = planner()
    chosen = planner(select={"by": "difference", "keep": 0.3})
    assert (chosen.blocks_url, chosen.targets_url) == (plain.blocks_url, plain.targets_url)
    by_field = [planner(select={"by": "field", "field": "q", "at_least": least}) for least in (0.5, 0.6)]
    assert len({store.blocks_url for store in (plain, *by_field)}) == 3
