from __future__ import annotations

import errno
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fake_data import MIXTURE, PADDED, SIZES, Blocks, K, L, V, tiny_model, train_data
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel

from ddk import saving
from ddk.data import TrainData
from ddk.mixture import equal_mixture
from ddk.sampler import SamplerState, draw, initial_state
from ddk.schedule import learning_rate
from ddk.train_config import LossConfig, TrainConfig
from ddk.trainer import StepReport, Trainer, TrainerState, resolve_device, resolve_precision
from ddk.values import Draw, Mixture


def with_dropout() -> GPT2LMHeadModel:
    """Dropout on embeddings, attention and residuals, and biases everywhere; tied."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=PADDED, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None
        )
    )


def train_config(**changes) -> TrainConfig:
    settings = {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 3}
    return TrainConfig(**{**settings, "device": "cpu", "precision": "fp32", **changes})


def trainer(
    model=None,
    data: TrainData | None = None,
    *,
    gamma: float = 0.2,
    seed: int = 1,
    loss: LossConfig | None = None,
    **changes,
) -> Trainer:
    return Trainer(
        tiny_model() if model is None else model,
        data or train_data(targets=gamma > 0),
        config=train_config(**changes),
        loss=loss or LossConfig(gamma=gamma),
        vocab_size=V,
        seed=seed,
    )


def weights(one: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in one.parameters.items()}


def everything(one: Trainer) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's moments."""
    return {name: tensor.clone() for name, tensor in saving._live(one, one.state).items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def run(one: Trainer, steps: int, mixture: Mixture = MIXTURE, version: int = 0) -> list[StepReport]:
    reports: list[StepReport] = []
    one.train_interval(mixture, version, steps, reports.append)
    return reports


# The learning rate


def test_the_learning_rates_example() -> None:
    config = train_config(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 4) == pytest.approx(0.5)
    assert learning_rate(config, 9) == pytest.approx(1.0)
    assert learning_rate(config, 59) == pytest.approx(0.55)  # half-way down the cosine
    assert learning_rate(config, 109) == pytest.approx(0.1)


def test_the_learning_rate_rises_and_then_falls() -> None:
    config = train_config(steps=50, warmup_steps=7)
    rates = [learning_rate(config, step) for step in range(50)]
    assert rates[:7] == sorted(rates[:7])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert max(rates) == config.learning_rate
    assert min(rates[6:]) == pytest.approx(config.min_learning_rate)
    assert rates[0] > 0


@pytest.mark.parametrize("warmup", [5, 6, 1000])
def test_a_warmup_as_long_as_the_training_ends_at_the_peak(warmup: int) -> None:
    config = train_config(steps=5, warmup_steps=warmup, learning_rate=1.0)
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_without_a_warmup() -> None:
    config = train_config(steps=4, warmup_steps=0, learning_rate=1.0, min_learning_rate=0.0)
    rates = [learning_rate(config, step) for step in range(4)]
    assert rates == pytest.approx([(1 + math.cos(math.pi * share)) / 2 for share in (0.25, 0.5, 0.75, 1.0)])
    assert learning_rate(train_config(steps=1, warmup_steps=0), 0) == pytest.approx(1e-3)


def test_a_run_that_goes_on_warms_up_from_there() -> None:
    config = train_config(steps=60, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    shorter = train_config(steps=40, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    assert [learning_rate(config, step, 20) for step in range(20, 60)] == pytest.approx(
        [learning_rate(shorter, step) for step in range(40)]
    )


def test_warm_up_stable_decay() -> None:
    config = train_config(
        steps=20, warmup_steps=4, learning_rate=1.0, min_learning_rate=0.2, schedule="wsd", decay_share=0.2
    )
    rates = [learning_rate(config, step) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 12 + [0.8, 0.6, 0.4, 0.2])
    longer = config.model_copy(update={"steps": 30})
    assert [learning_rate(longer, step) for step in range(16)] == rates[:16]
    assert learning_rate(train_config(steps=1, schedule="wsd", warmup_steps=0), 0) == pytest.approx(1e-3)


def test_each_step_uses_its_rate() -> None:
    one = trainer()
    assert [report.learning_rate for report in run(one, 6)] == [learning_rate(one.config, step) for step in range(6)]


# Against a plain loop


def plain_steps(model, data: TrainData, steps: int, config: TrainConfig, gamma: float) -> None:
    """Dense and unhurried: mean over all positions of CE + γ·KL(bucket), clipped, AdamW with decay on matrices."""
    model.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
    )
    state = initial_state(data.sizes)
    for step in range(steps):
        draws, state = draw(MIXTURE, data.sizes, 1, state, config.batch_size)
        loss = dense_loss(model, data, draws, gamma)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()


def dense_loss(model, data: TrainData, draws: tuple[Draw, ...], gamma: float, ce_weight: float = 1.0) -> torch.Tensor:
    tokens = torch.from_numpy(np.stack([data.blocks[one.domain].tokens[one.index] for one in draws])).long()
    log_q = model(tokens[:, :-1]).logits[..., :V].double().log_softmax(-1)
    loss = ce_weight * -log_q.gather(-1, tokens[:, 1:, None]).mean()
    if gamma:
        dense = torch.from_numpy(np.stack([data.targets[one.domain].dense[one.index] for one in draws]))
        p, order = dense.exp(), dense.argsort(-1, descending=True)
        p_kept = p.gather(-1, order)[..., :K]
        q_kept = log_q.exp().gather(-1, order)[..., :K]
        p_rest, q_rest = 1 - p_kept.sum(-1), 1 - q_kept.sum(-1)
        kl = (p_kept * (p_kept / q_kept).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
        loss = loss + gamma * kl.mean()
    return loss


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_three_steps_equal_a_plain_loop(gamma: float) -> None:
    one = trainer(gamma=gamma)
    expected = tiny_model()
    plain_steps(expected, train_data(), 3, one.config, gamma)
    run(one, 3)
    for name, parameter in expected.named_parameters():
        # Adam divides by the gradient's own size: entries near zero turn rounding into part of a step (1e-2).
        torch.testing.assert_close(weights(one)[name], parameter.detach(), rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(("gamma", "ce_weight"), [(0.0, 1.0), (3.0, 1.0)])
def test_the_gradients_of_both_terms_reach_the_weights(gamma: float, ce_weight: float) -> None:
    """Complaint 10 of peers.md: a term whose gradient is silently lost. γ = 3 is told apart from CE alone."""
    one = trainer(gamma=gamma, gradient_clip=None)
    reference, data = tiny_model(), train_data()
    draws, _ = draw(MIXTURE, data.sizes, 1, initial_state(data.sizes), 4)
    dense_loss(reference, data, draws, gamma, ce_weight).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    run(one, 1)
    for name, parameter in one.model.named_parameters():
        assert expected[name].abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_ce_and_kl_gradients_differ() -> None:
    """What the test above rests on: each term alone gives another gradient than the sum."""
    data = train_data()
    draws, _ = draw(MIXTURE, data.sizes, 1, initial_state(data.sizes), 4)
    gradients = []
    for gamma, ce_weight in ((0.0, 1.0), (3.0, 0.0), (3.0, 1.0)):
        model = tiny_model()
        dense_loss(model, data, draws, gamma, ce_weight).backward()
        gradients.append(model.lm_head.weight.grad[:V])
    ce, kl, both = gradients
    torch.testing.assert_close(ce + kl, both)
    assert min(ce.norm(), kl.norm(), (ce - kl).norm()) > 0.05 * both.norm()


def test_the_report_of_a_step() -> None:
    one, reference, data = trainer(gamma=0.7), tiny_model(), train_data()
    draws, _ = draw(MIXTURE, data.sizes, 1, initial_state(data.sizes), 4)
    ce = dense_loss(reference, data, draws, 0.0).item()
    kl = dense_loss(reference, data, draws, 1.0, ce_weight=0.0).item()
    (report,) = run(one, 1)
    assert report.step == 1
    assert report.ce == pytest.approx(ce, rel=1e-5)
    assert report.kl == pytest.approx(kl, rel=1e-4)
    assert report.loss == pytest.approx(ce + 0.7 * kl, rel=1e-4)
    assert report.tokens == 4 * L
    assert report.gradient_norm > 0
    assert report.seconds >= report.waited_seconds >= 0


def test_padded_rows_learn_nothing() -> None:
    one = trainer(weight_decay=0.0)
    before = weights(one)["lm_head.weight"]
    run(one, 3)
    after = weights(one)["lm_head.weight"]
    assert torch.equal(after[V:], before[V:])
    assert not torch.equal(after[:V], before[:V])


# Micro-batches, clipping, decay, precision


@pytest.mark.parametrize("gamma", [0.0, 0.2])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(micro: int, gamma: float) -> None:
    whole, parts = trainer(gamma=gamma), trainer(gamma=gamma, micro_batch_size=micro)
    reports, part_reports = run(whole, 3), run(parts, 3)
    for one, other in zip(reports, part_reports, strict=True):
        assert (one.ce, one.kl) == pytest.approx((other.ce, other.kl), rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    for name, tensor in weights(whole).items():
        difference = weights(parts)[name] - tensor
        # A key's bias shifts all of a query's scores nearly alike: its gradient is almost nothing, and Adam, which
        # divides by the gradient's size, magnifies the rounding in it.
        if not name.endswith("k_proj.bias"):
            assert difference.norm() < 1e-6 * tensor.norm(), name
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_micro_batches_of_any_size_have_the_same_gradient() -> None:
    gradients = []
    for micro in (None, 1, 3):
        one = trainer(batch_size=6, micro_batch_size=micro, gradient_clip=None)
        run(one, 1)
        gradients.append({name: parameter.grad for name, parameter in one.model.named_parameters()})
    for name in gradients[0]:
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradients[0][name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_gradient_is_clipped_and_its_norm_reported_unclipped() -> None:
    free, clipped = trainer(gradient_clip=None), trainer(gradient_clip=1e-3)
    (one,), (other,) = run(free, 1), run(clipped, 1)
    assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)
    norms = [
        torch.stack([parameter.grad.norm() for parameter in each.model.parameters()]).norm().item()
        for each in (free, clipped)
    ]
    assert norms == pytest.approx([one.gradient_norm, 1e-3], rel=1e-3)


def test_weight_decay_is_on_matrices_only() -> None:
    """One step from equal weights: with decay, matrices shrink by rate · decay · weight; the rest is unmoved by it."""
    plain, decayed = trainer(weight_decay=0.0), trainer(weight_decay=0.5)
    before = weights(plain)
    (report,) = run(plain, 1)
    run(decayed, 1)
    for name, tensor in weights(decayed).items():
        difference = weights(plain)[name] - tensor
        if before[name].ndim >= 2:
            torch.testing.assert_close(difference, report.learning_rate * 0.5 * before[name], rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(difference, torch.zeros_like(difference)), name
    assert {tensor.ndim for tensor in before.values()} == {1, 2}


def test_it_overfits_a_few_blocks() -> None:
    sizes = {"code": 2, "web": 2}
    one = trainer(data=train_data(targets=False, sizes=sizes), gamma=0.0, steps=80, learning_rate=2e-2)
    reports = run(one, 80, equal_mixture(["code", "web"]))
    assert reports[0].ce > 3.0
    assert reports[-1].ce < 0.2
    assert all(report.kl == 0.0 for report in reports)


def test_the_kl_falls_where_only_it_counts() -> None:
    one = trainer(data=train_data(sizes={"code": 2, "web": 2}), gamma=100.0, steps=80, learning_rate=2e-2)
    reports = run(one, 80, equal_mixture(["code", "web"]))
    assert reports[-1].kl < 0.2 * reports[0].kl


def test_bf16_on_the_cpu() -> None:
    exact, half = trainer(), trainer(precision="bf16")
    one, other = run(exact, 5), run(half, 5)
    assert other[0].ce == pytest.approx(one[0].ce, rel=2e-2)
    assert other[0].ce != one[0].ce
    assert other[-1].ce == pytest.approx(one[-1].ce, rel=5e-2)
    assert all(tensor.dtype == torch.float32 for tensor in everything(half).values())


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, recomputed = trainer(), trainer(activation_checkpointing=True)
    run(plain, 2)
    run(recomputed, 2)
    assert_same(weights(plain), weights(recomputed))


# γ = 0 and targets


def test_without_a_kl_term_no_targets_are_read() -> None:
    data = train_data()
    one = trainer(data=data, gamma=0.0)
    other = trainer(data=train_data(targets=False), gamma=0.0)
    reports = run(one, 3)
    run(other, 3)
    assert all(reader.reads == 0 for reader in data.targets.values())
    assert all(report.kl == 0.0 for report in reports)
    assert_same(weights(one), weights(other))


def test_the_ce_of_both_paths_is_the_same() -> None:
    (alone,), (beside_kl,) = run(trainer(gamma=0.0), 1), run(trainer(gamma=0.2), 1)
    assert alone.ce == pytest.approx(beside_kl.ce, rel=1e-6)
    tiny, none = trainer(gamma=1e-12, gradient_clip=None), trainer(gamma=0.0, gradient_clip=None)
    run(tiny, 1)
    run(none, 1)
    for (name, one), (_, other) in zip(tiny.model.named_parameters(), none.model.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_gamma_of_every_domain_is_as_one_gamma() -> None:
    by_domain, plain = trainer(loss=LossConfig(gamma=0.1, gamma_of=dict.fromkeys(SIZES, 0.5))), trainer(gamma=0.5)
    for one in (by_domain, plain):
        one.train_interval(MIXTURE, 0, 3)
    for name, tensor in weights(plain).items():
        assert torch.allclose(weights(by_domain)[name], tensor, atol=1e-6), name


def test_a_domains_gamma_is_that_of_its_blocks_alone() -> None:
    first, *others = sorted(SIZES)
    alone = Mixture(probabilities={first: 1.0} | dict.fromkeys(others, 0.0))
    for drawn, same in (
        (alone, False),
        (Mixture(probabilities={first: 0.0, others[0]: 1.0} | dict.fromkeys(others[1:], 0.0)), True),
    ):
        by_domain, plain = trainer(loss=LossConfig(gamma=0.2, gamma_of={first: 5.0})), trainer(gamma=0.2)
        for one in (by_domain, plain):
            one.train_interval(drawn, 0, 2)
        equal = all(torch.allclose(weights(by_domain)[name], w, atol=1e-6) for name, w in weights(plain).items())
        assert equal is same


def test_after_gamma_until_the_student_trains_on_cross_entropy_alone() -> None:
    reports: list[StepReport] = []
    until = trainer(loss=LossConfig(gamma=0.2, gamma_until=2))
    until.train_interval(MIXTURE, 0, 2, reports.append)
    plain = trainer(gamma=0.2)
    plain.train_interval(MIXTURE, 0, 2)
    assert_same(everything(until), everything(plain))
    until.train_interval(MIXTURE, 1, 1, reports.append)
    plain.train_interval(MIXTURE, 1, 1)
    assert [report.kl > 0.0 for report in reports] == [True, True, False]
    assert any(not torch.equal(weights(until)[name], w) for name, w in weights(plain).items())


def test_a_kl_term_without_targets_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"loss.gamma is 0.2 and there are no targets to take the KL with; set it to 0"
    ):
        trainer(data=train_data(targets=False), gamma=0.2)


# Positions that carry no loss


def test_a_documents_first_token_is_left_out_where_asked() -> None:
    """What follows the token that ends documents is no label, for cross-entropy and KL alike."""
    data = train_data()
    draws, _ = draw(MIXTURE, SIZES, 1, initial_state(SIZES), 4)
    tokens = torch.from_numpy(np.stack([data.blocks[each.domain].tokens[each.index] for each in draws])).long()
    separator = int(tokens[1, 3])
    counts = tokens[:, :-1] != separator
    one = Trainer(
        tiny_model(),
        data,
        config=train_config(),
        loss=LossConfig(gamma=0.5, mask_document_starts=True),
        vocab_size=V,
        seed=1,
        separator=separator,
    )
    (report,) = run(one, 1)
    losses = -tiny_model()(tokens[:, :-1]).logits[..., :V].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    assert report.ce == pytest.approx(losses[counts].mean().item(), rel=1e-5)
    assert report.ce != pytest.approx(losses.mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="needs to know the token that ends a document"):
        Trainer(
            tiny_model(), data, config=train_config(), loss=LossConfig(mask_document_starts=True), vocab_size=V, seed=1
        )


def test_a_batch_in_which_nothing_counts_changes_only_what_decays() -> None:
    data = train_data()
    for reader in data.blocks.values():
        reader.loss_mask = lambda indices: np.zeros((len(indices), L), np.bool_)
    one = trainer(data=data, weight_decay=0.0, micro_batch_size=2)
    before = weights(one)
    (report,) = run(one, 1)
    assert (report.ce, report.kl, report.gradient_norm) == (0.0, 0.0, 0.0)
    assert_same(weights(one), before)


# Intervals and state


def test_an_interval_draws_what_the_sampler_says() -> None:
    class Noting(Blocks):
        log: list[tuple[int, int]]

        def read(self, indices) -> np.ndarray:
            self.log.extend(int(index) for index in indices)
            return super().read(indices)

    data = train_data(targets=False)
    for reader in data.blocks.values():
        reader.__class__, reader.log = Noting, []
    one = trainer(data=data, gamma=0.0, seed=5)
    run(one, 4)
    state = initial_state(SIZES)
    expected: dict[str, list[int]] = {domain: [] for domain in SIZES}
    for _ in range(4):
        batch, state = draw(MIXTURE, SIZES, 5, state, 4)
        for each in batch:
            expected[each.domain].append(each.index)
    assert {domain: reader.log for domain, reader in data.blocks.items()} == expected
    assert one.state.sampler == state


def test_versions_and_an_early_end() -> None:
    one = trainer(steps=7)
    other = Mixture(probabilities={"code": 0.1, "web": 0.9})
    assert not one.done
    assert [report.step for report in run(one, 3, version=4)] == [1, 2, 3]
    assert one.state.mixture_versions == (4,)
    assert [report.step for report in run(one, 3, other, version=5)] == [4, 5, 6]
    assert not one.done
    assert [report.step for report in run(one, 3, version=6)] == [7]
    assert one.done
    assert one.state == TrainerState(sampler=one.state.sampler, mixture_versions=(4, 5, 6))
    assert one.state.step == 7
    before = weights(one)
    assert run(one, 3, version=7) == []
    assert one.state.mixture_versions == (4, 5, 6), "an interval without a step is none"
    assert_same(weights(one), before)


def test_intervals_only_matter_through_their_mixtures() -> None:
    once, thrice = trainer(), trainer()
    run(once, 6)
    for version in range(3):
        run(thrice, 2, version=version)
    assert_same(weights(once), weights(thrice))
    assert once.state.sampler == thrice.state.sampler


@pytest.fixture
def saved(tmp_path):
    """Saves a trainer as a checkpoint would; gives the state, through plain values, and the folder."""

    def save(one: Trainer) -> tuple[TrainerState, str]:
        state = TrainerState(
            sampler=SamplerState(step=one.state.step, drawn=dict(one.state.sampler.drawn)),
            mixture_versions=(*one.state.mixture_versions,),
        )
        folder = str(tmp_path / f"saved-{len(list(tmp_path.iterdir()))}")
        saving.save(one, folder)
        return state, folder

    return save


MODELS = {
    "plain": tiny_model,
    "tied": lambda: tiny_model(tied=True),
    "attention dropout": lambda: tiny_model(dropout=0.3),
    "dropout everywhere": with_dropout,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("interval", [1, 2])
def test_resuming_is_bit_for_bit(model: str, interval: int, saved) -> None:
    mixtures = [MIXTURE, Mixture(probabilities={"code": 0.1, "web": 0.9}), equal_mixture(["code", "web"])]
    whole = trainer(MODELS[model](), steps=6, micro_batch_size=2)
    for version, mixture in enumerate(mixtures):
        run(whole, 2, mixture, version)

    first = trainer(MODELS[model](), steps=6, micro_batch_size=2)
    for version in range(interval):
        run(first, 2, mixtures[version], version)
    state, folder = saved(first)
    run(first, 2)  # what it does after the save must not matter

    torch.manual_seed(999)
    fresh = MODELS[model]()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    resumed = trainer(fresh, steps=6, micro_batch_size=2)
    saving.load(resumed, state, folder)
    assert resumed.state == state
    torch.rand(17)  # nor the global generator
    for version in range(interval, 3):
        run(resumed, 2, mixtures[version], version)
    assert resumed.done
    assert resumed.state == whole.state
    assert_same(everything(whole), everything(resumed))


def test_the_seed_of_the_run_reaches_the_dropout() -> None:
    """What the test above rests on. One block only: without dropout the seed changes nothing."""
    data = {"sizes": {"web": 1}}

    def first_losses(model, data) -> list[float]:
        mixture = equal_mixture(["web"])
        return [run(trainer(model(), data, seed=seed, batch_size=1), 1, mixture)[0].ce for seed in (1, 2, 3, 2**40)]

    assert len(set(first_losses(with_dropout, train_data(**data)))) == 4
    assert len(set(first_losses(tiny_model, train_data(**data)))) == 1


def test_dropout_differs_from_step_to_step() -> None:
    one = trainer(
        with_dropout(), train_data(sizes={"web": 1}), batch_size=1, learning_rate=1e-30, min_learning_rate=0.0
    )
    assert len({report.ce for report in run(one, 3, equal_mixture(["web"]))}) == 3


def test_a_save_before_the_first_step(saved) -> None:
    first = trainer()
    state, folder = saved(first)
    resumed = trainer(tiny_model(seed=5))
    saving.load(resumed, state, folder)
    run(first, 2)
    run(resumed, 2)
    assert_same(weights(first), weights(resumed))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_appear_once(tied: bool, saved) -> None:
    one = trainer(tiny_model(tied=tied))
    run(one, 1)
    _, folder = saved(one)
    (file,) = Path(folder).iterdir()
    stored = safetensors.torch.load_file(file)
    assert "model.model.embed_tokens.weight" in stored
    assert ("model.lm_head.weight" in stored) is not tied
    assert set(stored) == {f"{what}.{name}" for name in one.parameters for what in ("model", "exp_avg", "exp_avg_sq")}
    assert sum(len(group["params"]) for group in one.optimizer.param_groups) == len(one.parameters)
    assert (one.model.lm_head.weight is one.model.model.embed_tokens.weight) is tied


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: tiny_model(tied=True),
            "the checkpoint is of another model: 'exp_avg.lm_head.weight' is in only one of the two",
        ),
        (lambda: tiny_model(hidden=16), r"of another model: '.*' has shape \(.*16.*\) there and \(.*32.*\) here"),
        (with_dropout, "the checkpoint is of another model: '.*' is in only one of the two"),
    ],
)
def test_another_models_checkpoint_is_refused(other, message, saved) -> None:
    source, target = trainer(other()), trainer()
    before = target.state
    with pytest.raises(ValueError, match=message):
        saving.load(target, *saved(source))
    assert target.state == before


def test_another_corpus_checkpoint_is_refused(saved) -> None:
    source = trainer()
    sizes = {"code": 9, "books": 14}
    with pytest.raises(
        ValueError, match=r"the checkpoint is of domains \['code', 'web'\], this run has \['books', 'code'\]"
    ):
        saving.load(trainer(data=train_data(sizes=sizes)), *saved(source))


# When it goes wrong


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    one = trainer()
    run(one, 2)
    with torch.no_grad():
        one.model.lm_head.weight[3, 3] = math.nan
    state, before = one.state, everything(one)
    reports: list[StepReport] = []
    with pytest.raises(FloatingPointError, match=r"step 2: cross-entropy nan, .* lower train.learning_rate and resume"):
        one.train_interval(MIXTURE, 1, 3, reports.append)
    assert reports == []
    assert one.state == state
    for name, tensor in everything(one).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_that_cannot_be_written_says_the_one_cause(saved) -> None:
    one = trainer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            saved(one)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.errno == errno.EFBIG
    assert "saved-0" in failed.value.filename
    assert "\n" not in str(failed.value)


def test_targets_that_are_no_numbers_are_noticed_too() -> None:
    data = train_data()
    for reader in data.targets.values():
        reader.dense = np.full_like(reader.dense, np.nan)
    one = trainer(data=data)
    before = weights(one)
    with pytest.raises(FloatingPointError, match="KL nan"):
        run(one, 1)
    assert_same(weights(one), before)


def test_an_error_while_reading_ends_the_interval_before_its_step() -> None:
    class Broken(Blocks):
        def read(self, indices) -> np.ndarray:
            if state["left"] == 0:
                raise OSError("shard 1 is damaged")
            state["left"] -= 1
            return super().read(indices)

    state = {"left": 3}
    data = TrainData(blocks={"web": Broken(30, 0)}, targets=None)
    one = trainer(data=data, gamma=0.0)
    reports: list[StepReport] = []
    with pytest.raises(OSError, match="shard 1 is damaged"):
        one.train_interval(equal_mixture(["web"]), 0, 10, reports.append)
    assert [report.step for report in reports] == [1, 2, 3]
    assert one.state.step == 3
    assert one.state.mixture_versions == ()


def test_a_mixture_of_other_domains_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the mixture has domains \['web'\], the data \['code', 'web'\]"):
        run(trainer(), 1, equal_mixture(["web"]))


def test_an_empty_domain_is_refused() -> None:
    with pytest.raises(ValueError, match="domain 'web' has 0 blocks"):
        trainer(data=train_data(sizes={"code": 4, "web": 0}))


# Configuration


def test_config() -> None:
    config = TrainConfig(steps=1, batch_size=8)
    assert (config.learning_rate, config.min_learning_rate, config.warmup_steps) == (3e-5, 3e-6, 1000)
    for changes, message in (
        ({"micro_batch_size": 3}, "micro_batch_size 3 does not divide batch_size 4"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1.0 is above learning_rate 0.01"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"gradient_clip": 0.0}, "greater than 0"),
        ({"epochs": 3}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=message):
            train_config(**changes)


def test_device_and_precision(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(train_config(device="auto")) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"train.device is 'cuda' and this machine has no usable GPU"):
        resolve_device(train_config(device="cuda"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision(train_config(precision="auto"), cpu) == "fp32"
    assert resolve_precision(train_config(precision="bf16"), cpu) == "bf16"
    for has_it, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has_it=has_it: has_it)
        assert resolve_precision(train_config(precision="auto"), cuda) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(train_config(device="auto")) == cuda
    assert resolve_device(train_config(device="cpu")) == cpu
