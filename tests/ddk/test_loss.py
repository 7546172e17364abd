from __future__ import annotations

import math
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from ddk.fused import dense_loss, fused_loss
from ddk.loss import LossSums, teacher_side
from ddk.train_config import LossConfig

TAILS = ("bucket", "renormalise", "residual")


class Sums(NamedTuple):
    """Both terms apart, each with its gradient."""

    ce: Tensor
    kl: Tensor


PATHS = ("logits", "projection")
path = PATHS[0]


@pytest.fixture(autouse=True, params=PATHS)
def _each_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is asked twice: of the loss on logits, and of the one fused with a projection (the identity here,
    in chunks of three positions). Large vocabularies have no room for that."""
    monkeypatch.setattr(sys.modules[__name__], "path", request.param)


def sums_of(logits: Tensor, labels: Tensor, teacher: object, loss: LossConfig) -> LossSums:
    if path == "logits" or logits.shape[1] > 1000:
        return dense_loss(logits, labels, teacher, loss)
    one = torch.eye(logits.shape[1], dtype=logits.dtype)
    return fused_loss(logits, one, labels, teacher, loss, chunk_bytes=3 * 4 * logits.shape[1])


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return sums_of(logits, labels, None, LossConfig(gamma=0.0)).total


def distillation_sums(logits, labels, ids, logprobs, tail_mass, *, tail="bucket", temperature=1.0) -> Sums:
    loss = LossConfig(gamma=1.0, tail=tail, temperature=temperature)
    both = sums_of(logits, labels, teacher_side(ids, logprobs, tail_mass, loss), loss)
    ce = cross_entropy_sum(logits, labels)
    assert ce.item() == pytest.approx(both.ce.item(), rel=1e-5, abs=1e-5 * max(1.0, logits.abs().max().item()))
    assert both.total.item() == pytest.approx((both.ce + both.kl).item(), rel=1e-6)
    # Gradients only go through the total; the value is the sum's own, without what subtracting would cancel.
    kl = both.total - ce
    return Sums(ce, both.kl + (kl - kl.detach()))


def case(T: int, V: int, k: int, *, seed: int = 0, scale: float = 2.0, label_in_set: bool | None = None):
    """Student logits, labels, and a teacher cut to its k most probable tokens, as `distillation_sums` takes them."""
    random = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(T, V, generator=random)
    teacher = (2.0 * torch.randn(T, V, generator=random, dtype=torch.float64)).log_softmax(-1)
    order = teacher.argsort(-1, descending=True)
    ids, others = order[:, :k], order[:, k:]
    rows = torch.arange(T)
    labels = torch.randint(V, (T,), generator=random)
    if label_in_set is True:
        labels = ids[rows, rows % k]
    elif label_in_set is False:
        labels = others[rows, rows % (V - k)]
    tail = teacher.gather(-1, others).exp().sum(-1) if k < V else torch.zeros(T)
    return logits, labels, ids, teacher.gather(-1, ids).float(), tail.float()


def p_log_p_over_q(p: float | Tensor, q: Tensor) -> Tensor:
    return torch.as_tensor(p, dtype=torch.float64) * (math.log(p) - torch.log(q)) if p > 0 else torch.zeros(())


def reference(
    logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, how: str, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The docstring's formulas, token by token, over dense float64 probabilities."""
    ce = kl = torch.zeros((), dtype=torch.float64)
    for z, y, stored, log_p, r in zip(
        logits.double(), labels.tolist(), ids.tolist(), logprobs.double(), tail.double().tolist(), strict=True
    ):
        q = torch.softmax(z, 0)
        ce = ce - torch.log(q[y])
        # An entry of −inf is no entry: its token is one of those outside.
        stored = [token for token, one in zip(stored, log_p.tolist(), strict=True) if one > -math.inf]  # noqa: PLW2901
        p = [math.exp(one) for one in log_p.tolist() if one > -math.inf]
        if how == "bucket":
            outside = [token for token in range(len(z)) if token not in stored]
            for token, p_i in zip(stored, p, strict=True):
                kl = kl + p_log_p_over_q(p_i, q[token])
            if outside:
                kl = kl + p_log_p_over_q(r, q[outside].sum())
        elif how == "renormalise":
            p_hat = torch.tensor(p).double() ** (1 / temperature)
            p_hat = (p_hat / p_hat.sum()).tolist()
            q_hat = torch.softmax(z / temperature, 0)[stored]
            q_hat = q_hat / q_hat.sum()
            for p_i, q_i in zip(p_hat, q_hat, strict=True):
                kl = kl + p_log_p_over_q(p_i, q_i)
        else:
            dense = dict(zip(stored, p, strict=True))
            dense[y] = dense.get(y, 0.0) + r
            for token, p_i in dense.items():
                kl = kl + p_log_p_over_q(p_i, q[token])
    return ce, kl


