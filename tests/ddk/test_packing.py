from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ddk.packing import Cursor, PackedBlock, PackingConfig, pack

EOS = 0


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def keyed(documents: list[list[int]]) -> list[tuple[tuple[int, int], np.ndarray]]:
    return [((0, 10 * number), ids(*document)) for number, document in enumerate(documents)]


def as_lists(blocks: list[PackedBlock]) -> list[list[int]]:
    return [block.tokens.tolist() for block in blocks]


documents_strategy = st.lists(st.lists(st.integers(1, 200_000), max_size=12), max_size=12)


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
        rest = [pair for pair in pairs if pair[0] >= block.next.document]
        resumed = list(pack(rest, seq_len, EOS, start=block.next))
        assert as_lists(resumed) == as_lists(blocks[number + 1 :])
        assert [one.next for one in resumed] == [one.next for one in blocks[number + 1 :]]


def test_blocks_share_no_memory() -> None:
    first, second = pack(keyed([[1, 2, 3, 4, 5, 6, 7]]), 3, EOS)
    first.tokens[:] = 99
    assert second.tokens.tolist() == [5, 6, 7, 0]


def test_documents_are_read_no_further_than_needed() -> None:
    def documents():
        yield 0, ids(1, 2, 3)
        raise AssertionError("read ahead")

    block = next(pack(documents(), 3, EOS))
    assert block.next == Cursor(document=0, offset=4)


@pytest.mark.parametrize(
    ("documents", "start", "message"),
    [
        ([(2, ids(1))], Cursor(document=1, offset=1), r"go on in document 1, and the documents begin with 2"),
        ([(1, ids(1))], Cursor(document=1, offset=3), r"at token 3 of document 1, which has 2: the corpus or the tok"),
        ([], Cursor(document=1, offset=0), r"go on in document 1, and there is no such document"),
        ([(1, np.zeros(2))], None, r"document 1 is float64 of shape \(2,\); packing takes one-dimensional int32"),
        ([(1, np.zeros((2, 1), np.int32))], None, r"document 1 is int32 of shape \(2, 1\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(documents, start, message) -> None:
    with pytest.raises(ValueError, match=message):
        list(pack(documents, 3, EOS, start=start))


def test_config() -> None:
    assert PackingConfig(seq_len=7).block_tokens == 8
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        PackingConfig(seq_len=0)
    with pytest.raises(ValidationError, match="Extra inputs"):
        PackingConfig.model_validate({"seq_length": 7})
    assert "Predictions in a block" in json.dumps(PackingConfig.model_json_schema())
