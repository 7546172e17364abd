from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ddk.errors import UserError
from ddk.packing import pack
from storage.corpus.domain import DomainConfig
from storage.corpus.files import CorpusFile, resolve_files
from tasks.packing import tokenizing as module
from tasks.packing.tokenizing import tokenize_documents

WORDS = [f"w{number}" for number in range(200)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({"<eos>": 0, **{word: at for at, word in enumerate(WORDS, start=1)}}))
    backend.normalizer = Replace("unheard", "")
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4)


@pytest.fixture
def files(tmp_path: Path) -> list[CorpusFile]:
    """200 documents in two files: document w5 is 'w5 w5 w5 w5 w5' and lies in the first."""
    for name, words in (("a.jsonl", WORDS[:120]), ("b.jsonl", WORDS[120:])):
        lines = [json.dumps({"text": " ".join([word] * int(word[1:]))}) for word in words]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return resolve_files([f"{tmp_path}/*.jsonl"], "words")


def config(fraction: float = 0.0) -> DomainConfig:
    split = {"validation_fraction": fraction} if fraction else {"validation": ["elsewhere.jsonl"]}
    return DomainConfig.model_validate({"train": "*.jsonl", **split})


def run(files, tokenizer, split="train", fraction=0.0, **options):
    return list(tokenize_documents(files, config(fraction), split, tokenizer, domain="words", **options))


@pytest.mark.parametrize("batch_documents", [1, 7, 256])
def test_documents_come_whole_and_in_order(files, tokenizer, batch_documents: int) -> None:
    documents = run(files, tokenizer, batch_documents=batch_documents)
    # w0 is repeated 0 times: an empty text
    assert [document.key for document in documents] == [(0, record) for record in range(1, 120)] + [
        (1, n) for n in range(80)
    ]
    for number, document in enumerate(documents, start=1):
        assert document.ids.dtype == np.int32
        assert document.ids.tolist() == [number + 1] * number
        assert document.loss is None


def test_truncation_and_padding_left_on_are_turned_off(files, tokenizer) -> None:
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=500)
    assert [len(document.ids) for document in run(files, tokenizer)] == list(range(1, 200))


def test_the_two_splits_share_nothing_and_leave_nothing_out(files, tokenizer) -> None:
    train = [document.key for document in run(files, tokenizer, "train", 0.25)]
    validation = [document.key for document in run(files, tokenizer, "validation", 0.25)]
    assert set(train).isdisjoint(validation)
    assert sorted(train + validation) == [document.key for document in run(files, tokenizer)]
    assert 25 <= len(validation) <= 75
    other = tokenize_documents(files, config(0.25), "validation", tokenizer, domain="other words")
    assert [document.key for document in other] != validation


