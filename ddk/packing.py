"""From documents to blocks: append EOS to each document, lay them end to end, cut every L + 1 tokens.

    documents   [5 6 7] [8] [9 9 9]        EOS = 0, L = 3
    stream       5 6 7 0 8 0 9 9 9 0
    blocks      [5 6 7 0] [8 0 9 9]        the remainder, [9 0], is shorter than a block and is dropped

Blocks do not overlap: each is L + 1 tokens and yields L predictions. With every block comes a `Cursor`, the place in
the documents where the next one begins, so that packing which was stopped goes on without reading what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ddk.types import Int32Array

Key = TypeVar("Key")


class PackingConfig(BaseModel):
    """How token streams are cut into blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    seq_len: int = Field(default=1024, ge=1)
    """Predictions in a block, which holds one token more. Teacher and student must both take sequences this long."""

    @property
    def block_tokens(self) -> int:
        """Tokens in a block: seq_len + 1."""
        return self.seq_len + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor(Generic[Key]):
    """A place between two tokens of the stream."""

    document: Key
    """Key of the document that holds the last token packed."""
    offset: int
    """Tokens of that document, its EOS included, that are packed already: at least 1. All of them where a block ends
    with the document; the next token is then the following document's first (which is not looked up ahead)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBlock(Generic[Key]):
    """A full block and the place where the next one begins."""

    tokens: Int32Array
    """Token ids [L + 1]."""
    next: Cursor[Key]


def pack(
    documents: Iterable[tuple[Key, Int32Array]],
    seq_len: int,
    eos_id: int,
    start: Cursor[Key] | None = None,
) -> Iterator[PackedBlock[Key]]:
    """Blocks of seq_len + 1 tokens from (key, token ids [n] int32 without EOS) pairs. Keys must be distinct.

    To resume behind a block, give its `next` as `start`, and the documents from `start.document` on: the blocks that
    follow are those that uninterrupted packing would have given.

    Raises:
        ValueError: the documents do not begin with the start's, that document is shorter than the start's offset, or
            a document is not a one-dimensional int32 array.
    """
    block = np.empty(seq_len + 1, dtype=np.int32)
    filled = 0
    for key, stream, skipped in _streams(documents, eos_id, start):
        position = skipped
        while position < len(stream):
            taken = min(len(block) - filled, len(stream) - position)
            block[filled : filled + taken] = stream[position : position + taken]
            filled, position = filled + taken, position + taken
            if filled == len(block):
                yield PackedBlock(tokens=block, next=Cursor(document=key, offset=position))
                block, filled = np.empty_like(block), 0


def _streams(
    documents: Iterable[tuple[Key, Int32Array]], eos_id: int, start: Cursor[Key] | None
) -> Iterator[tuple[Key, Int32Array, int]]:
    """Each document's key, its tokens with EOS, and how many of them are packed already."""
    expected = start
    for key, ids in documents:
        if ids.ndim != 1 or ids.dtype != np.int32:
            raise ValueError(f"document {key} is {ids.dtype} of shape {ids.shape}; packing takes one-dimensional int32")
        stream = np.append(ids, np.int32(eos_id))
        if expected is None:
            yield key, stream, 0
            continue
        if key != expected.document:
            raise ValueError(
                f"packing was to go on in document {expected.document}, and the documents begin with {key}: "
                "the corpus is not the one that was being packed"
            )
        if not 0 <= expected.offset <= len(stream):
            raise ValueError(
                f"packing was to go on at token {expected.offset} of document {key}, which has {len(stream)}: "
                "the corpus or the tokenizer is not the one that was being packed"
            )
        yield key, stream, expected.offset
        expected = None
    if expected is not None:
        raise ValueError(f"packing was to go on in document {expected.document}, and there is no such document")
