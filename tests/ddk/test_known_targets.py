"""A teacher predicts more tokens than the student has rows for: what of its targets the student is asked for."""

from __future__ import annotations

import numpy as np

from ddk.known_targets import known
from ddk.values import SampledTokens, SparseTargets


def test_a_token_without_a_row_joins_the_tail() -> None:
    p = np.array([[[0.6, 0.3, 0.0]]])
    with np.errstate(divide="ignore"):
        targets = SparseTargets(
            ids_BLK=np.array([[[4, 9, 0]]], np.int32),
            logprobs_BLK=np.log(p).astype(np.float32),
            tail_mass_BL=np.array([[0.1]], np.float32),
            true_logprobs_BL=np.log(np.array([[0.6]], np.float32)),
            sampled=SampledTokens(ids_BLN=np.array([[[4, 9]]], np.int32), counts_BLN=np.array([[[3, 1]]], np.int32)),
            tail_mass_at={2.0: np.array([[0.2]], np.float32)},
        )
    found = known(targets, 8)
    assert found.ids_BLK.tolist() == [[[4, 0, 0]]]
    np.testing.assert_allclose(np.exp(found.logprobs_BLK), [[[0.6, 0.0, 0.0]]], rtol=1e-6)
    np.testing.assert_allclose(found.tail_mass_BL, [[0.4]], rtol=1e-6)
    kept, lost = 0.6**0.5, 0.3**0.5
    np.testing.assert_allclose(found.tail_mass_at[2.0], [[0.2 + 0.8 * lost / (kept + lost)]], rtol=1e-6)
    assert found.sampled is not None
    assert found.sampled.counts_BLN.tolist() == [[[3, 0]]]
    assert known(targets, 10) is targets