def full_kl(teacher_logprobs: Tensor, logits: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(
        logits.double().log_softmax(-1), teacher_logprobs.double(), log_target=True, reduction="sum"
    )


def assert_matches(arguments, tail: str, temperature: float = 1.0, tolerance: float = 2e-6) -> None:
    """Losses, and the gradients of both terms apart, against float64."""
    logits = arguments[0]
    for term in (0, 1):
        truth_input = logits.double().requires_grad_()
        truth = reference(truth_input, *arguments[1:], tail, temperature)
        (truth_gradient,) = torch.autograd.grad(truth[term], truth_input)
        ours_input = logits.clone().requires_grad_()
        sums = distillation_sums(ours_input, *arguments[1:], tail=tail, temperature=temperature)
        ours = (sums.ce, sums.kl)[term]
        (gradient,) = torch.autograd.grad(ours, ours_input)
        assert ours.dtype == torch.float32
        assert ours.shape == ()
        positions = len(logits)
        assert abs(ours.double() - truth[term]).item() <= tolerance * (truth[term].abs().item() + positions)
        assert (gradient.double() - truth_gradient).abs().max().item() <= tolerance
        # A gradient that is right because it is all zero would prove nothing.
        assert truth_gradient.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("tail", "k", "label_in_set"),
    [
        (tail, k, label_in_set)
        for tail in TAILS
        for k in (1, 3, 12)
        for label_in_set in (True, False)
        if not (tail == "renormalise" and k == 1)  # its KL over one token is 0: tested below
        and (label_in_set or k < 12)
    ],
)
def test_against_the_formulas_in_float64(tail: str, k: int, label_in_set: bool) -> None:
    assert_matches(case(7, 12, k, label_in_set=label_in_set), tail)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0, 7.0])
@pytest.mark.parametrize("k", [3, 12])
def test_temperatures_against_float64(k: int, temperature: float) -> None:
    # The gradient at T is 1/T of a difference of probabilities: float32's own error grows by as much.
    assert_matches(
        case(7, 12, k), "renormalise", temperature=temperature, tolerance=2e-6 * max(1.0, 1 / temperature) ** 2
    )


