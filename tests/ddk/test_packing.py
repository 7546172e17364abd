from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ddk.packing import Cursor, Document, PackedBlock, PackingConfig, pack

EOS = 0


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def keyed(documents: list[list[int]], prompts: list[int] | None = None) -> list[Document[tuple[int, int]]]:
    lengths = prompts or [0] * len(documents)
    return [
        Document((0, 10 * number), ids(*document), np.arange(len(document)) >= prompt)
        for number, (document, prompt) in enumerate(zip(documents, lengths, strict=True))
    ]


def as_lists(blocks: list[PackedBlock]) -> list[list[int]]:
    return [block.tokens.tolist() for block in blocks]


def marks(blocks: list[PackedBlock]) -> list[list[int]]:
    return [block.loss.astype(int).tolist() for block in blocks]


documents_strategy = st.lists(st.lists(st.integers(1, 200_000), max_size=12), max_size=12)
prompted_strategy = st.lists(
    st.tuples(st.lists(st.integers(1, 200_000), max_size=9), st.lists(st.integers(1, 200_000), max_size=9)), max_size=12
)
"""Prompt and text of each document."""


def test_the_example_of_the_module() -> None:
    blocks = list(pack(keyed([[5, 6, 7], [8], [9, 9, 9]]), 3, EOS))
    assert as_lists(blocks) == [[5, 6, 7, 0], [8, 0, 9, 9]]
    assert [block.next for block in blocks] == [Cursor(document=(0, 0), offset=4), Cursor(document=(0, 20), offset=2)]
    assert all(block.tokens.dtype == np.int32 for block in blocks)


@given(documents=documents_strategy, seq_len=st.integers(1, 20))
def test_blocks_are_the_stream_cut_and_its_remainder_dropped(documents: list[list[int]], seq_len: int) -> None:
    stream = [token for document in documents for token in [*document, EOS]]
    size = seq_len + 1
    expected = [stream[at : at + size] for at in range(0, len(stream) - size + 1, size)]
    assert as_lists(list(pack(keyed(documents), seq_len, EOS))) == expected


@given(documents=documents_strategy, seq_len=st.integers(1, 20))
def test_resuming_at_any_block_gives_the_rest(documents: list[list[int]], seq_len: int) -> None:
    pairs = keyed(documents)
    blocks = list(pack(pairs, seq_len, EOS))
    for number, block in enumerate(blocks):
        rest = [one for one in pairs if one.key >= block.next.document]
        resumed = list(pack(rest, seq_len, EOS, start=block.next))
        assert as_lists(resumed) == as_lists(blocks[number + 1 :])
        assert [one.next for one in resumed] == [one.next for one in blocks[number + 1 :]]


def test_blocks_share_no_memory() -> None:
    first, second = pack(keyed([[1, 2, 3, 4, 5, 6, 7]]), 3, EOS)
    first.tokens[:] = 99
    first.loss[:] = False
    assert second.tokens.tolist() == [5, 6, 7, 0]
    assert second.loss.all()


def test_documents_are_read_no_further_than_needed() -> None:
    def documents():
        yield Document(0, ids(1, 2, 3))
        raise AssertionError("read ahead")

    block = next(pack(documents(), 3, EOS))
    assert block.next == Cursor(document=0, offset=4)


