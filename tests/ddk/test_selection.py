"""Scores of blocks against plain cross-entropy, and what is kept by them against hand-made cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import make_tiny_model

from ddk.selection import Selected, balanced_draw, block_losses, keep_highest, kept_count, mean_over_positions
from ddk.student import StudentLoss, load_student
from ddk.train_config import LossConfig, StudentConfig

VOCAB, LENGTH = 60, 12


class Blocks:
    """Some blocks in memory, of which some tokens carry no loss."""

    shard_blocks, block_bytes, k, vocab_size = 4, 52, 3, VOCAB

    def __init__(self, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        self.tokens, self.mask = tokens, mask
        self.fetched: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.tokens[np.asarray(indices)]

    def loss_mask(self, indices: np.ndarray) -> np.ndarray | None:
        return None if self.mask is None else self.mask[np.asarray(indices)]

    def fetch(self, indices: np.ndarray) -> bool:
        self.fetched.append([int(one) for one in indices])
        return True


def blocks(masked: bool) -> Blocks:
    generator = np.random.default_rng(0)
    mask = generator.random((6, LENGTH)) < 0.6
    mask[2] = False
    return Blocks(generator.integers(0, VOCAB, (6, LENGTH + 1)).astype(np.int32), mask if masked else None)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_are_those_of_the_models_own_forward_pass(tmp_path: Path, masked: bool) -> None:
    model = load_student(StudentConfig(model=make_tiny_model(tmp_path / "m", rows=64, context=32)), VOCAB).eval()
    here = blocks(masked)
    found = block_losses(
        StudentLoss(model, VOCAB, LossConfig(gamma=0.0)).eval(), here, np.array([4, 2, 0]), torch.device("cpu")
    )
    for row, index in enumerate((4, 2, 0)):
        tokens = torch.from_numpy(here.tokens[index : index + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1]).logits[0, :, :VOCAB].double()
        each = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        chosen = each if here.mask is None else each[torch.from_numpy(here.mask[index])]
        expected = float(chosen.mean()) if len(chosen) else 0.0
        assert found[row] == pytest.approx(expected, abs=1e-5)


def test_the_teachers_mean_is_over_the_positions_that_carry_loss() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.125], [0.5, 0.5, 0.5]], dtype=np.float32))
    assert mean_over_positions(logprobs, None) == pytest.approx([2 * np.log(2), np.log(2)])
    mask = np.array([[True, False, True], [False, False, False]])
    assert mean_over_positions(logprobs, mask) == pytest.approx([2 * np.log(2), 0.0])


def test_the_highest_scores_are_kept_in_the_corpus_order() -> None:
    scores = np.array([0.1, 0.9, -1.0, 0.9, 0.5])
    assert keep_highest(scores, 0.5).tolist() == [1, 3, 4]
    assert keep_highest(scores, 0.4).tolist() == [1, 3]
    assert keep_highest(scores, 0.2).tolist() == [1], "of equal ones the earlier"
    assert keep_highest(scores, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert [kept_count(10, keep) for keep in (1e-9, 0.1, 0.11, 0.5, 1.0)] == [1, 1, 2, 5, 10]


def test_every_cluster_gives_its_share_and_small_ones_all_they_have() -> None:
    clusters = np.array([0] * 50 + [1] * 30 + [2] * 4 + [3] * 2)
    kept = balanced_draw(clusters, 40 / 86, seed=0)
    counts = np.bincount(clusters[kept], minlength=4)
    assert len(kept) == 40 == len(set(kept.tolist()))
    assert kept.tolist() == sorted(kept.tolist())
    assert counts[2] == 4, "the smallest kind gives all"
    assert abs(int(counts[0]) - int(counts[1])) <= 3, "the large ones alike"
    assert balanced_draw(clusters, 40 / 86, seed=0).tolist() == kept.tolist()
    assert balanced_draw(clusters, 40 / 86, seed=1).tolist() != kept.tolist()
    assert balanced_draw(clusters, 1.0, seed=0).tolist() == list(range(86))
    assert len(balanced_draw(np.arange(10), 0.3, seed=0)) == 3, "clusters of one are drawn from too"


def test_a_selection_reads_as_its_blocks_do() -> None:
    whole = blocks(masked=True)
    some = Selected(whole, np.array([1, 3, 5]))
    assert len(some) == 3
    assert (some.read([2, 0]) == whole.tokens[[5, 1]]).all()
    mask = some.loss_mask(np.array([1]))
    assert mask is not None
    assert (mask == whole.mask[[3]]).all()
    assert some.fetch(np.array([0, 2]))
    assert whole.fetched == [[1, 5]]
    assert some.shard_blocks == 2, "half of a shard's four"
    assert (some.block_bytes, some.k, some.vocab_size) == (52, 3, VOCAB)
