"""Encodes texts as token ids, so that plain text is not mistaken for control tokens.

If a text spells a control token (`<s>` is HTML's strike-through, and manuals write `<|endoftext|>`), it is encoded as
ordinary text. In a domain whose texts are chats with an applied template (`special_tokens: control`), it becomes the
token.

Control tokens are those that the tokenizer calls special, and other added tokens that are written like them
(`<|im_start|>`, `<think>`, `[INST]`) and are not in its base vocabulary; many tokenizers do not call these special. All
other added tokens are ordinary vocabulary: runs of spaces, the tags that Gemma reads in HTML.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ddk.errors import UserError
from ddk.values import BoolArray, Int32Array, Int64Array

_BRACKETED = re.compile(r"<\S+>|\[\S+\]")


class TextEncoder:
    """Encodes texts without what a tokenizer puts before or behind them.

    Args:
        tokenizer: a Hugging Face tokenizer, best a fast one, which is then this object's own: truncation and padding
            that it may have set are turned off.
        control: whether a text that spells a control token holds that token.
        spelled_is_token: of conversations (`tasks.packing.chat`), whether that is so of what is said in a turn too.
    """

    def __init__(self, tokenizer: Any, *, control: bool, spelled_is_token: bool = False) -> None:
        self._tokenizer, self._control = tokenizer, control
        self.spelled: str | None = None
        """The first control token that a text has spelled and that has stayed text."""
        self.special: re.Pattern[str] | None = None
        """Matches the spelling of a token that the tokenizer itself calls special; None where there is none, or where a
        text that spells one holds it."""
        self.control_tokens: tuple[str, ...] = ()
        """Spellings, the longest first."""
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            return
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        tokens = _control_tokens(self._backend)
        special = [token.content for token in tokens.values() if token.special]
        for token in tokens.values():
            if not token.special:  # the tokenizer passes over special ones alone
                token.special = True
                self._backend.add_special_tokens([token])
        self._backend.encode_special_tokens = not control
        # One more than there are, for all ids beyond them.
        self._is_control = np.zeros(max(tokens, default=-1) + 2, dtype=np.bool_)
        self._is_control[list(tokens)] = True
        self.control_tokens = tuple(_longest_first(token.content for token in tokens.values()))
        self._spelled = _any_of(self.control_tokens)
        if special and not spelled_is_token:
            self.special = _any_of(_longest_first(special))

    def __call__(self, texts: Sequence[str]) -> list[Int32Array]:
        """Token ids of each text.

        Raises:
            UserError: a text spells a control token, and the tokenizer cannot but take it for that.
        """
        if self._backend is None:
            found = self._tokenizer(
                list(texts),
                add_special_tokens=False,
                split_special_tokens=not self._control,
                return_attention_mask=False,
            )
            return [np.asarray(ids, dtype=np.int32) for ids in found["input_ids"]]
        # By the Rust tokenizer itself, past the wrapper's masks and length warnings.
        encoded = self._encode(texts)
        if self._control:
            return encoded
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
            if self._holds_control(ids).any():
                encoded[number] = self._encode_by_parts(text)
            if self.spelled is None and (match := self._spelled.search(text)):
                self.spelled = match[0]
        return encoded

    def with_starts(self, text: str) -> tuple[Int32Array, Int64Array]:
        """Token ids [n] of a text, and the character [n] at which each token begins."""
        encoding = self._with_offsets(text)
        starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding.ids))
        return np.asarray(encoding.ids, dtype=np.int32), starts

    def as_text(self, text: str) -> Int32Array:
        """Token ids of a text that spells a control token, and is meant to stay text."""
        self._backend.encode_special_tokens = True
        try:
            (ids,) = self._encode([text])
            return self._encode_by_parts(text) if self._holds_control(ids).any() else ids
        finally:
            self._backend.encode_special_tokens = not self._control

    def _with_offsets(self, text: str) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except Exception as error:  # all that the library raises
            raise _unencodable(error) from error

    def _encode(self, texts: Sequence[str]) -> list[Int32Array]:
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # all that the library raises
            raise _unencodable(error) from error
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _holds_control(self, ids: Int32Array) -> BoolArray:
        found: BoolArray = self._is_control[np.minimum(ids, len(self._is_control) - 1)]
        return found

    def _encode_by_parts(self, text: str) -> Int32Array:
        """Of a text that holds control tokens even so: a vocabulary of unigrams or words has them among its own. Cut
        within each spelling, and encoded part by part, it spells none."""
        whole = self._backend.encode(text, add_special_tokens=False)
        held = self._holds_control(np.asarray(whole.ids, dtype=np.int32)).nonzero()[0]
        spans = [whole.offsets[index] for index in held]
        cuts = [0, *((start + end) // 2 for start, end in spans), len(text)]
        ids = np.concatenate(self._encode([text[cut:end] for cut, end in itertools.pairwise(cuts)]))
        if self._holds_control(ids).any():
            start, end = spans[0]
            raise UserError(
                f"a text spells the control token {whole.tokens[held[0]]!r} (in {text[max(0, start - 20) : end + 20]!r}"
                f"), and the tokenizer cannot encode that as text; remove it from the corpus, or set the domain's "
                f"special_tokens: control if the token itself is meant"
            )
        return ids


def _unencodable(error: Exception) -> UserError:
    return UserError(f"the tokenizer cannot encode a text of the corpus ({error}); is the model's folder complete?")


def _longest_first(spellings: Iterable[str]) -> list[str]:
    """So that a token is found before one that it begins with."""
    return sorted(spellings, key=len, reverse=True)


def _any_of(spellings: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, spellings)) or "(?!)")


def _control_tokens(backend: Any) -> dict[int, Any]:
    """By id. What the tokenizer writes for what it does not know is none: any text may hold it."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    try:
        unknown = {*backend.encode("\ue000 \U000f0000", add_special_tokens=False).ids}  # which no vocabulary has
    except Exception:  # all that the library raises: it has no token for what it does not know
        unknown = set()
    return {
        index: token
        for index, token in backend.get_added_tokens_decoder().items()
        if token.content
        and token.content != getattr(backend.model, "unk_token", None)
        and index not in unknown
        and (token.special or (_BRACKETED.fullmatch(token.content) and token.content not in vocabulary))
    }
