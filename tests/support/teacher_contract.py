"""What every teacher does, whichever way its predictions come: a suite that each kind of teacher passes.

A file of tests derives from `TeacherContract`, and has the fixtures that it asks for:

tokens      [B, L + 1] int32: the blocks
captured    what the teacher captured of them
truth       [B, L, V] float64: log-probabilities of a plain float32 forward pass, over the tokenizer's tokens
unopened    makes one more teacher of the kind, from a configuration with such changes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ddk.errors import UserError
from ddk.values import SparseTargets
from tasks.capture.cache_targets import check_distribution


def of_labels(truth: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """[B, L]: the log-probability of a token at every position."""
    return truth.gather(-1, torch.from_numpy(labels.astype(np.int64))[..., None])[..., 0].numpy()


def check_captured(captured: SparseTargets, tokens: np.ndarray, truth: torch.Tensor, tail_tolerance: float) -> None:
    """As a plain forward pass has it: every position, and the last one by itself, which may come another way."""
    check_distribution(captured)
    best, own = truth.topk(captured.ids.shape[-1]), of_labels(truth, tokens[:, 1:])
    for positions in (slice(None), slice(-1, None)):
        assert (captured.ids == best.indices.numpy())[:, positions].mean() >= 0.999
        for found, expected in ((captured.logprobs, best.values.numpy()), (captured.true_logprobs, own)):
            np.testing.assert_allclose(found[:, positions], expected[:, positions], atol=1e-4, rtol=0)
    tail = 1.0 - best.values.exp().sum(-1).numpy()
    np.testing.assert_allclose(captured.tail_mass, tail, atol=tail_tolerance, rtol=0)


class TeacherContract:
    """See the module."""

    tail_tolerance: float
    """Of a sum over the tokens in float32."""

    def test_it_equals_a_plain_forward_pass(
        self, captured: SparseTargets, tokens: np.ndarray, truth: torch.Tensor
    ) -> None:
        check_captured(captured, tokens, truth, self.tail_tolerance)

    def test_position_j_predicts_token_j_plus_1(
        self, captured: SparseTargets, tokens: np.ndarray, truth: torch.Tensor
    ) -> None:
        shifted = of_labels(truth, tokens[:, :-1])
        assert np.abs(captured.true_logprobs - shifted).mean() > 0.1, "the test must notice targets off by one"

    def test_all_probability_is_the_tokenizers(self, captured: SparseTargets, truth: torch.Tensor) -> None:
        """Rows of the model that no token has get none."""
        assert captured.ids.max() < truth.shape[-1]
        mass = np.exp(captured.logprobs, dtype=np.float64).sum(-1) + captured.tail_mass
        np.testing.assert_allclose(mass, 1.0, atol=1e-5)

    def test_one_that_is_not_needed_starts_nothing_and_may_be_closed_twice(self, unopened: Callable[..., Any]) -> None:
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        with unopened() as teacher:
            assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
            teacher.close()

    def test_more_than_the_vocabulary_is_refused(self, unopened: Callable[..., Any], truth: torch.Tensor) -> None:
        vocab_size = truth.shape[-1]
        message = rf"teacher.k is {vocab_size + 1} and the tokenizer has {vocab_size} tokens; lower teacher.k"
        with pytest.raises(UserError, match=message):
            unopened(k=vocab_size + 1)
