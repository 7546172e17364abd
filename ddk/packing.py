"""From documents to blocks: append EOS to each document, concatenate them, cut every L + 1 tokens.

    documents   [5 6 7] [8] [9 9 9]        EOS = 0, L = 3
    stream       5 6 7 0 8 0 9 9 9 0
    blocks      [5 6 7 0] [8 0 9 9]        the remainder, [9 0], is shorter than a block and is dropped

Blocks do not overlap: each has L + 1 tokens and yields L predictions. Every block comes with a `Cursor`, the place in
the documents where the next block begins, so that interrupted packing resumes without reading the earlier documents
again.

Of a document some tokens, such as those of a prompt, may carry no loss. They are packed like all others and marked.
The mark belongs to the token that is predicted. As position j of a block predicts its token j + 1, the marks of the
positions are the block's marks from the second on:

    document     [5 6 7 8] of which [5 6] is the prompt, L = 4
    tokens        5 6 7 8 0
    loss          0 0 1 1 1       EOS counts: it ends what follows the prompt
    positions       0 1 1 1       position 0 predicts 6, within the prompt

If the models read every text after a BOS (as Llama, Gemma and Mistral do), each document begins with BOS, and so does
each block that begins within a document, because a model that has never seen a sequence without BOS predicts nonsense
there. Predicting BOS carries no loss:

    documents    [5 6 7 8 9] [4 4], BOS = 1, L = 4
    blocks       1 5 6 7 8    1 9 0 1 4
    loss         0 1 1 1 1    0 1 1 0 1

A document that is to stay whole, a conversation, begins a new block where it does not fit what is left of the one
before. What is left is filled with EOS, which carries no loss there. It ends as it says itself, without EOS. Only one
that is longer than a block is cut:

    documents    [5 6 7] [8 8] [9 9 9 9 9 9], whole, EOS = 0, L = 4
    blocks       5 6 7 8 8    9 9 9 9 9    9 0 0 0 0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from pydantic import Field

from ddk.section import Section
from ddk.values import BoolArray, Int32Array

Key = TypeVar("Key")


class PackingConfig(Section):
    """How token streams are cut into blocks."""

    seq_len: int = Field(default=1024, ge=1, le=2**24)
    """Number of predictions in a block; the block holds one token more. Teacher and student must both accept sequences
    of this length."""
    bos: Literal["auto", "never", "always"] = "auto"
    """Whether the BOS token is put at the start of each document, and of each block that begins within a document.
    'auto' does so if the teacher's tokenizer puts it before every text, as those of Llama, Gemma and Mistral do.
    Predicting BOS carries no loss."""
    eos: str | None = Field(default=None, min_length=1)
    """The token that ends each document, such as '<|endoftext|>'. If empty, the token at which the student stops
    generating; the EOS of a chat teacher may be another."""


@dataclass(frozen=True, slots=True)
class Document(Generic[Key]):
    """A document as token ids."""

    key: Key
    """Where it lies; no two documents share one."""
    ids: Int32Array
    """Token ids [n], without BOS and EOS; with what ends it where it is whole."""
    loss: BoolArray | None = None
    """[n], whether predicting the token carries loss; None: all do."""
    whole: bool = False
    """Whether it is to lie in one block, if it is no longer than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor(Generic[Key]):
    """A place between two tokens of the stream."""

    document: Key
    """Key of the document that holds the last token packed."""
    offset: int
    """Tokens of that document, its BOS and EOS included, that are packed already: at least 1. All of them where a block
    ends with the document; the next token is then the following document's first (which is not looked up ahead). A BOS
    that was put before the rest of a document, where a block began within it, does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBlock(Generic[Key]):
    """A full block and the place where the next one begins."""

    tokens: Int32Array
    """Token ids [L + 1]."""
    loss: BoolArray
    """[L + 1], whether predicting the token carries loss: false for those of a prompt, and for BOS."""
    next: Cursor[Key]


def pack(
    documents: Iterable[Document[Key]],
    seq_len: int,
    eos_id: int,
    start: Cursor[Key] | None = None,
    bos_ids: Sequence[int] = (),
) -> Iterator[PackedBlock[Key]]:
    """Blocks of seq_len + 1 tokens from documents.

    To resume behind a block, give its `next` as `start`, and the documents from `start.document` on: the blocks that
    follow are those that uninterrupted packing would have given.

    Args:
        bos_ids: what each document and each block begins with. A document that begins with it already gets none.

    Raises:
        ValueError: the documents do not begin with the start's, that document is shorter than the start's offset, a
            document is not a one-dimensional int32 array, or its marks are not as many, or a block has room for
            `bos_ids` alone.
    """
    bos = np.asarray(bos_ids, dtype=np.int32)
    if len(bos) > seq_len:
        raise ValueError(f"a block of {seq_len + 1} tokens has no room behind the {len(bos)} that each begins with")
    block, loss = _empty(seq_len)
    filled = 0
    ends: Cursor[Key] | None = None
    """Behind the last document, if it is whole."""
    for document, stream, marks, skipped in _streams(documents, bos, eos_id, start):
        if ends is not None and filled and document.whole and len(stream) > len(block) - filled:
            yield _filled_up(block, loss, filled, eos_id, ends)
            (block, loss), filled = _empty(seq_len), 0
        position = skipped
        while position < len(stream):
            if filled == 0:
                block[: len(bos)], loss[: len(bos)], filled = bos, False, len(bos)
                position = max(position, len(bos))
            taken = min(len(block) - filled, len(stream) - position)
            block[filled : filled + taken] = stream[position : position + taken]
            loss[filled : filled + taken] = marks[position : position + taken]
            filled, position = filled + taken, position + taken
            if filled == len(block):
                yield PackedBlock(tokens=block, loss=loss, next=Cursor(document=document.key, offset=position))
                (block, loss), filled = _empty(seq_len), 0
        ends = Cursor(document=document.key, offset=len(stream)) if document.whole else None
    if ends is not None and filled:
        yield _filled_up(block, loss, filled, eos_id, ends)


def _empty(seq_len: int) -> tuple[Int32Array, BoolArray]:
    """Tokens yet to be filled in, and their marks."""
    return np.empty(seq_len + 1, dtype=np.int32), np.empty(seq_len + 1, dtype=np.bool_)


def _filled_up(block: Int32Array, loss: BoolArray, filled: int, eos_id: int, ends: Cursor[Key]) -> PackedBlock[Key]:
    """A block that ends before it is full."""
    block[filled:], loss[filled:] = eos_id, False
    return PackedBlock(tokens=block, loss=loss, next=ends)


def _streams(
    documents: Iterable[Document[Key]], bos: Int32Array, eos_id: int, start: Cursor[Key] | None
) -> Iterator[tuple[Document[Key], Int32Array, BoolArray, int]]:
    """Each document, its tokens with BOS and EOS, whether they carry loss, and how many of them are packed already."""
    expected = start
    for document in documents:
        key, ids = document.key, document.ids
        if ids.ndim != 1 or ids.dtype != np.int32:
            raise ValueError(f"document {key} is {ids.dtype} of shape {ids.shape}; packing takes one-dimensional int32")
        own = document.loss if document.loss is not None else np.ones(len(ids), dtype=np.bool_)
        if own.shape != ids.shape:
            raise ValueError(f"document {key} has {len(ids)} tokens, and says of {len(own)} whether they carry loss")
        begun = len(bos) <= len(ids) and np.array_equal(ids[: len(bos)], bos)
        before, behind = len(bos) * (not begun), int(not document.whole)
        stream = np.concatenate([bos[:before], ids, [np.int32(eos_id)] * behind])
        marks = np.concatenate([np.zeros(before, dtype=np.bool_), own, np.ones(behind, dtype=np.bool_)])
        marks[: len(bos)] = False
        if expected is None:
            yield document, stream, marks, 0
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
        yield document, stream, marks, expected.offset
        expected = None
    if expected is not None:
        raise ValueError(f"packing was to go on in document {expected.document}, and there is no such document")
