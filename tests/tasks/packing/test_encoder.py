"""Texts that spell control tokens."""

# ruff: noqa: S106
from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizers import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ddk.errors import UserError
from ddk.student import load_tokenizer
from tasks.packing.encoder import TextEncoder


def as_tokens(tokenizer, text: str, *, control: bool = False) -> list[str]:
    (ids,) = TextEncoder(tokenizer, control=control)([text])
    return tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.fixture
def folder(tmp_path: Path) -> str:
    further = [AddedToken(one, special=False, normalized=False) for one in ("<|im_start|>", "[INST]", "  ", "õ")]
    return byte_tokenizer(tmp_path / "bytes", added=["<s>", *further])


@pytest.mark.parametrize("spelled", ["<s>", "<|endoftext|>", "<|im_start|>", "[INST]"])
def test_text_is_text_and_control_is_control(folder: str, spelled: str) -> None:
    """Also of tokens that the tokenizer does not call special, as those of many chat models are."""
    text = f"a{spelled}b"
    assert as_tokens(load_tokenizer(folder), text) == list(text)
    assert as_tokens(load_tokenizer(folder), text, control=True) == ["a", spelled, "b"]


def test_added_tokens_that_are_vocabulary_stay(folder: str) -> None:
    for control in (False, True):
        assert as_tokens(load_tokenizer(folder), "a  bõ", control=control) == ["a", "  ", "b", "õ"]


def test_what_stayed_text_is_told(folder: str) -> None:
    encode = TextEncoder(load_tokenizer(folder), control=False)
    encode(["a <S> [ INST]"])
    assert encode.spelled is None
    encode(["b", "x [INST]", "<s>"])
    assert encode.spelled == "[INST]"


def test_a_setting_of_the_tokenizer_is_not_asked(tmp_path: Path) -> None:
    folder = byte_tokenizer(tmp_path, added=["<s>"], split_special_tokens=True)
    assert as_tokens(load_tokenizer(folder), "<s>", control=True) == ["<s>"]


def unigrams(**options) -> PreTrainedTokenizerFast:
    """Whose vocabulary holds the control tokens themselves, as sentencepiece's unigram models do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((one, -3.0) for one in "▁ab<s>/")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    for name, value in options.items():
        setattr(backend, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_vocabulary_that_holds_the_token_itself() -> None:
    assert as_tokens(unigrams(), "a<s>b</s>") == ["a", "<", "s", ">", "b", "<", "/", "s", ">"]
    assert as_tokens(unigrams(), "a<s>b", control=True) == ["a", "<s>", "b"]
    assert as_tokens(unigrams(), "aXb") == ["a", "<unk>", "b"]
    wide = unigrams(normalizer=normalizers.NFKC())
    assert as_tokens(wide, "a＜ｓ＞b") == ["a", "<", "s", ">", "b"]


def words(*vocabulary: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_token_that_cannot_be_text_is_refused() -> None:
    assert as_tokens(words("<eos>", "a", "?"), "a <eos> b") == ["a", "?", "?", "?"]
    with pytest.raises(UserError, match=r"cannot encode a text of the corpus \(WordLevel error: .* folder complete\?"):
        as_tokens(words("<eos>", "a"), "a b")
    single = unigrams()
    single.add_special_tokens({"additional_special_tokens": ["b"]})
    with pytest.raises(UserError, match=r"spells the control token 'b' \(in 'aba'\), and the tokenizer cannot encode"):
        as_tokens(single, "aba")
