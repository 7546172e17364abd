"""Long inputs for `ddk eval --context`: sequences of validation documents, and texts with a passkey.

A sequence is the beginning of one document where that is long enough; where there are too few of these, documents that
are shorter follow one another until it is full. None begins within a document.

A passkey stands at some depth in a text that says the same few sentences again and again; at its end it is asked for
(Mohtashami and Jaggi, NeurIPS 2023, 'Landmark Attention').
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ddk.values import Int32Array
from tasks.planning.text_ends import TextEnds

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
_QUESTION = "\nWhat is the pass key? The pass key is"
_LEAST_FILLERS = 2
Encode = Callable[[Sequence[str]], list[Int32Array]]
"""Texts to tokens, without what a tokenizer puts before or behind them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongSequences:
    """Of one domain."""

    tokens_NL1: Int32Array
    """[N, L + 1]."""
    whole: int
    """How many of them, the first ones, lie in one document each."""

    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens_NL1, np.int32).tobytes()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passkey:
    """One text that asks for the passkey in it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def long_sequences(documents: Sequence[Int32Array], ends: TextEnds, length: int, most: int) -> LongSequences | None:
    """The first so many sequences of length + 1 tokens; None where all documents together are too short for one.

    Args:
        documents: as tokens, without what they begin and end with.
    """
    bounded = [np.array([*ends.bos_ids, *document, ends.eos_id], np.int32) for document in documents]
    whole = [document[: length + 1] for document in bounded if len(document) > length][:most]
    short = iter([document for document in bounded if len(document) <= length])
    found = list(whole)
    while len(found) < most and (filled := _filled(short, length)) is not None:
        found.append(filled)
    return LongSequences(tokens_NL1=np.stack(found), whole=len(whole)) if found else None


def _filled(documents: Iterator[Int32Array], length: int) -> Int32Array | None:
    parts, held = [], 0
    for document in documents:
        parts.append(document)
        held += len(document)
        if held > length:
            return np.concatenate(parts)[: length + 1]
    return None


def passkeys(encode: Encode, bos_ids: Sequence[int], length: int, count: int, seed: int) -> list[Passkey]:
    """Texts of at most `length` tokens with their answers, the passkey from the beginning to the end of them.

    Empty where such a length has no room for one.
    """
    random = np.random.default_rng([seed, length])
    found = []
    for number in range(count):
        key = int(random.integers(10_000, 100_000))
        parts = [_INTRODUCTION, _FILLER, _NEEDLE.format(key=key), _QUESTION, f"{_QUESTION} {key}"]
        introduction, filler, needle, question, answered = (part.tolist() for part in encode(parts))
        shared = next((i for i, (a, b) in enumerate(zip(question, answered, strict=False)) if a != b), len(question))
        question, answer = answered[:shared], answered[shared:]
        room = length - sum(map(len, (bos_ids, introduction, needle, question, answer)))
        fillers = room // len(filler)
        if fillers < _LEAST_FILLERS:
            return []
        before = round(fillers * number / max(1, count - 1))
        prompt = [*bos_ids, *introduction, *filler * before, *needle, *filler * (fillers - before), *question]
        found.append(Passkey(prompt=tuple(prompt), answer=tuple(answer)))
    return found