@given(
    seed=st.integers(0, 10_000),
    T=st.integers(1, 5),
    V=st.integers(2, 20),
    k=st.integers(1, 20),
    tail=st.sampled_from(TAILS),
    scale=st.sampled_from([0.0, 0.5, 5.0]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_against_float64(seed, T, V, k, tail, scale) -> None:
    k = min(k, V)
    logits, *rest = case(T, V, k, seed=seed, scale=scale)
    ce, kl = reference(logits, *rest, tail)
    sums = distillation_sums(logits, *rest, tail=tail)
    assert sums.ce.item() == pytest.approx(ce.item(), rel=1e-5, abs=1e-5)
    assert sums.kl.item() == pytest.approx(kl.item(), rel=1e-5, abs=1e-5)
    assert sums.kl.item() >= -1e-5


@pytest.mark.parametrize("leftover", [0.0, 1e-7])
@pytest.mark.parametrize("tail", TAILS)
def test_with_everything_stored_each_is_the_full_kl(tail: str, leftover: float) -> None:
    """Also where rounding left a little tail mass: outside there is no token that could have it."""
    logits, labels, ids, logprobs, _ = case(6, 9, 9)
    dense = torch.full((6, 9), -torch.inf).scatter(-1, ids, logprobs)
    ours_input, truth_input = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = distillation_sums(ours_input, labels, ids, logprobs, torch.full((6,), leftover), tail=tail).kl
    truth = full_kl(dense, truth_input)
    assert ours.item() == pytest.approx(truth.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(ours, ours_input)
    (expected,) = torch.autograd.grad(truth, truth_input)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-6)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_the_bucket_is_a_lower_bound_that_rises_with_k(seed, k) -> None:
    V = 10
    bounds = [distillation_sums(*case(4, V, n, seed=seed), tail="bucket").kl.item() for n in (k, k + 1)]
    logits, _, ids, logprobs, _ = case(4, V, V, seed=seed)
    whole = full_kl(torch.zeros(4, V).scatter(-1, ids, logprobs), logits).item()
    assert -1e-5 <= bounds[0] <= bounds[1] + 1e-5
    assert bounds[1] <= whole + 1e-5


def test_a_perfect_student_has_no_kl_and_no_gradient() -> None:
    _, labels, ids, logprobs, tail = case(5, 11, 3)
    dense = torch.log((tail / 8).expand(11, 5).T.contiguous()).scatter(-1, ids, logprobs).requires_grad_()
    for how in ("bucket", "renormalise"):
        kl = distillation_sums(dense, labels, ids, logprobs, tail, tail=how).kl
        assert abs(kl.item()) < 1e-5
        (gradient,) = torch.autograd.grad(kl, dense)
        assert gradient.abs().max() < 1e-6


def test_renormalise_has_no_gradient_outside_the_set() -> None:
    logits, labels, ids, logprobs, tail = case(5, 11, 3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(
        distillation_sums(logits, labels, ids, logprobs, tail, tail="renormalise").kl, logits
    )
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, value=False)
    assert gradient[outside].abs().max() < 2e-7  # that of the cross-entropy is taken away with its own rounding
    assert gradient[~outside].abs().max() > 1e-2
    one = distillation_sums(logits, labels, ids[:, :1], logprobs[:, :1], tail, tail="renormalise").kl
    assert one.item() == 0.0


@pytest.mark.parametrize("tail", TAILS)
def test_entries_past_the_mass_cut_off(tail: str) -> None:
    """−inf log-probabilities: as if those entries were not there."""
    logits, labels, ids, logprobs, _ = case(6, 12, 4)
    logprobs[:, 2:] = -torch.inf
    tail_mass = 1 - logprobs.exp().sum(-1)
    assert_matches((logits, labels, ids, logprobs, tail_mass), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_no_tail_mass_at_all(tail: str) -> None:
    logits, labels, ids, logprobs, _ = case(6, 12, 4)
    assert_matches((logits, labels, ids, logprobs.log_softmax(-1), torch.zeros(6)), tail)


def test_nothing_but_tail() -> None:
    logits, labels, ids, _, _ = case(6, 12, 4, label_in_set=False)
    assert_matches((logits, labels, ids, torch.full((6, 4), -torch.inf), torch.ones(6)), "residual")


@pytest.mark.parametrize("tail", TAILS)
def test_a_one_hot_teacher(tail: str) -> None:
    logits, _, ids, _, _ = case(6, 12, 4)
    logprobs = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf]).repeat(6, 1)
    sums = distillation_sums(logits, ids[:, 0], ids, logprobs, torch.zeros(6), tail=tail)
    if tail == "renormalise":
        assert sums.kl.item() < sums.ce.item()
    else:
        assert sums.kl.item() == pytest.approx(sums.ce.item(), rel=1e-6)
    if tail != "renormalise":  # over the one token there is nothing to learn
        assert_matches((logits, ids[:, 0], ids, logprobs, torch.zeros(6)), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_ties(tail: str) -> None:
    logits, labels, ids, logprobs, tail_mass = case(5, 8, 4)
    logits[:, ::2] = 1.25
    logprobs[:] = math.log(0.2)
    assert_matches((logits, labels, ids, logprobs, torch.full_like(tail_mass, 0.2)), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_the_order_of_the_entries_is_irrelevant(tail: str) -> None:
    logits, labels, ids, logprobs, tail_mass = case(5, 30, 8)
    mixed = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    one = distillation_sums(logits, labels, ids, logprobs, tail_mass, tail=tail)
    other = distillation_sums(logits, labels, ids[:, mixed], logprobs[:, mixed], tail_mass, tail=tail)
    assert one.kl.item() == pytest.approx(other.kl.item(), rel=1e-5)
    assert one.ce.item() == pytest.approx(other.ce.item(), rel=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_one_token(tail: str) -> None:
    """T = 1, K = 1, and a vocabulary of one: no choice, no loss."""
    logits = torch.tensor([[3.0]], requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int64)
    sums = distillation_sums(logits, zero, zero[None], torch.zeros(1, 1), torch.zeros(1), tail=tail)
    assert (sums.ce.item(), sums.kl.item()) == (0.0, 0.0)
    (gradient,) = torch.autograd.grad(sums.ce + sums.kl, logits)
    assert gradient.item() == 0.0
    assert_matches(case(1, 5, 2), tail)


@pytest.mark.parametrize("tail", TAILS)
def test_ids_beyond_17_bits(tail: str) -> None:
    """Ids that 17 bits would alias, in a vocabulary of Qwen's padded size."""
    V, T, k = 152_064, 3, 4
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(T, V, generator=random)
    ids = torch.tensor([[131_072, 0, 151_935, 152_063], [5, 131_073, 151_000, 1], [152_063, 140_000, 8_991, 2]])
    logits.scatter_(-1, ids, 9.0 + torch.randn(T, k, generator=random))
    labels = torch.tensor([152_063, 131_072, 9])
    logprobs = torch.tensor([0.5, 0.2, 0.1, 0.05]).log().repeat(T, 1)
    tail_mass = torch.full((T,), 0.15)
    q = logits.double().softmax(-1)
    ce = -q[range(T), labels].log().sum().item()
    stored = q.gather(-1, ids)
    p = logprobs.double().exp()
    kl = (p * (p.log() - stored.log())).sum(-1)
    if tail == "bucket":
        kl = kl + 0.15 * (math.log(0.15) - (1 - stored.sum(-1)).log())
    elif tail == "renormalise":
        p, stored = p / p.sum(-1, keepdim=True), stored / stored.sum(-1, keepdim=True)
        kl = (p * (p.log() - stored.log())).sum(-1)
    else:
        p[0, 3] += 0.15  # the label of position 0 is stored; those of 1 and 2 are not
        kl = (p * (p.log() - stored.log())).sum(-1)
        for position in (1, 2):
            kl[position] += 0.15 * (math.log(0.15) - q[position, labels[position]].log())
    sums = distillation_sums(logits, labels, ids, logprobs, tail_mass, tail=tail)
    assert sums.ce.item() == pytest.approx(ce, rel=1e-6)
    assert sums.kl.item() == pytest.approx(kl.sum().item(), rel=1e-5)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("where", ["stored", "outside", "all", "label"])
@pytest.mark.parametrize("tail", TAILS)
def test_extreme_logits_stay_finite(tail: str, where: str, size: float) -> None:
    logits, labels, ids, logprobs, tail_mass = case(6, 12, 4, label_in_set=False)
    if where == "all":
        logits += size
    elif where == "label":
        logits.scatter_(-1, labels[:, None], size)
    else:
        inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, value=True)
        logits[inside if where == "stored" else ~inside] += size
    logits.requires_grad_()
    sums = distillation_sums(logits, labels, ids, logprobs, tail_mass, tail=tail)
    (gradient,) = torch.autograd.grad(sums.ce + sums.kl, logits)
    assert math.isfinite(sums.ce.item())
    assert math.isfinite(sums.kl.item())
    assert gradient.isfinite().all()
    truth = -logits.detach().double().log_softmax(-1).gather(-1, labels[:, None]).sum()
    assert sums.ce.item() == pytest.approx(truth.item(), rel=1e-3, abs=2e-2)  # float32 near 1e4: steps of 1e-3


def test_the_tails_share_does_not_cancel() -> None:
    """q_r of 1e-12 is below float32's 1 − Σq; the log-sum-exp outside keeps it."""
    logits = torch.full((1, 10), -30.0)
    logits[0, :2] = torch.tensor([1.0, 1.0])
    ids, labels = torch.tensor([[0, 1]]), torch.tensor([0])
    arguments = (logits, labels, ids, torch.tensor([[0.45, 0.45]]).log(), torch.tensor([0.1]))
    ours = distillation_sums(*arguments, tail="bucket").kl.item()
    assert ours == pytest.approx(reference(*arguments, "bucket")[1].item(), rel=1e-6)
    assert ours > 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
def test_logits_in_half_precision(tail: str, dtype: torch.dtype) -> None:
    """Their values are taken as they are; all arithmetic is float32."""
    logits, *rest = case(6, 12, 4)
    half = logits.to(dtype).requires_grad_()
    sums = distillation_sums(half, *rest, tail=tail)
    same = distillation_sums(half.detach().float(), *rest, tail=tail)
    assert (sums.ce.item(), sums.kl.item()) == (same.ce.item(), same.kl.item())
    assert cross_entropy_sum(half, rest[0]).item() == pytest.approx(sums.ce.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(sums.ce + sums.kl, half)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_teacher_in_half_precision_and_no_gradient_to_it() -> None:
    logits, labels, ids, logprobs, tail_mass = case(6, 12, 4)
    teacher = logprobs.half().requires_grad_()
    sums = distillation_sums(logits.requires_grad_(), labels, ids, teacher.detach(), tail_mass.half())
    assert sums.kl.item() == pytest.approx(
        distillation_sums(logits, labels, ids, logprobs, tail_mass).kl.item(), rel=1e-2
    )


@pytest.mark.parametrize("tail", TAILS)
def test_cross_entropy_is_that_of_torch(tail: str) -> None:
    arguments = case(40, 30, 5)
    ce = distillation_sums(*arguments, tail=tail).ce.item()
    assert ce == pytest.approx(cross_entropy_sum(*arguments[:2]).item(), rel=1e-6)
    expected = torch.nn.functional.cross_entropy(arguments[0].double(), arguments[1], reduction="sum").item()
    assert ce == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_the_sums_of_parts_are_the_sum_of_the_whole(tail: str) -> None:
    arguments = case(10, 12, 4)
    whole = distillation_sums(*arguments, tail=tail)
    parts = [distillation_sums(*(a[at] for a in arguments), tail=tail) for at in (slice(0, 3), slice(3, 10))]
    assert sum(part.kl.item() for part in parts) == pytest.approx(whole.kl.item(), rel=1e-5)
    assert sum(part.ce.item() for part in parts) == pytest.approx(whole.ce.item(), rel=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "residual"])
def test_a_temperature_needs_its_tail(tail: str) -> None:
    with pytest.raises(ValueError, match=r"temperature 2.0 needs the tail's mass at it"):
        distillation_sums(*case(2, 5, 2), tail=tail, temperature=2.0)
    assert LossConfig(temperature=2.0, tail=tail).tail_temperature == 2.0
    assert LossConfig(temperature=2.0, tail="renormalise").tail_temperature is None
    assert LossConfig(temperature=2.0, tail=tail, gamma=0.0).tail_temperature is None


def test_config() -> None:
    assert LossConfig() == LossConfig(gamma=0.2, temperature=1.0, tail="bucket")
    assert LossConfig(temperature=0.5, tail="renormalise").temperature == 0.5
    for wrong in ({"gamma": -0.1}, {"temperature": 0.0}, {"tail": "none"}, {"beta": 1.0}):
        with pytest.raises(ValidationError):
            LossConfig.model_validate(wrong)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "residual"])
def test_what_is_no_entry_changes_nothing(tail: str) -> None:
    """K entries, and the same padded with entries of −inf and id 0: one loss, one gradient."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 40, generator=generator)
    teacher = (torch.randn(6, 40, generator=generator) * 2).log_softmax(-1)
    top = teacher.topk(5)
    labels = torch.tensor([0, 1, 0, 3, int(top.indices[4, 2]), 5])
    tail_mass = 1 - top.values.exp().sum(-1)
    ids = torch.cat([top.indices, torch.zeros(6, 3, dtype=torch.int64)], dim=1)
    logprobs = torch.cat([top.values, torch.full((6, 3), -torch.inf)], dim=1)
    results = []
    for given_ids, given_logprobs in ((top.indices, top.values), (ids, logprobs)):
        student = logits.clone().requires_grad_()
        sums = distillation_sums(student, labels, given_ids, given_logprobs, tail_mass, tail=tail)
        (sums.ce + sums.kl).backward()
        results.append((sums.ce.detach(), sums.kl.detach(), student.grad))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(plain, padded)


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "residual"])
def test_a_position_without_any_entry_gives_finite_gradients(tail: str) -> None:
    student = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, logprobs = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -torch.inf)
    labels = torch.tensor([4, 0])
    sums = distillation_sums(student, labels, ids, logprobs, torch.ones(2), tail=tail)
    sums.kl.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    if tail == "residual":  # all of the teacher's mass is the label's: KL = −log q(label)
        expected = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
        torch.testing.assert_close(sums.kl, expected)
    else:  # nothing is known of the distribution, so there is nothing to follow
        assert sums.kl.item() == pytest.approx(0.0, abs=1e-6)
        assert student.grad.abs().max() < 1e-6
