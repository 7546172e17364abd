"""The fused loss and its gradients, for every divergence, tail and temperature, against dense float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from ddk import fused
from ddk.fused import dense_loss, fused_loss
from ddk.loss import SMALLEST_TAIL, Teacher, position_gamma, sampled_side, teacher_of, teacher_side
from ddk.student import StudentLoss
from ddk.train_config import LossConfig
from ddk.values import SampledTokens, SparseTargets

KINDS = [
    (divergence, tail)
    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon")
    for tail in ("bucket", "renormalise", "residual")
    if (divergence, tail) != ("reverse_kl", "residual")
]


class Case:
    """Random hidden states and projection, and a teacher cut to its k most probable tokens."""

    def __init__(self, T: int, V: int, D: int, k: int, loss: LossConfig, seed: int = 0, scale: float = 1.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.loss = loss
        self.hidden_TD = scale * torch.randn(T, D, generator=random)
        self.weight_VD = torch.randn(V, D, generator=random)
        self.labels_T = torch.randint(V, (T,), generator=random)
        self.dense_TV = 2.0 * torch.randn(T, V, generator=random, dtype=torch.float64)
        log_p_TV = self.dense_TV.log_softmax(-1)
        self.ids_TK = log_p_TV.topk(k).indices
        self.at_TV = (self.dense_TV / loss.temperature).softmax(-1)

    def only(self, rows_T: Tensor, gamma: float) -> Case:
        """Some positions of it, at another γ."""
        part = copy.copy(self)
        part.loss = self.loss.model_copy(update={"gamma": gamma})
        for name in ("hidden_TD", "labels_T", "dense_TV", "ids_TK", "at_TV"):
            setattr(part, name, getattr(self, name)[rows_T])
        return part

    def tail(self, probabilities_TV: Tensor) -> Tensor:
        outside_TV = probabilities_TV.scatter(-1, self.ids_TK, 0.0)
        return outside_TV.sum(-1)

    @property
    def teacher(self) -> Teacher:
        log_p_TV = self.dense_TV.log_softmax(-1)
        return teacher_side(
            self.ids_TK,
            log_p_TV.gather(-1, self.ids_TK).float(),
            self.tail(log_p_TV.exp()).float(),
            self.loss,
            self.tail(self.at_TV).float(),
        )

    def truth(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CE, divergence, and the gradients of CE + γ·divergence, from the table in the module's docstring."""
        hidden_TD = self.hidden_TD.to(dtype).clone().requires_grad_()
        weight_VD = self.weight_VD.to(dtype).clone().requires_grad_()
        logits_TV = hidden_TD @ weight_VD.T
        ce = torch.nn.functional.cross_entropy(logits_TV, self.labels_T, reduction="sum")
        kl = dense_divergence(self.at_TV.to(dtype), (logits_TV / self.loss.temperature).softmax(-1), self)
        of_hidden, of_weight = torch.autograd.grad(ce + self.loss.gamma * kl, (hidden_TD, weight_VD))
        return ce.detach(), kl.detach(), of_hidden, of_weight


def dense_divergence(p_TV: Tensor, q_TV: Tensor, case: Case) -> Tensor:
    p_TK, q_TK = p_TV.gather(-1, case.ids_TK), q_TV.gather(-1, case.ids_TK)
    rest_p_T, rest_q_T = case.tail(p_TV)[:, None], case.tail(q_TV)[:, None]
    if case.loss.tail == "bucket":
        p, q = torch.cat([p_TK, rest_p_T], -1), torch.cat([q_TK, rest_q_T], -1)
    elif case.loss.tail == "renormalise":
        p, q = p_TK / p_TK.sum(-1, keepdim=True), q_TK / q_TK.sum(-1, keepdim=True)
    else:
        p = torch.zeros_like(p_TV).scatter(-1, case.ids_TK, p_TK)
        p, q = p.scatter_add(-1, case.labels_T[:, None], rest_p_T), q_TV
    if case.loss.divergence == "forward_kl":
        return kl(p, q)
    if case.loss.divergence == "reverse_kl":
        return kl(q, p)
    beta = case.loss.beta
    mean = beta * p + (1 - beta) * q
    return beta * kl(p, mean) + (1 - beta) * kl(q, mean)