@pytest.mark.parametrize(
    ("documents", "start", "message"),
    [
        ([Document(2, ids(1))], Cursor(document=1, offset=1), r"go on in document 1, and the documents begin with 2"),
        (
            [Document(1, ids(1))],
            Cursor(document=1, offset=3),
            r"at token 3 of document 1, which has 2: the corpus or the tok",
        ),
        ([], Cursor(document=1, offset=0), r"go on in document 1, and there is no such document"),
        (
            [Document(1, np.zeros(2))],
            None,
            r"document 1 is float64 of shape \(2,\); packing takes one-dimensional int32",
        ),
        ([Document(1, np.zeros((2, 1), np.int32))], None, r"document 1 is int32 of shape \(2, 1\)"),
        (
            [Document(1, ids(5, 6), np.ones(3, np.bool_))],
            None,
            "document 1 has 2 tokens, and says of 3 whether they carry loss",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(documents, start, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(pack(documents, 3, EOS, start=start))


def test_the_marks_belong_to_the_tokens_that_are_predicted() -> None:
    """The second prompt, [4 5 6], lies across the border of two blocks, and the third document has none."""
    blocks = list(pack(keyed([[1, 2, 3], [4, 5, 6, 7], [8, 9]], [1, 3, 0]), 4, EOS))
    assert as_lists(blocks) == [[1, 2, 3, 0, 4], [5, 6, 7, 0, 8]]
    assert marks(blocks) == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    # By position j, which predicts token j + 1: 2 3 EOS and not 4; not 6, but 7 EOS 8.
    assert [block.loss[1:].astype(int).tolist() for block in blocks] == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert blocks[0].loss.dtype == np.bool_


@given(documents=prompted_strategy, seq_len=st.integers(1, 20))
def test_marks_are_those_of_the_documents_laid_end_to_end(
    documents: list[tuple[list[int], list[int]]], seq_len: int
) -> None:
    stream: list[tuple[int, int]] = []
    for prompt, text in documents:
        stream += [(token, 0) for token in prompt] + [(token, 1) for token in [*text, EOS]]
    size = seq_len + 1
    expected = [stream[at : at + size] for at in range(0, len(stream) - size + 1, size)]
    given_ = keyed([prompt + text for prompt, text in documents], [len(prompt) for prompt, _ in documents])
    blocks = list(pack(given_, seq_len, EOS))
    assert as_lists(blocks) == [[token for token, _ in block] for block in expected]
    assert marks(blocks) == [[mark for _, mark in block] for block in expected]
    # Where the prompts end changes no token, and no place.
    unmarked = list(pack(keyed([prompt + text for prompt, text in documents]), seq_len, EOS))
    assert as_lists(unmarked) == as_lists(blocks)
    assert [block.next for block in unmarked] == [block.next for block in blocks]
    assert all(block.loss.all() for block in unmarked)
    for number, block in enumerate(blocks):
        rest = [one for one in given_ if one.key >= block.next.document]
        resumed = list(pack(rest, seq_len, EOS, start=block.next))
        assert as_lists(resumed) == as_lists(blocks[number + 1 :])
        assert marks(resumed) == marks(blocks[number + 1 :])


def test_the_example_of_whole_documents() -> None:
    documents = [
        Document(number, ids(*tokens), whole=True) for number, tokens in enumerate([[5, 6, 7], [8, 8], [9] * 6])
    ]
    blocks = list(pack(documents, 4, EOS))
    assert as_lists(blocks) == [[5, 6, 7, 8, 8], [9, 9, 9, 9, 9], [9, 0, 0, 0, 0]]
    assert marks(blocks) == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


@given(
    documents=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=15), max_size=12),
    seq_len=st.integers(3, 12),
    bos=st.sampled_from([(), (200_001,)]),
)
def test_whole_documents_are_cut_only_where_they_are_longer_than_a_block(documents, seq_len: int, bos) -> None:
    """Nothing is lost, and what is filled up carries no loss; and resumed behind each block."""
    size = seq_len + 1
    whole = [
        Document(number, ids(*bos, *tokens), np.arange(len(bos) + len(tokens)) % 3 > 0, whole=True)
        for number, tokens in enumerate(documents)
    ]
    blocks = list(pack(whole, seq_len, EOS, bos_ids=bos))
    stream = [token for block in as_lists(blocks) for token in block if token not in (EOS, *bos)]
    assert stream == [token for tokens in documents for token in tokens]
    for document in whole:
        tokens = document.ids.tolist()
        if len(tokens) <= size:
            assert any(
                block[at : at + len(tokens)] == tokens
                and found[at : at + len(tokens)][len(bos) :] == document.loss.astype(int).tolist()[len(bos) :]
                for block, found in zip(as_lists(blocks), marks(blocks), strict=True)
                for at in range(size - len(tokens) + 1)
            )
    for block, found in zip(as_lists(blocks), marks(blocks), strict=True):
        assert not any(mark for token, mark in zip(block, found, strict=True) if token in (EOS, *bos))
    for number, block in enumerate(blocks):
        rest = [one for one in whole if one.key >= block.next.document]
        resumed = list(pack(rest, seq_len, EOS, start=block.next, bos_ids=bos))
        assert (as_lists(resumed), marks(resumed)) == (as_lists(blocks[number + 1 :]), marks(blocks[number + 1 :]))


def test_config() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        PackingConfig(seq_len=0)
    with pytest.raises(ValidationError, match="Extra inputs"):
        PackingConfig.model_validate({"seq_length": 7})
    assert "Number of predictions in a block" in json.dumps(PackingConfig.model_json_schema())


BOS = (200_001, 200_002)


def test_the_example_with_bos() -> None:
    blocks = list(pack(keyed([[5, 6, 7, 8, 9], [4, 4]]), 4, EOS, bos_ids=(1,)))
    assert as_lists(blocks) == [[1, 5, 6, 7, 8], [1, 9, 0, 1, 4]]
    assert marks(blocks) == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 1]]


@given(prompted=prompted_strategy, seq_len=st.integers(2, 20), length=st.integers(0, 2))
def test_every_document_and_every_block_begins_with_bos(prompted, seq_len: int, length: int) -> None:
    """By hand, a token at a time; and resumed behind each block. A document that has its BOS already gets no other."""
    bos = list(BOS[:length])
    texts = [prompt + text for prompt, text in prompted]
    blocks, marked = [[]], [[]]
    for (prompt, _), text in zip(prompted, texts, strict=True):
        rest = [(token, 0) for token in bos] + [
            (token, int(at >= len(prompt))) for at, token in enumerate([*text, EOS])
        ]
        while rest:
            if not blocks[-1]:
                # A BOS that the block before has a part of is not gone on with: the block begins with a whole one.
                rest = [one for one in rest if one[0] not in bos]
                blocks[-1], marked[-1] = list(bos), [0] * length
            token, mark = rest.pop(0)
            blocks[-1].append(token)
            marked[-1].append(mark)
            if len(blocks[-1]) == seq_len + 1:
                blocks.append([])
                marked.append([])
    documents = keyed(texts, [len(prompt) for prompt, _ in prompted])
    found = list(pack(documents, seq_len, EOS, bos_ids=bos))
    assert (as_lists(found), marks(found)) == (blocks[:-1], marked[:-1])
    for number, block in enumerate(found):
        rest_of_them = [one for one in documents if one.key >= block.next.document]
        resumed = list(pack(rest_of_them, seq_len, EOS, start=block.next, bos_ids=bos))
        assert (as_lists(resumed), marks(resumed)) == (as_lists(found[number + 1 :]), marks(found[number + 1 :]))
    begun = keyed([bos + text for text in texts], [0 if not prompt else length + len(prompt) for prompt, _ in prompted])
    again = list(pack(begun, seq_len, EOS, bos_ids=bos))
    assert (as_lists(again), marks(again)) == (as_lists(found), marks(found))


def test_a_block_must_have_room_behind_bos() -> None:
    with pytest.raises(ValueError, match="a block of 2 tokens has no room behind the 2 that each begins with"):
        list(pack(keyed([[5]]), 1, EOS, bos_ids=BOS))
