"""Both reductions against float64: torch's, and the compiled kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import REPOSITORY

from tasks.teachers.reduction import reduce_logits
from tasks.teachers.reduction_cpu import CpuReducer

Reduced = dict[str, np.ndarray[Any, Any]]
Reduce = Callable[..., Reduced]


def by_torch(
    logits: torch.Tensor, labels: torch.Tensor, k: int, temperatures: Any = (), uniforms: Any = None
) -> Reduced:
    given_uniforms = None if uniforms is None else torch.from_numpy(uniforms)
    reduced = reduce_logits(logits.clone(), labels, k, temperatures, given_uniforms)
    return {name: value.numpy() for name, value in reduced.items()}


def by_kernel(
    logits: torch.Tensor, labels: torch.Tensor, k: int, temperatures: Any = (), uniforms: Any = None
) -> Reduced:
    """Into rows that are not those of the input, from logits with padded columns."""
    rows, vocab = logits.shape
    padded = torch.cat([logits, torch.full((rows, 3), 1e4)], dim=1).contiguous()
    read = np.empty((rows, 0)) if uniforms is None else uniforms
    shapes = {"ids": (rows, k), "logprobs": (rows, k), "tail_mass_at": (rows, len(temperatures)), "drawn": read.shape}
    out: Reduced = {
        name: np.full(shapes.get(name, (rows,)), 99, np.int32 if name in ("ids", "drawn") else np.float32)
        for name in ("ids", "logprobs", "tail_mass", "true_logprobs", "entropy", "tail_mass_at", "drawn")
    }
    at = np.arange(rows)[::-1].copy()
    inverse = 1.0 / np.array(temperatures, dtype=np.float32)
    CpuReducer([0, 1])(padded.numpy(), vocab, labels.numpy(), at, inverse, out | {"uniforms": read[::-1].copy()})
    return {name: value[::-1] for name, value in out.items()}


both = pytest.mark.parametrize("reduce", [by_torch, by_kernel])


@both
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(2, 700), st.integers(0, 2**31), st.floats(0.1, 30.0), st.data())
def test_equals_float64(reduce: Reduce, rows: int, vocab: int, seed: int, scale: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * scale
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    truth = logits.double().log_softmax(-1)

    out = reduce(logits, labels, k, (0.5, 2.0))

    ids = torch.from_numpy(out["ids"].astype(np.int64))
    assert out["ids"].shape == out["logprobs"].shape == (rows, k)
    assert (np.diff(out["logprobs"], axis=-1) <= 0).all(), "descending"
    assert all(len(set(row)) == k for row in ids.tolist()), "distinct"
    np.testing.assert_allclose(out["logprobs"], truth.gather(-1, ids), atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(out["logprobs"], truth.topk(k).values, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(out["true_logprobs"], truth.gather(-1, labels[:, None])[:, 0], atol=2e-5, rtol=1e-5)
    # Relative: a tail of 1e-20 is right to five digits, which 1 − Σ p would lose altogether.
    np.testing.assert_allclose(out["tail_mass"], truth.exp().scatter(-1, ids, 0.0).sum(-1), atol=1e-36, rtol=1e-4)
    np.testing.assert_allclose(out["entropy"], -(truth.exp() * truth).sum(-1), atol=5e-5, rtol=1e-5)
    for m, temperature in enumerate((0.5, 2.0)):
        tail = (logits.double() / temperature).softmax(-1).scatter(-1, ids, 0.0).sum(-1)
        np.testing.assert_allclose(out["tail_mass_at"][:, m], tail, atol=1e-36, rtol=2e-4)


@both
def test_a_large_vocabulary(reduce: Reduce) -> None:
    logits = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(0)) * 4
    truth = logits.double().log_softmax(-1)
    out = reduce(logits, torch.tensor([151_935, 0, 7]), 1024)
    np.testing.assert_array_equal(out["ids"], truth.topk(1024).indices)
    np.testing.assert_allclose(out["logprobs"], truth.topk(1024).values, atol=1e-5)
    np.testing.assert_allclose(out["tail_mass"], 1 - truth.topk(1024).values.exp().sum(-1), rtol=1e-4)
    np.testing.assert_allclose(out["entropy"], -(truth.exp() * truth).sum(-1), rtol=1e-5)


@both
def test_nothing_is_outside_when_everything_is_stored(reduce: Reduce) -> None:
    out = reduce(torch.randn(4, 33), torch.zeros(4, dtype=torch.int64), 33, (2.0,))
    assert (out["tail_mass"] == 0.0).all()
    assert (out["tail_mass_at"] == 0.0).all()


@both
def test_minus_infinity_and_large_logits_stay_finite(reduce: Reduce) -> None:
    out = reduce(torch.tensor([[1e4, -1e4, 0.0, -torch.inf]]), torch.tensor([1]), 2)
    assert out["ids"].tolist() == [[0, 2]]
    assert out["logprobs"].tolist() == [[0.0, -1e4]]
    assert out["tail_mass"].tolist() == [0.0]
    assert out["true_logprobs"].tolist() == [-2e4]
    assert out["entropy"].tolist() == [0.0]


@both
def test_what_is_not_a_number_does_not_pass_for_one(reduce: Reduce) -> None:
    logits = torch.randn(2, 50)
    logits[1, 13] = torch.nan
    out = reduce(logits, torch.tensor([0, 0]), 8)
    assert np.isfinite(out["tail_mass"][0])
    assert np.isnan(out["logprobs"][1]).any() or np.isnan(out["tail_mass"][1])


@both
def test_draws_follow_the_cumulative_distribution(reduce: Reduce) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3001, generator=generator) * 3
    logits[0, 5:] = -torch.inf
    uniforms = np.sort(np.random.default_rng(0).random((4, 64)), axis=-1)
    uniforms[:, 0], uniforms[:, -1] = 0.0, np.nextafter(1.0, 0.0)
    drawn = reduce(logits, torch.zeros(4, dtype=torch.int64), 4, (), uniforms)["drawn"]
    cumulative = logits.double().softmax(-1).cumsum(-1).numpy()
    assert (np.diff(drawn, axis=-1) >= 0).all()
    assert drawn[0].max() < 5, "a token without probability is never drawn"
    below = np.where(drawn > 0, np.take_along_axis(cumulative, np.maximum(drawn - 1, 0), -1), 0.0)
    above = np.take_along_axis(cumulative, drawn, -1)
    inner = slice(1, -1)
    assert (below[:, inner] <= uniforms[:, inner] + 1e-6).all()
    assert (above[:, inner] >= uniforms[:, inner] - 1e-6).all()


@both
def test_draws_are_unbiased(reduce: Reduce) -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2)).expand(2000, 40).contiguous()
    uniforms = np.sort(np.random.default_rng(3).random((2000, 50)), axis=-1)
    drawn = reduce(logits, torch.zeros(2000, dtype=torch.int64), 1, (), uniforms)["drawn"]
    share = np.bincount(drawn.ravel(), minlength=40) / drawn.size
    expected = logits[0].double().softmax(-1).numpy()
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(expected.max() / drawn.size))


def test_compiled_anew_or_from_its_cache_it_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    """Numba optimises the two differently; a shard's bytes must not depend on it."""
    code = """
import hashlib, numpy as np
from tasks.teachers.reduction_cpu import CpuReducer, _reduce
rng = np.random.default_rng(0)
out = {name: np.zeros((64, 16), np.float32) for name in ("logprobs",)} | {"ids": np.zeros((64, 16), np.int32)}
out |= {name: np.zeros(64, np.float32) for name in ("tail_mass", "true_logprobs", "entropy")}
out |= {"tail_mass_at": np.zeros((64, 1), np.float32), "drawn": np.zeros((64, 5), np.int32)}
out["uniforms"] = np.sort(rng.random((64, 5)), axis=-1)
logits = (rng.standard_normal((64, 4999)) * 3).astype(np.float32)
CpuReducer([0])(logits, 4990, np.arange(64), np.arange(64), np.array([0.5], np.float32), out)
content = b"".join(out[name].tobytes() for name in sorted(out))
print(sum(_reduce.stats.cache_hits.values()), hashlib.sha256(content).hexdigest())
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (anew, first), (cached, second) = (run.stdout.split() for run in runs)
    assert (anew, cached) == ("0", "1")
    assert first == second
