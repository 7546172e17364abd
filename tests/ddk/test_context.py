"""Positions against float64 rotations written out here; the saved scaling against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_data import MIXTURE, PADDED, L, V, tiny_model, train_data

from ddk import saving
from ddk.context import ContextPlan, Stretch, plan_context, stretched_config, uniform_stretch
from ddk.errors import UserError
from ddk.parallel import World
from ddk.rotary import check_rotary, find_rotary
from ddk.sampler import SamplerState
from ddk.student import StudentLoss, layers_of, save_student, student_weights
from ddk.train_config import ContextConfig, LossConfig, TrainConfig
from ddk.trainer import StepReport, Trainer, TrainerState

PLAN = ContextPlan(target=64, trained=16, block=L, max_scale=6, offset_after=3, distil=True, saved_share=0.0)
SIZES: dict[str, Any] = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS = ("llama", "mistral", "qwen2", "qwen3")


def of_kind(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "initializer_range": 0.2, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def rotated_logits(model: Any, tokens_BL: torch.Tensor, positions_BL: np.ndarray) -> torch.Tensor:
    """[B, L, V]: the model with cosines and sines of float64 positions in the place of its rotary embedding."""
    text = model.config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    base = text.rope_parameters["rope_theta"]
    angles = positions_BL[..., None].astype(np.float64) * base ** (-np.arange(0, width, 2) / width)
    angles = np.concatenate([angles, angles], -1)
    made = tuple(torch.from_numpy(form(angles)).float() for form in (np.cos, np.sin))
    hook = find_rotary(model, layers_of(model)).register_forward_hook(lambda *_: made)
    try:
        with torch.no_grad():
            return model(tokens_BL, use_cache=False).logits
    finally:
        hook.remove()


def shown_logits(model: Any, tokens_BL: torch.Tensor, stretch: Stretch | None) -> torch.Tensor:
    student = StudentLoss(model, V, LossConfig(gamma=0.0))
    with torch.no_grad(), student.shown.at(stretch):
        return model(tokens_BL, use_cache=False).logits


def blocks(count: int, length: int = 12) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, V, (count, length)))


def test_positions_are_those_of_the_paper() -> None:
    stretch = Stretch(scale_B=np.array([4.0, 1.0]), offset_B=np.array([10, 3]), after=2)
    wanted = [[0, 1 / 4, 12 / 4, 13 / 4], [0, 1, 5, 6]]
    torch.testing.assert_close(stretch.positions(4), torch.tensor(wanted))
    assert stretch.changed.tolist() == [True, True]
    assert uniform_stretch(3, 1.0) is None


def test_draws_are_uniform_within_what_the_student_knows_and_keyed_by_seed_step_and_row() -> None:
    rows = list(range(16))
    one = PLAN.draw(3, 5, rows)
    halves = [PLAN.draw(3, 5, rows[rank::2]) for rank in (0, 1)]
    for rank, half in enumerate(halves):
        np.testing.assert_array_equal(half.scale_B, one.scale_B[rank::2])
        np.testing.assert_array_equal(half.offset_B, one.offset_B[rank::2])
    assert not np.array_equal(PLAN.draw(3, 6, rows).scale_B, one.scale_B)
    assert not np.array_equal(PLAN.draw(4, 5, rows).scale_B, one.scale_B)

    many = PLAN.draw(0, 0, range(12_000))
    counts = np.bincount(many.scale_B.astype(int), minlength=7)[1:]
    assert counts.min() > 1_800
    assert counts.max() < 2_200
    last = (L - 1 + many.offset_B) / many.scale_B
    assert last.max() < PLAN.trained
    at_two = many.offset_B[many.scale_B == 2]
    assert at_two.min() == 0
    assert at_two.max() == 2 * 16 - L
    assert at_two.mean() == pytest.approx((2 * 16 - L) / 2, rel=0.05)

    half = ContextPlan(target=40, trained=16, block=L, max_scale=6, offset_after=3, distil=True, saved_share=0.5)
    some = half.draw(0, 0, range(12_000))
    saved = some.scale_B == 2.5
    assert saved.mean() == pytest.approx(0.5, abs=0.02), "target/trained, which no whole number is"
    assert set(some.scale_B[~saved]) == set(map(float, range(1, 7)))
    assert some.offset_B[saved].max() == 40 - L
    assert (L - 1 + some.offset_B[saved]).max() / 2.5 < half.trained
    halves = half.draw(0, 0, range(1, 12_000, 2))
    np.testing.assert_array_equal(halves.scale_B, some.scale_B[1::2])

    longer = ContextPlan(target=64, trained=4, block=10, max_scale=16, offset_after=0, distil=True, saved_share=0.0)
    drawn = longer.draw(0, 0, range(2_000))
    assert set(drawn.scale_B) == set(map(float, range(3, 17)))  # 10 positions fit into 4 from 3 on
    assert ((9 + drawn.offset_B) / drawn.scale_B).max() < 4
    assert longer.gap_scale == 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shown_those_positions(kind: str, tmp_path: Path) -> None:
    model, tokens = of_kind(kind), blocks(3)
    check_rotary(model, layers_of(model))
    ordinary = shown_logits(model, tokens, None)
    torch.testing.assert_close(ordinary, rotated_logits(model, tokens, np.arange(12)[None]), rtol=1e-4, atol=1e-4)
    same = Stretch(scale_B=np.ones(3), offset_B=np.zeros(3, np.int64), after=4)
    assert torch.equal(shown_logits(model, tokens, same), ordinary)

    stretch = Stretch(scale_B=np.array([3.0, 1.0, 2.0]), offset_B=np.array([7, 4, 0]), after=4)
    places = np.arange(12)
    wanted = (places + np.where(places < 4, 0, stretch.offset_B[:, None])) / stretch.scale_B[:, None]
    shown = shown_logits(model, tokens, stretch)
    torch.testing.assert_close(shown, rotated_logits(model, tokens, wanted), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(shown, ordinary, atol=1e-2)

    # Position interpolation is transformers' linear scaling, as the student is saved.
    config = stretched_config(model.config, 4.0, 64)
    save_student(model, student_weights(model, World()), str(tmp_path), config)
    saved, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert saved.config.max_position_embeddings == 64
    assert saved.config.rope_parameters["rope_type"] == "linear"
    assert saved.config.rope_parameters["factor"] == 4.0
    rounded = of_kind(kind)
    rounded.load_state_dict({name: one.bfloat16().float() for name, one in model.state_dict().items()})
    with torch.no_grad():
        theirs = saved(tokens, use_cache=False).logits
    torch.testing.assert_close(shown_logits(rounded, tokens, uniform_stretch(3, 4.0)), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gpt2", {}, "'gpt2' has no rotary embedding"),
        ("gemma3_text", {}, "'gemma3_text' has several rotary embeddings"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"'llama' already stretches its rotary positions \('linear'",
        ),
    ],
)
def test_other_kinds_are_refused(kind: str, changes: dict[str, Any], why: str) -> None:
    model = of_kind(kind, **changes)
    with pytest.raises(UserError, match=why):
        check_rotary(model, layers_of(model))
    with pytest.raises(UserError, match=why):
        trainer(model, PLAN)


@pytest.mark.parametrize(
    ("fields", "declared", "seq_len", "why"),
    [
        ({"target": 64}, None, 8, "set student.context.trained"),
        ({"target": 64, "trained": 32}, 16, 8, "'m' declares 16 positions; lower it"),
        ({"target": 16}, 16, 8, "knows 16 positions already"),
        ({"target": 64}, 16, 80, "target is 64, and packing.seq_len is 80"),
        ({"target": 64, "max_scale": 3}, 16, 8, "set max_scale to at least 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    fields: dict[str, Any], declared: int | None, seq_len: int, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        plan_context(ContextConfig(**fields), declared, seq_len, "m")


def trainer(model: Any, context: ContextPlan | None, **changes: Any) -> Trainer:
    train = {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 0}
    return Trainer(
        model,
        train_data(),
        config=TrainConfig(**{**train, "device": "cpu", **changes}),
        loss=LossConfig(gamma=0.5),
        vocab_size=V,
        seed=1,
        context=context,
    )


def trained(one: Trainer, steps: int) -> list[StepReport]:
    reports: list[StepReport] = []
    one.train_interval(MIXTURE, 0, steps, reports.append)
    return reports


def test_a_resumed_training_draws_the_same(tmp_path: Path) -> None:
    """With micro-batches, recomputed activations and a stop between; the positions matter."""
    whole = trainer(tiny_model(), PLAN)
    reports = trained(whole, 4)
    first = trainer(tiny_model(), PLAN)
    trained(first, 2)
    saving.save(first, str(tmp_path))
    second = trainer(tiny_model(seed=3), PLAN)
    saving.load(second, TrainerState(sampler=SamplerState(step=2, drawn=first.state.sampler.drawn)), str(tmp_path))
    assert [one.loss for one in trained(second, 2)] == [one.loss for one in reports[2:]]
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name

    recomputed = trained(trainer(tiny_model(), PLAN, activation_checkpointing=True, micro_batch_size=2), 4)
    assert [one.loss for one in recomputed] == pytest.approx([one.loss for one in reports], rel=1e-5)
    assert [one.loss for one in trained(trainer(tiny_model(), None), 4)] != [one.loss for one in reports]


def test_without_distillation_only_blocks_at_ordinary_positions_have_the_divergence() -> None:
    plan = ContextPlan(target=64, trained=L, block=L, max_scale=2, offset_after=3, distil=False, saved_share=0.0)
    apart = trainer(
        tiny_model(),
        ContextPlan(target=64, trained=L, block=L, max_scale=2, offset_after=3, distil=True, saved_share=0.0),
    )
    (both,), (alone,) = trained(apart, 1), trained(trainer(tiny_model(), plan), 1)
    assert both.loss == pytest.approx(both.ce + 0.5 * both.kl, rel=1e-5)
    drawn = plan.draw(1, 0, range(4))
    assert 0 < drawn.changed.sum() < 4
    assert alone.ce == pytest.approx(both.ce)
    assert alone.kl == pytest.approx(both.kl)
    assert alone.ce < alone.loss < both.loss


def test_the_gap_is_measured_at_ordinary_positions_and_the_saved_student_at_its_own() -> None:
    one, plain = trainer(tiny_model(), PLAN), trainer(tiny_model(), None)
    data = train_data().blocks["web"]
    assert one.perplexity(data) == plain.perplexity(data)
    scaled = StudentLoss(type(plain.model)(stretched_config(plain.model.config, 4.0, 64)), V, LossConfig(gamma=0.0))
    scaled.model.load_state_dict(plain.model.state_dict())
    plain._student = scaled
    assert one.perplexity(data, as_saved=True) == pytest.approx(plain.perplexity(data), rel=1e-5)
