"""Both shapes of vLLM's prompt log-probabilities against a distribution that is known in full."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk.values import SparseTargets
from tasks.teachers.prompt_logprobs import Rows, assemble, entries_to_ask, flat_rows, ranked_rows, stacked


@dataclass(frozen=True)
class Answer:
    """What vLLM would say of N positions of one block."""

    logprobs_NR: np.ndarray
    """The whole distribution, padded rows included."""
    labels_N: np.ndarray
    asked: int

    def top(self, n: int) -> np.ndarray:
        return np.argsort(-self.logprobs_NR[n], kind="stable")[: self.asked]

    def flat(self) -> Rows:
        ids = [np.r_[label, self.top(n)] for n, label in enumerate(self.labels_N)]
        logprobs = [self.logprobs_NR[n, row] for n, row in enumerate(ids)]
        counts = np.array([len(row) for row in ids])
        return flat_rows(np.concatenate(ids), np.concatenate(logprobs), counts, self.labels_N)

    def ranked(self, random: np.random.Generator) -> Rows:
        entries, counts = [], []
        for n, label in enumerate(self.labels_N):
            row = self.logprobs_NR[n]
            # As vLLM counts: tied tokens before the true one push it back; being among the top overrules that.
            found = {int(label): (row[label], int((row >= row[label]).sum()))}
            found |= {int(token): (row[token], rank) for rank, token in enumerate(self.top(n), start=1)}
            items = list(found.items())
            entries += [items[i] for i in random.permutation(len(items))]
            counts.append(len(items))
        ids = np.array([token for token, _ in entries])
        logprobs, ranks = (np.array([entry[i] for _, entry in entries]) for i in (0, 1))
        return ranked_rows(ids, logprobs, ranks, np.array(counts), self.labels_N, self.asked)


@st.composite
def answers(draw: st.DrawFn) -> tuple[Answer, int, int]:
    """An answer, K and V; with few distinct logits, so that most are tied, or all distinct."""
    vocab_size = draw(st.integers(2, 40))
    k = draw(st.one_of(st.just(vocab_size), st.integers(1, vocab_size)))
    rows = vocab_size + draw(st.sampled_from([0, 0, 1, 7]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    positions = draw(st.integers(1, 6))
    tied = draw(st.booleans())
    logits = random.integers(-3, 3, (positions, rows)) if tied else random.normal(0, 4, (positions, rows))
    logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    labels = random.integers(0, vocab_size, positions).astype(np.int32)
    return Answer(logprobs, labels, entries_to_ask(k, vocab_size, rows)), k, vocab_size


@given(answers(), st.integers(0, 2**32 - 1))
def test_both_shapes_give_the_most_probable_tokens_of_the_tokenizer(drawn: tuple[Answer, int, int], seed: int) -> None:
    answer, k, vocab_size = drawn
    targets = assemble(answer.flat(), blocks=1, k=k, vocab_size=vocab_size)
    ranked = assemble(answer.ranked(np.random.default_rng(seed)), blocks=1, k=k, vocab_size=vocab_size)
    for name in ("ids", "logprobs", "tail_mass", "true_logprobs"):
        np.testing.assert_array_equal(getattr(ranked, name), getattr(targets, name))
    for n, label in enumerate(answer.labels_N):
        row = answer.logprobs_NR[n]
        # All that was asked for and is a token, up to k: fewer only where padding took the places.
        expected = [token for token in answer.top(n) if token < vocab_size][:k]
        kept = len(expected)
        assert targets.ids[0, n, :kept].tolist() == expected
        np.testing.assert_array_equal(targets.logprobs[0, n, :kept], row[expected])
        assert (targets.ids[0, n, kept:] == 0).all()
        assert (targets.logprobs[0, n, kept:] == -np.inf).all()
        assert targets.true_logprobs[0, n] == row[label]
        outside = 1.0 - np.exp(row[expected].astype(np.float64)).sum()
        assert targets.tail_mass[0, n] == pytest.approx(np.clip(outside, 0, 1), abs=1e-7)
        assert 0 <= targets.tail_mass[0, n] <= 1


@given(answers())
def test_where_padding_is_unlikely_k_tokens_are_kept(drawn: tuple[Answer, int, int]) -> None:
    answer, k, vocab_size = drawn
    logprobs = answer.logprobs_NR.copy()
    logprobs[:, vocab_size:] -= 50
    unlikely = Answer(logprobs, answer.labels_N, answer.asked)
    targets = assemble(unlikely.flat(), blocks=1, k=k, vocab_size=vocab_size)
    assert (targets.logprobs > -np.inf).all()
    assert (np.diff(np.sort(targets.ids, axis=-1), axis=-1) > 0).all(), "a token is kept twice"


def test_how_many_entries_are_asked_for() -> None:
    assert entries_to_ask(64, 512, 512) == 64, "nothing is padded"
    assert entries_to_ask(64, 500, 512) == 68, "four to spare"
    assert entries_to_ask(64, 511, 512) == 65, "no more to spare than there is padding"
    assert entries_to_ask(1600, 151_643, 152_064) == 1700, "a sixteenth"
    assert entries_to_ask(500, 500, 512) == 512, "never more than there are"


def test_ragged_rows_are_filled_up() -> None:
    """Positions of 2, 0 and 1 entries beside the true token; in the last, the true token is among them."""
    ids = np.array([9, 3, 4, 8, 5, 5])
    logprobs = np.log([0.05, 0.5, 0.25, 0.125, 0.75, 0.75])
    rows = flat_rows(ids, logprobs, np.array([3, 1, 2]), np.array([9, 8, 5]))
    targets = assemble(rows, blocks=1, k=2, vocab_size=10)
    assert targets.ids[0].tolist() == [[3, 4], [0, 0], [5, 0]]
    np.testing.assert_allclose(np.exp(targets.logprobs[0]), [[0.5, 0.25], [0, 0], [0.75, 0]], rtol=1e-6)
    np.testing.assert_allclose(targets.tail_mass[0], [0.25, 1.0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(np.exp(targets.true_logprobs[0]), [0.05, 0.125, 0.75], rtol=1e-6)


def test_an_impossible_token_keeps_no_id() -> None:
    rows = flat_rows(np.array([1, 4, 1]), np.array([-np.inf, 0.0, -np.inf]), np.array([3]), np.array([1]))
    targets = assemble(rows, blocks=1, k=2, vocab_size=10)
    assert targets.ids.tolist() == [[[4, 0]]]
    assert targets.true_logprobs.tolist() == [[-np.inf]]


def simple(first: float, second: float) -> SparseTargets:
    rows = flat_rows(np.array([7, 3, 4]), np.array([-9.0, first, second]), np.array([3]), np.array([7]))
    return assemble(stacked([rows]), blocks=1, k=2, vocab_size=10)


def test_what_vllm_must_not_return() -> None:
    assert simple(-0.5, -1.5).ids.tolist() == [[[3, 4]]]
    with pytest.raises(RuntimeError, match="no log-probabilities; it must run with logprobs_mode raw_logprobs"):
        simple(4.0, 3.0)
    with pytest.raises(RuntimeError, match="no log-probabilities"):
        simple(-0.5, -0.5)
    with pytest.raises(RuntimeError, match="out of order"):
        simple(-1.5, -0.5)
    assert np.isnan(simple(np.nan, np.nan).logprobs).all(), "told apart where targets are stored"
    ids, logprobs = np.array([7, 3]), np.array([-1.0, -0.5])
    with pytest.raises(RuntimeError, match="answered for 1 of 2 positions; nothing was stored"):
        flat_rows(ids, logprobs, np.array([2]), np.array([7, 3]))
    with pytest.raises(RuntimeError, match="do not name the block's own token"):
        flat_rows(ids, logprobs, np.array([2]), np.array([3]))
    with pytest.raises(RuntimeError, match="do not name the block's own token"):
        ranked_rows(ids, logprobs, np.array([2, 1]), np.array([2]), np.array([8]), 2)
