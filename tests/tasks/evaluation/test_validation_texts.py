"""The texts that completions are cut from are those that the gap is measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storage.corpus.domain import DomainConfig
from storage.corpus.files import resolve_files
from tasks.evaluation.validation_texts import ValidationTexts
from tasks.packing.tokenizing import tokenize_documents


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def write(path: Path, count: int = 40) -> str:
    rows = [{"text": f"text {i} of {path.stem}", "lang": "ab"[i % 2] + "/x", "ask": f"{i}? "} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("path_field", [None, "lang"])
@pytest.mark.parametrize("prompt_field", [None, "ask"])
def test_they_are_the_validation_documents(
    tmp_path: Path, held_out: bool, path_field: str | None, prompt_field: str | None
) -> None:
    train, other = write(tmp_path / "train.jsonl"), write(tmp_path / "valid.jsonl", 10)
    split = {"validation_fraction": 0.3} if held_out else {"validation": [other]}
    corpus = DomainConfig(train=[train], path_field=path_field, path_depth=None, prompt_field=prompt_field, **split)
    texts = ValidationTexts(str(tmp_path / "root"), {"code": corpus})
    assert texts.names == (["code"] if path_field is None else ["code/a/x", "code/b/x"])
    for name in texts.names:
        documents = tokenize_documents(
            resolve_files(corpus.validation or corpus.train, name),
            corpus,
            "validation",
            Letters(),
            domain=name,
            path=name.partition("/")[2] or None,
        )
        expected = ["".join(map(chr, document.ids)) for document in documents]
        found = texts.read(name, 99)
        assert found == expected
        assert all(("?" in text) == (prompt_field is not None) for text in found)
        assert 0 < len(found) < 40
        assert texts.read(name, 2) == found[:2]


def test_domains_of_predictions_have_no_texts(tmp_path: Path) -> None:
    rows = DomainConfig(train=["x.parquet"], validation=["y.parquet"], targets="topk")
    assert ValidationTexts(str(tmp_path), {"rows": rows}).names == []
