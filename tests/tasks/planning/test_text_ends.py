"""What documents begin and end with, and which files a tokenizer is made of."""

# ruff: noqa: S106
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from byte_tokenizers import END, byte_tokenizer

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.student import load_tokenizer
from ddk.train_config import StudentConfig
from storage.files.digests import DigestCache
from tasks.planning.models import tokenizer_digests
from tasks.planning.text_ends import TextEnds, text_ends
from tasks.planning.tokenizer_files import has_tokenizer

TURNS = ["<|im_start|>", "<|im_end|>"]  # 257 and 258


def ends(teacher: str, student: str | None = None, **packing: Any) -> TextEnds:
    config = None if student is None else StudentConfig(model=student)
    return text_ends(PackingConfig(**packing), load_tokenizer(teacher), config)


@pytest.mark.parametrize(
    ("before", "after", "config", "expected"),
    [
        ([], [], {}, ()),
        (["<bos>"], [], {"bos_token": "<bos>"}, (257,)),
        (["<bos>"], [END], {}, (257,)),
        ([], [END], {}, ()),
        (["<gmask>", "<bos>"], [], {}, (258, 257)),
        ([], [], {"bos_token": "<bos>"}, ()),
    ],
)
def test_bos_is_what_the_tokenizer_puts_before_a_text(tmp_path: Path, before, after, config, expected) -> None:
    folder = byte_tokenizer(tmp_path, added=["<bos>", "<gmask>"], before=before, after=after, **config)
    assert ends(folder).bos_ids == expected
    assert ends(folder, bos="never").bos_ids == ()
    assert ends(folder).eos_id == 0
    if config.get("bos_token"):
        assert ends(folder, bos="always").bos_ids == (257,)
    elif not expected:
        with pytest.raises(UserError, match=r"packing.bos is 'always', and the teacher's tokenizer has no bos_token"):
            ends(folder, bos="always")


@pytest.mark.parametrize(
    ("setting", "expected"), [({"add_bos_token": True}, (0,)), ({"add_bos_token": False}, ()), ({}, ())]
)
def test_bos_by_a_setting_of_the_tokenizer(tmp_path: Path, setting: dict[str, bool], expected: tuple[int, ...]) -> None:
    kind = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "add_eos_token": True}
    assert ends(byte_tokenizer(tmp_path, as_json=False, **kind, **setting)).bos_ids == expected


def stops(folder: str, ids: Any, name: str = "generation_config.json") -> str:
    (Path(folder) / name).write_text(json.dumps({"eos_token_id": ids}))
    return folder


def test_eos_is_the_students(tmp_path: Path) -> None:
    teacher = byte_tokenizer(tmp_path / "teacher", added=TURNS, eos_token="<|im_end|>")
    student = byte_tokenizer(tmp_path / "student", added=TURNS)
    found = ends(teacher, student)
    assert (found.eos_id, found.warning) == (0, "")
    assert found.said == "end with <|endoftext|> (0), the student's (the teacher's end of text is <|im_end|> (258))"
    assert (ends(teacher).eos_id, ends(teacher).said) == (258, "")
    assert ends(teacher, student, eos="<|im_start|>").eos_id == 257
    with pytest.raises(UserError, match=r"packing.eos is '</s>', which is no token .*; its own end of text is '<\|im_"):
        ends(teacher, student, eos="</s>")
    absent = ends(teacher, str(tmp_path / "none"))
    assert absent.eos_id == 258
    assert "the teacher's end of text, which may differ from the student's (student.model is " in absent.warning
    other = byte_tokenizer(tmp_path / "other", added=["</s>"], eos_token="</s>")
    assert ends(teacher, other).eos_id == 258, "a pair that does not fit is refused elsewhere"


def test_eos_of_a_student_that_names_none_is_where_it_stops(tmp_path: Path) -> None:
    teacher = byte_tokenizer(tmp_path / "teacher", added=TURNS, eos_token="<|im_end|>")
    bare = tmp_path / "bare"
    bare.mkdir()
    assert not has_tokenizer(str(bare))
    assert ends(teacher, str(bare)).eos_id == 258
    assert ends(teacher, stops(str(bare), [0, 258])).eos_id == 258, "the teacher's, for it stops there too"
    assert ends(teacher, stops(str(bare), [0, 257])).eos_id == 0
    unnamed = byte_tokenizer(tmp_path / "unnamed", added=TURNS, eos_token=None)
    with pytest.raises(UserError, match=r"has no eos_token, which ends documents; name the token \(packing.eos\)"):
        ends(unnamed)
    assert ends(stops(unnamed, 257, "config.json")).eos_id == 257
    assert ends(teacher, unnamed).eos_id == 257
    warned = ends(teacher, stops(byte_tokenizer(tmp_path / "student", added=TURNS), [258]))
    assert warned.eos_id == 0
    assert (
        "by its generation_config.json the student stops at <|im_end|> (258): it would continue after" in warned.warning
    )


def digest(folder: str, tmp_path: Path) -> dict[str, str]:
    return tokenizer_digests(folder, DigestCache(str(tmp_path / "digests.json")))


def sentencepiece_model(folder: Path, text: str, vocab_size: int) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=9,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def test_every_file_of_a_tokenizer_counts(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path / "vocab", as_json=False)
    other = byte_tokenizer(tmp_path / "other", as_json=False, shift=100)
    before = digest(folder, tmp_path)
    assert set(before) == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert load_tokenizer(folder)("x")["input_ids"] != load_tokenizer(other)("x")["input_ids"]
    shutil.copy(f"{other}/vocab.json", folder)
    assert digest(folder, tmp_path) != before
    for name in ("added_tokens.json", "special_tokens_map.json", "qwen.tiktoken", "spiece.model", "tokenizer.model.v3"):
        before = digest(folder, tmp_path)
        (tmp_path / "vocab" / name).write_text("{}")
        assert digest(folder, tmp_path) != before
    before = digest(folder, tmp_path)
    for name in ("chat_template.jinja", "model.safetensors", "README.md", "config.json", "generation_config.json"):
        (tmp_path / "vocab" / name).write_text("{}")
    assert digest(folder, tmp_path) == before


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    folder = sentencepiece_model(tmp_path / "spm", "the meeting begins at nine <b>\n" * 50, 290)
    assert set(digest(folder, tmp_path)) == {"tokenizer.model", "tokenizer_config.json"}
    assert has_tokenizer(folder)
    assert (ends(folder).bos_ids, ends(folder).eos_id) == ((1,), 2)


@pytest.mark.parametrize(
    ("kind", "removed"),
    [
        ("Qwen2Tokenizer", ("vocab.json", "merges.txt")),
        ("Qwen2Tokenizer", ("merges.txt",)),
        ("Qwen2Tokenizer", ("vocab.json",)),
        ("LlamaTokenizer", ("vocab.json", "merges.txt")),
        ("PreTrainedTokenizerFast", ("vocab.json", "merges.txt")),
    ],
)
def test_a_tokenizer_without_its_vocabulary_is_named(tmp_path: Path, kind: str, removed: tuple[str, ...]) -> None:
    folder = byte_tokenizer(tmp_path, as_json=False, tokenizer_class=kind)
    for name in removed:
        (tmp_path / name).unlink()
    with pytest.raises(
        UserError, match=r"the tokenizer of '.*' (cannot be loaded|has no vocabulary).*it needs a tokeni"
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}', '{"version": "1.0", "added_tokens": []}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    folder = byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"the tokenizer of '.*' cannot be loaded \(.+\); it needs a tokenizer.json"):
        load_tokenizer(folder)