def kl(p: Tensor, q: Tensor) -> Tensor:
    there = p > 0
    return torch.where(there, p * (p.where(there, 1.0).log() - q.where(there, 1.0).log()), 0.0).sum()


def assert_matches(case: Case, tolerance: float = 5e-6, *, beside_plain: bool = False, **how: Any) -> None:
    hidden_TD = case.hidden_TD.clone().requires_grad_()
    weight_VD = case.weight_VD.clone().requires_grad_()
    sums = fused_loss(hidden_TD, weight_VD, case.labels_T, case.teacher, case.loss, **how)
    (sums.total * 0.5).backward()
    ce, kl_, of_hidden, of_weight = case.truth()
    positions = len(case.labels_T)
    if beside_plain:
        # A sum over the vocabulary in float32 errs by what the machine's BLAS makes of it, ours and anybody's: on a CPU
        # without AVX-512 by 1e-4 of the largest at 152,064 tokens.
        plain = zip(case.truth(torch.float32)[2:], (of_hidden, of_weight), strict=True)
        errors = [((one.double() - theirs).abs().max() / max(1.0, theirs.abs().max())).item() for one, theirs in plain]
        tolerance = max(tolerance, 3.0 * max(errors))
    assert abs(sums.ce.double() - ce) <= tolerance * (ce.abs() + positions)
    assert abs(sums.kl.double() - kl_) <= tolerance * (kl_.abs() + positions)
    for ours, theirs in ((hidden_TD.grad, of_hidden), (weight_VD.grad, of_weight)):
        assert ours is not None
        assert (2.0 * ours.double() - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())
    assert not sums.ce.requires_grad
    assert not sums.kl.requires_grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_against_dense_float64(divergence: str, tail: str, k: int, temperature: float) -> None:
    loss = LossConfig(gamma=0.7, divergence=divergence, tail=tail, temperature=temperature, beta=0.3)
    tolerance = 5e-6 if temperature >= 1.0 else 5e-5  # logits at 0.5 are twice as large, and so is float32's error
    assert_matches(Case(9, 30, 8, k, loss), tolerance, chunk_bytes=4 * 30 * 4)


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_each_position_may_have_a_gamma_of_its_own(divergence: str, tail: str) -> None:
    case = Case(24, 30, 8, 4, LossConfig(gamma=0.7, divergence=divergence, tail=tail))  # type: ignore[arg-type]
    gamma_T = torch.tensor([0.0, 0.3, 2.0]).repeat(8)
    hidden_TD, weight_VD = (one.clone().requires_grad_() for one in (case.hidden_TD, case.weight_VD))
    teacher = replace(case.teacher, gamma_T=gamma_T)
    sums = fused_loss(hidden_TD, weight_VD, case.labels_T, teacher, case.loss, chunk_bytes=4 * 30 * 7)
    sums.total.backward()
    # The loss is a sum over positions: that of the three kinds of them, each with one γ.
    of_weight, total = torch.zeros_like(case.weight_VD, dtype=torch.float64), 0.0
    for gamma in (0.0, 0.3, 2.0):
        rows = gamma_T == gamma
        ce, kl_, of_hidden, of_weight_here = case.only(rows, gamma).truth()
        assert (hidden_TD.grad[rows] - of_hidden).abs().max() < 1e-5  # type: ignore[index]
        of_weight += of_weight_here
        total += (ce + gamma * kl_).item()
    assert (weight_VD.grad - of_weight).abs().max() < 1e-5  # type: ignore[operator]
    assert sums.total.item() == pytest.approx(total, rel=1e-5)
    assert sums.kl.item() == pytest.approx(case.truth()[1].item(), rel=1e-5), "the divergence itself has no weight"


def test_gamma_by_domain_and_by_the_teachers_entropy() -> None:
    loss = LossConfig(gamma=0.2, gamma_of={"code": 0.0, "math": 1.0, "math/algebra": 3.0}, min_entropy=0.5)
    entropy_BL = np.array([[0.4, 0.5], [0.6, 9.0], [0.0, 2.0], [1.0, 0.1]], np.float32)
    found = position_gamma(loss, ("math/logic", "code", "web", "math/algebra/rings"), entropy_BL, 2)
    assert found == pytest.approx(np.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.2], [3.0, 0.0]], np.float32))
    assert position_gamma(LossConfig(gamma=0.2), ("web",), None, 2) is None
    with pytest.raises(ValueError, match="the targets hold no entropy"):
        position_gamma(loss, ("web",), None, 2)