def test_a_document_without_tokens_is_skipped(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("w1\n\nunheard\n\nw2\n")
    files = resolve_files([f"{tmp_path}/a.txt"], "words")
    documents = run(files, tokenizer)
    assert [(document.key, document.ids.tolist()) for document in documents] == [((0, 0), [2]), ((0, 4), [3])]


PROMPTED = [
    ("w1 w2", "w3", [2, 3, 4], 2),
    ("", "w4 w5", [5, 6], 0),
    (None, "w6", [7], 0),
    ("w7", "unheard", None, None),  # nothing follows the prompt: no document
    ("w8", "  ", None, None),
    ("unheard", "w9", [10], 0),
    ("w10", "w11", [11, 12], 1),
]
"""Prompt, text, the tokens of both, and how many are the prompt's."""


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("batch_documents", [1, 2, 256])
def test_a_prompts_tokens_come_before_the_texts(tmp_path: Path, tokenizer, suffix: str, batch_documents: int) -> None:
    records = [{"question": prompt, "answer": text} for prompt, text, _, _ in PROMPTED]
    if suffix == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    config = DomainConfig(train=["a"], validation=["elsewhere.jsonl"], text_field="answer", prompt_field="question")
    files = resolve_files([f"{tmp_path}/a.{suffix}"], "chat", config.fields)
    documents = list(
        tokenize_documents(files, config, "train", tokenizer, domain="chat", batch_documents=batch_documents)
    )
    expected = [((0, n), ids, prompt) for n, (_, _, ids, prompt) in enumerate(PROMPTED) if ids is not None]
    assert [
        (one.key, one.ids.tolist(), 0 if one.loss is None else int((~one.loss).sum())) for one in documents
    ] == expected
    assert all(one.ids.dtype == np.int32 for one in documents)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packing_resumes_from_a_cursor(files, tokenizer, split: str) -> None:
    blocks = list(pack(run(files, tokenizer, split, 0.25), 31, 0))
    assert len(blocks) > 60
    for number in (0, 7, len(blocks) // 2, len(blocks) - 1):
        cursor = blocks[number].next
        documents = run(files, tokenizer, split, 0.25, start=cursor.document, batch_documents=5)
        resumed = list(pack(documents, 31, 0, start=cursor))
        assert [one.tokens.tolist() for one in resumed] == [one.tokens.tolist() for one in blocks[number + 1 :]]
        assert [one.next for one in resumed] == [one.next for one in blocks[number + 1 :]]


@pytest.mark.parametrize("start", [(0, 0), (0, 60), (1, 3)])
def test_progress_sums_to_the_files_sizes(files, tokenizer, start) -> None:
    heard: list[int] = []
    run(files, tokenizer, start=start, on_progress=heard.append)
    assert sum(heard) == sum(file.size for file in files)
    assert all(size > 0 for size in heard)


def test_a_batch_of_long_documents_is_closed_early(files, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = module._Texts.__call__
    monkeypatch.setattr(
        module._Texts, "__call__", lambda self, batch: sizes.append(len(batch)) or original(self, batch)
    )
    monkeypatch.setattr(module, "MAX_BATCH_CHARACTERS", 1000)
    assert len(run(files, tokenizer)) == 199
    assert len(sizes) > 50
    assert sum(sizes) == 199


def test_a_broken_file_stops_the_stream(files, tokenizer) -> None:
    with open(files[1].url, "a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 81: broken JSON"):
        run(files, tokenizer)


def tokenizing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenize")]


def test_abandoning_the_stream_leaves_no_thread(files, tokenizer) -> None:
    stream = tokenize_documents(files, config(), "train", tokenizer, domain="words", batch_documents=3)
    next(stream)
    assert len(tokenizing_threads()) == 1
    stream.close()
    assert tokenizing_threads() == []


def test_a_tokenizer_without_rust_is_called_as_such(files) -> None:
    def slow(texts: list[str], *, add_special_tokens: bool, split_special_tokens: bool, return_attention_mask: bool):
        assert (add_special_tokens, split_special_tokens, return_attention_mask) == (False, True, False)
        return {"input_ids": [[len(text)] for text in texts]}

    documents = run(files, slow)
    assert documents[0].ids.tolist() == [2]
    assert documents[0].ids.dtype == np.int32
    assert len(documents) == 199


@pytest.mark.parametrize("by_path", [False, True])
def test_records_below_the_threshold_are_not_packed_for_training(tmp_path: Path, tokenizer, by_path: bool) -> None:
    lines = [{"text": f"w{n} w{n}", "quality": n / 10, "path": "x"} for n in range(1, 11)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    chosen = DomainConfig.model_validate(
        {
            "train": "*.jsonl",
            "validation_fraction": 0.4,
            "select": {"by": "field", "field": "quality", "at_least": 0.6},
            **({"path_field": "path"} if by_path else {}),
        }
    )
    files = resolve_files([f"{tmp_path}/*.jsonl"], "words")
    found = {
        split: [
            document.ids[0] - 1
            for document in tokenize_documents(
                files, chosen, split, tokenizer, domain="words", path="x" if by_path else None
            )
        ]
        for split in ("train", "validation")
    }
    assert min(found["train"]) >= 6
    assert set(found["train"]) == set(range(6, 11)) - set(found["validation"])
    assert min(found["validation"]) < 6, "the gap is measured on all"