@pytest.mark.parametrize("setting", [{"gamma_of": {"web": 1.0}}, {"gamma_until": 5}, {"min_entropy": 0.1}])
def test_without_gamma_its_refinements_mean_nothing_and_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(setting))} is set and gamma is 0"):
        LossConfig(gamma=0.0, **setting)
    with pytest.raises(ValidationError, match=r"the weight of 'web' is -0\.1"):
        LossConfig(gamma_of={"web": -0.1})


@given(
    seed=st.integers(0, 10_000),
    T=st.integers(1, 6),
    V=st.integers(2, 40),
    k=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([0.7, 1.0, 3.0]),
    beta=st.sampled_from([0.01, 0.5, 0.99]),
    rows=st.integers(1, 6),
)
@settings(deadline=None, max_examples=80)
def test_any_shape(seed, T, V, k, kind, temperature, beta, rows) -> None:
    loss = LossConfig(gamma=0.5, divergence=kind[0], tail=kind[1], temperature=temperature, beta=beta)
    # A teacher whose tail is next to nothing is cut at SMALLEST_TAIL under reverse_kl: the truth has no such floor.
    case = Case(T, V, 5, min(k, V), loss, seed=seed)
    if kind == ("reverse_kl", "bucket") and case.tail(case.at_TV).min() < 10 * SMALLEST_TAIL and k < V:
        return
    assert_matches(case, 5e-5, chunk_bytes=4 * V * rows)


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_with_everything_stored_it_is_the_dense_divergence(divergence: str, tail: str) -> None:
    loss = LossConfig(gamma=1.0, divergence=divergence, tail=tail)
    case = Case(6, 12, 5, 12, loss)
    p, q = case.at_TV, (case.hidden_TD.double() @ case.weight_VD.double().T).softmax(-1)
    whole = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jensen_shannon": 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    }
    ours = fused_loss(case.hidden_TD, case.weight_VD, case.labels_T, case.teacher, loss).kl
    assert ours.item() == pytest.approx(whole[divergence].item(), rel=1e-5)


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_a_vocabulary_of_qwens_size(divergence: str, tail: str) -> None:
    """Ids that 17 bits would alias, ties, positions with fewer entries or none, and −inf among them."""
    V = 152_064
    loss = LossConfig(gamma=1.0, divergence=divergence, tail=tail)
    case = Case(3, V, 4, 4, loss)
    case.ids_TK = torch.tensor([[131_072, 0, 151_935, 152_063], [5, 131_073, 151_000, 1], [152_063, 140_000, 8_991, 2]])
    case.labels_T = torch.tensor([152_063, 131_072, 9])
    case.dense_TV = torch.zeros(3, V, dtype=torch.float64).scatter(-1, case.ids_TK, 13.0)  # all stored ones tie
    case.at_TV = case.dense_TV.softmax(-1)
    assert_matches(case, 2e-5, beside_plain=True)
    teacher = case.teacher
    padded = Teacher(
        ids_TK=torch.cat([teacher.ids_TK, torch.zeros(3, 2, dtype=torch.int64)], -1),
        log_p_TK=torch.cat([teacher.log_p_TK, torch.full((3, 2), -torch.inf)], -1),
        log_tail_T=teacher.log_tail_T,
    )
    plain, same = (fused_loss(case.hidden_TD, case.weight_VD, case.labels_T, t, loss).kl for t in (teacher, padded))
    assert same.item() == pytest.approx(plain.item(), rel=1e-6)


def test_padded_rows_and_a_bias() -> None:
    loss = LossConfig(gamma=0.7)
    case = Case(9, 30, 8, 4, loss)
    bias_V = torch.linspace(-1, 1, 36).requires_grad_()
    padded_VD = torch.cat([case.weight_VD, torch.full((6, 8), 1e4)]).requires_grad_()
    hidden_TD = case.hidden_TD.clone().requires_grad_()
    sums = fused_loss(
        hidden_TD, padded_VD, case.labels_T, case.teacher, loss, bias_V=bias_V, vocab_size=30, chunk_bytes=500
    )
    sums.total.backward()
    # A bias is one more hidden state that is always 1.
    wider = Case(9, 30, 8, 4, loss)
    wider.hidden_TD = torch.cat([case.hidden_TD, torch.ones(9, 1)], -1)
    wider.weight_VD = torch.cat([case.weight_VD, bias_V.detach()[:30, None]], -1)
    ce, kl_, of_hidden, of_weight = wider.truth()
    assert (sums.ce.item(), sums.kl.item()) == pytest.approx((ce.item(), kl_.item()), rel=1e-5)
    assert (padded_VD.grad[30:] == 0).all()
    assert (bias_V.grad[30:] == 0).all()
    torch.testing.assert_close(padded_VD.grad[:30].double(), of_weight[:, :8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias_V.grad[:30].double(), of_weight[:, 8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden_TD.grad.double(), of_hidden[:, :8], rtol=1e-4, atol=1e-5)


def test_without_gradients_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(9, 30, 8, 4, LossConfig())
    hidden_TD = case.hidden_TD.requires_grad_()
    monkeypatch.setattr(torch.autograd, "grad", None)  # whoever takes one fails
    with torch.no_grad():
        sums = fused_loss(hidden_TD, case.weight_VD, case.labels_T, case.teacher, case.loss)
    assert not sums.total.requires_grad


def test_the_scale_is_in_the_total_alone() -> None:
    case = Case(9, 30, 8, 4, LossConfig(gamma=0.7))
    one, scaled = (
        fused_loss(case.hidden_TD, case.weight_VD, case.labels_T, case.teacher, case.loss, scale=scale)
        for scale in (1.0, 0.01)
    )
    assert scaled.total.item() == pytest.approx(0.01 * one.total.item(), rel=1e-6)
    assert (scaled.ce.item(), scaled.kl.item()) == (one.ce.item(), one.kl.item())
    assert one.total.item() == pytest.approx(one.ce.item() + 0.7 * one.kl.item(), rel=1e-6)


def test_no_positions_at_all() -> None:
    """A rank whose blocks are all prompt."""
    hidden_TD, weight_VD = torch.zeros(0, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    sums = fused_loss(hidden_TD, weight_VD, torch.zeros(0, dtype=torch.int64), None, LossConfig(gamma=0.0))
    sums.total.backward()
    assert sums.total.item() == 0.0
    assert (weight_VD.grad == 0).all()


def test_bf16_products_and_float32_sums() -> None:
    case = Case(64, 300, 32, 8, LossConfig(gamma=0.7), scale=0.3)
    hidden_TD, weight_VD = case.hidden_TD.clone().requires_grad_(), case.weight_VD.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        sums = fused_loss(hidden_TD, weight_VD, case.labels_T, case.teacher, case.loss, chunk_bytes=4 * 300 * 10)
    sums.total.backward()
    ce, kl_, of_hidden, of_weight = case.truth()
    assert (sums.ce.item(), sums.kl.item()) == pytest.approx((ce.item(), kl_.item()), rel=1e-2)
    assert sums.ce.dtype == torch.float32
    assert hidden_TD.grad.dtype == weight_VD.grad.dtype == torch.float32
    for ours, theirs in ((hidden_TD.grad, of_hidden), (weight_VD.grad, of_weight)):
        assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()
        assert (ours.double() - theirs).norm() > 1e-6 * theirs.norm(), "it was computed in bfloat16"


@pytest.mark.parametrize("k", [1, 4, 30])
def test_what_is_written_out_is_what_autograd_says(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual loss has its derivatives in closed form; `position_losses` is the same function of the same numbers."""
    case = Case(9, 30, 8, k, LossConfig(gamma=0.7))
    found = []
    for known in (True, False):
        monkeypatch.setattr(fused, "has_closed_form", lambda loss, known=known: known)
        hidden_TD = case.hidden_TD.clone().requires_grad_()
        sums = fused_loss(hidden_TD, case.weight_VD, case.labels_T, case.teacher, case.loss, scale=0.3)
        sums.total.backward()
        found.append((sums.total, sums.ce, sums.kl, hidden_TD.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# Random draws


def drawn(dense_TV: Tensor, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct ids and counts [T, draws], as they are stored."""
    random = torch.Generator().manual_seed(seed)
    tokens_TN = torch.multinomial(dense_TV.softmax(-1), draws, replacement=True, generator=random)
    ids, counts = (torch.zeros(len(dense_TV), draws, dtype=torch.int64) for _ in range(2))
    for row, tokens in enumerate(tokens_TN):
        distinct, times = tokens.unique(return_counts=True)
        ids[row, : len(distinct)], counts[row, : len(distinct)] = distinct, times
    return ids, counts


def test_draws_give_the_full_kls_gradient_on_average() -> None:
    case = Case(4, 12, 5, 12, LossConfig(gamma=1.0))
    entropy_T = -(case.at_TV * case.at_TV.log()).sum(-1).float()
    loss = LossConfig(gamma=1.0, tail="sampled")
    found_kl, found = [], []
    for seed in range(400):
        hidden_TD = case.hidden_TD.clone().requires_grad_()
        teacher = sampled_side(*drawn(case.dense_TV, 8, seed), entropy_T)
        sums = fused_loss(hidden_TD, case.weight_VD, case.labels_T, teacher, loss)
        sums.total.backward()
        found_kl.append(sums.kl.item())
        found.append(hidden_TD.grad)
    _, kl_, of_hidden, _ = case.truth()
    gradients = torch.stack(found).double()
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - of_hidden).abs() < 4.5 * error + 1e-6).all()
    assert error.max() < 0.2 * of_hidden.abs().max()
    assert np.mean(found_kl) == pytest.approx(kl_.item(), abs=4 * np.std(found_kl) / math.sqrt(len(found_kl)))
    # What a renormalised top k of as many tokens would give is another gradient.
    cut = Case(4, 12, 5, 3, LossConfig(gamma=1.0, tail="renormalise"))
    assert (cut.truth()[2] - of_hidden).abs().max() > 5 * error.max()


def test_without_the_entropy_the_gradient_is_the_same() -> None:
    case, loss = Case(4, 12, 5, 12, LossConfig()), LossConfig(gamma=1.0, tail="sampled")
    gradients, values = [], []
    for entropy_T in (None, torch.ones(4)):
        hidden_TD = case.hidden_TD.clone().requires_grad_()
        teacher = sampled_side(*drawn(case.dense_TV, 8, 0), entropy_T)
        sums = fused_loss(hidden_TD, case.weight_VD, case.labels_T, teacher, loss)
        sums.total.backward()
        gradients.append(hidden_TD.grad)
        values.append(sums.kl.item())
    torch.testing.assert_close(*gradients)
    assert values[0] != values[1]


# From stored targets


def stored(**more: Any) -> SparseTargets:
    return SparseTargets(
        ids_BLK=np.array([[[3, 1], [2, 0]], [[5, 4], [0, 0]]], np.int32),
        logprobs_BLK=np.log(np.array([[[0.5, 0.2], [0.6, 0.3]], [[0.4, 0.4], [0.9, 0.0]]], np.float32) + 1e-38),
        tail_mass_BL=np.array([[0.3, 0.1], [0.2, 0.1]], np.float32),
        true_logprobs_BL=np.zeros((2, 2), np.float32),
        **more,
    )


def test_a_teacher_from_stored_targets() -> None:
    teacher = teacher_of(stored(), LossConfig(), rows=slice(1, 2))
    assert teacher.ids_TK.tolist() == [[5, 4], [0, 0]]
    assert teacher.ids_TK.dtype == torch.int64
    torch.testing.assert_close(teacher.log_tail_T.exp(), torch.tensor([0.2, 0.1]))
    assert len(teacher) == 2
    with pytest.raises(ValueError, match=r"temperature is 2.0 and the targets hold no tail mass at it; add it to"):
        teacher_of(stored(), LossConfig(temperature=2.0))
    at_two = np.full((2, 2), 0.4, np.float32)
    heated = teacher_of(stored(tail_mass_at={2.0: at_two}), LossConfig(temperature=2.0))
    torch.testing.assert_close(heated.log_p_TK.exp().sum(-1) + heated.log_tail_T.exp(), torch.ones(4))
    root = 0.5**0.5 / (0.5**0.5 + 0.2**0.5)
    assert heated.log_p_TK.exp()[0, 0].item() == pytest.approx(0.6 * root, rel=1e-5)
    with pytest.raises(ValueError, match=r"the targets hold no random draws; set teacher.draws"):
        teacher_of(stored(), LossConfig(tail="sampled"))
    counts = np.array([[[3, 1], [4, 0]], [[2, 2], [1, 3]]], np.int32)
    sampled = SampledTokens(ids_BLN=np.array([[[0, 1], [2, 0]], [[1, 2], [3, 4]]], np.int32), counts_BLN=counts)
    teacher = teacher_of(stored(sampled=sampled), LossConfig(tail="sampled"))
    assert teacher.log_p_TK.exp().tolist() == [[0.75, 0.25], [1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]


def test_what_cannot_be_known_is_refused() -> None:
    with pytest.raises(ValidationError, match="reverse_kl with tail 'residual' is infinite"):
        LossConfig(divergence="reverse_kl", tail="residual")
    for wrong in ({"divergence": "reverse_kl"}, {"divergence": "jensen_shannon"}, {"temperature": 2.0}):
        with pytest.raises(ValidationError, match="drawn at temperature 1 and estimates the forward KL alone"):
            LossConfig(tail="sampled", **wrong)


def test_reverse_kl_of_a_tail_stored_as_nothing_is_finite() -> None:
    loss = LossConfig(gamma=1.0, divergence="reverse_kl")
    logits_TV = torch.zeros(1, 10, requires_grad=True)
    teacher = teacher_side(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]).log(), torch.zeros(1), loss)
    sums = dense_loss(logits_TV, torch.tensor([0]), teacher, loss)
    sums.total.backward()
    expected = 0.1 * math.log(0.1 / 0.6) + 0.1 * math.log(0.1 / 0.4) + 0.8 * math.log(0.8 / SMALLEST_TAIL)
    assert sums.kl.item() == pytest.approx(expected, rel=1e-5)
    assert logits_TV.grad.isfinite().all()


# In a student


def students() -> dict[str, Any]:
    shape = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    qwen = {"hidden_size": 16, "intermediate_size": 24, **shape, **ids}
    return {
        "untied": (Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **qwen)), True),
        "tied": (Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **qwen)), True),
        "gpt2": (GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, **ids)), True),
        "soft cap": (Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=0.5, **qwen)), False),
    }


@pytest.mark.parametrize("name", ["untied", "tied", "gpt2", "soft cap"])
def test_a_students_gradients_are_those_of_its_logits(name: str) -> None:
    """Every weight's, embeddings that are also the projection among them; with masked positions."""
    model, is_projection = students()[name]
    model.eval()
    with torch.no_grad():  # logits that a cap changes
        model.get_output_embeddings().weight.mul_(20.0)
    loss = LossConfig(gamma=0.7)
    student = StudentLoss(model, 36, loss)
    assert student.fused is is_projection
    tokens_BL = torch.randint(36, (2, 7), generator=torch.Generator().manual_seed(1))
    valid_BL = torch.tensor([[True, False, True, True, True, False], [False, True, True, False, True, True]])
    case = Case(12, 36, 4, 5, loss)
    total, ce, _ = student(tokens_BL[:, :-1], tokens_BL[:, 1:], valid_BL, case.teacher, 0.25)
    total.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits_TV = model(tokens_BL[:, :-1]).logits[..., :36].flatten(0, 1)[valid_BL.flatten()].double()
    labels_T = tokens_BL[:, 1:].flatten()[valid_BL.flatten()]
    expected_ce = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    chosen = Case(12, 36, 4, 5, loss)
    chosen.ids_TK, chosen.labels_T = case.ids_TK[valid_BL.flatten()], labels_T
    expected = 0.25 * (
        expected_ce + 0.7 * dense_divergence(case.at_TV[valid_BL.flatten()], logits_TV.softmax(-1), chosen)
    )
    expected.backward()
    assert ce.item() == pytest.approx(expected_ce.item(), rel=1e-5)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[parameter_name], parameter.grad, rtol=1e-3, atol=1e-4, msg=parameter_name)
    assert max(gradient.abs().max() for gradient in ours.values()) > 1e-2
