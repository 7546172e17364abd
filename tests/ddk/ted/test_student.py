from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ddk.errors import UserError
from ddk.loss import teacher_side
from ddk.parallel import World, spread
from ddk.student import StudentLoss, layers_of
from ddk.ted.student import TedStudent, matched_layers
from ddk.train_config import LossConfig, TedConfig

V, B, L = 61, 3, 9
CE = LossConfig(gamma=0.0)
CONFIG = TedConfig(weight=0.3)


def tiny(width: int, layers: int, *, rows: int = V, seed: int = 0, kind=Qwen2Config, **more):
    torch.manual_seed(seed)
    config = kind(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=L,
        initializer_range=0.2,
        **more,
    )
    models = {Qwen2Config: Qwen2ForCausalLM, LlamaConfig: LlamaForCausalLM, CohereConfig: CohereForCausalLM}
    return models[kind](config)


def tiny_ted(
    config: TedConfig = CONFIG, loss: LossConfig = CE, *, tied: bool = False, double: bool = True
) -> TedStudent:
    """2 layers of width 8 below 4 of width 12, padded differently, with filters that are no identities."""
    student = tiny(8, 2, rows=V + 3, seed=1, tie_word_embeddings=tied)
    teacher = tiny(12, 4, rows=V + 7, seed=2)
    ted = TedStudent(student.double() if double else student, V, loss, teacher.double() if double else teacher, config)
    with torch.no_grad():
        for parameter in ted.filters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return ted.double().train() if double else ted.train()


def batch(seed: int = 0, blocks: int = B) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, V, (blocks, L + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def live(ted: TedStudent):
    return ted._live.model


def layer_outputs(model, inputs_BL: Tensor) -> list[Tensor]:
    """Of every layer, by transformers' own means: without the final norm, which it applies to the last of them."""
    bare = copy.copy(model.model)
    bare._modules = {**model.model._modules, "norm": torch.nn.Identity()}
    return list(bare(input_ids=inputs_BL, use_cache=False, output_hidden_states=True).hidden_states[1:])


def plain_total(ted: TedStudent, inputs_BL: Tensor, labels_BL: Tensor, valid_BL: Tensor, scale: float) -> Tensor:
    """CE + λ·Σ MSE, written down in full."""
    with torch.no_grad():
        theirs = layer_outputs(live(ted), inputs_BL)
    own = layer_outputs(ted.model, inputs_BL)
    logits = ted.model(input_ids=inputs_BL).logits[..., :V]
    total = functional.cross_entropy(logits[valid_BL], labels_BL[valid_BL], reduction="sum") * scale
    for mine, other, (s, t) in zip(ted.student_filters, ted.teacher_filters, [(0, 1), (1, 3)], strict=True):
        difference = functional.linear(own[s], mine.weight, mine.bias) - functional.linear(
            theirs[t], other.weight, other.bias
        )
        total = total + 0.3 * scale * (difference[valid_BL] ** 2).sum() / 12
    return total


@pytest.mark.parametrize("tied", [False, True])
def test_value_and_gradients_against_the_plain_formula(tied: bool) -> None:
    ted, (inputs, labels) = tiny_ted(tied=tied), batch()
    valid = torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.6
    expected = plain_total(ted, inputs, labels, valid, 0.25)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in ted.named_parameters() if p.requires_grad}
    ted.zero_grad(set_to_none=True)
    total, ce, kl = ted(inputs, labels, valid, None, 0.25)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert total.item() > 0.25 * ce.item() + 1e-3
    assert kl.item() == 0.0
    found = {name: p.grad for name, p in ted.named_parameters() if p.requires_grad}
    assert_same(found, gradients, rtol=1e-5, atol=1e-6)  # Qwen2 takes its norms in float32, whatever the weights are


def test_the_rest_of_the_loss_is_the_students() -> None:
    loss = LossConfig(gamma=0.7)
    ted, (inputs, labels) = tiny_ted(loss=loss), batch()
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:4] for i in range(B * L)])
    targets = teacher_side(ids, torch.full((B * L, 4), 0.2).log(), torch.full((B * L,), 0.2), loss)
    total, ce, kl = ted(inputs, labels, None, targets, 0.1)
    plain, plain_ce, plain_kl = StudentLoss(ted.model, V, loss)(inputs, labels, None, targets, 0.1)
    assert (ce, kl) == (plain_ce, plain_kl)
    assert kl > 0
    term = plain_total(ted, inputs, labels, torch.ones(B, L, dtype=torch.bool), 0.1) - 0.1 * plain_ce
    assert total.item() == pytest.approx((plain + term).item(), rel=1e-6)


def gradients_of(ted: TedStudent, parts) -> dict[str, Tensor]:
    ted.zero_grad(set_to_none=True)
    for inputs, labels, valid in parts:
        ted(inputs, labels, valid, None, 1 / 20)[0].backward()
    return {name: p.grad.clone() for name, p in ted.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, **tolerance), name


def test_micro_batches_add_up() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()
    valid = torch.rand(B, L, generator=torch.Generator().manual_seed(5)) < 0.6
    whole = gradients_of(ted, [(inputs, labels, valid)])
    parts = [(inputs[i : i + 1], labels[i : i + 1], valid[i : i + 1]) for i in range(B)]
    assert_same(gradients_of(ted, parts), whole, rtol=1e-9, atol=1e-12)


def test_activation_checkpointing_changes_nothing() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()
    expected = gradients_of(ted, [(inputs, labels, None)])
    ted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients_of(ted, [(inputs, labels, None)]), expected, rtol=1e-9, atol=1e-12)


def test_bf16_autocast_is_near() -> None:
    ted, (inputs, labels) = tiny_ted(double=False), batch()
    expected = gradients_of(ted, [(inputs, labels, None)])
    live(ted).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_of(ted, [(inputs, labels, None)])
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in expected.items():
        assert functional.cosine_similarity(found[name].flatten(), gradient.flatten(), 0) > 0.98, name


def test_a_teacher_in_bf16_below_a_student_in_fp32() -> None:
    ted, (inputs, labels) = tiny_ted(double=False), batch()
    expected = ted(inputs, labels)[0].item()
    live(ted).bfloat16()
    assert ted(inputs, labels)[0].item() == pytest.approx(expected, rel=0.05)


def test_the_teacher_is_frozen_and_no_part_of_the_module() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()
    before = copy.deepcopy(live(ted).state_dict())
    optimizer = torch.optim.AdamW([p for p in ted.parameters() if p.requires_grad], lr=0.1)
    filters = copy.deepcopy(ted.teacher_filters.state_dict())
    ted(inputs, labels)[0].backward()
    optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in live(ted).parameters())
    assert not live(ted).training
    assert all(torch.equal(value, before[name]) for name, value in live(ted).state_dict().items())
    assert all(torch.equal(value, filters[name]) for name, value in ted.teacher_filters.state_dict().items())
    mine = {id(p) for p in ted.parameters()}
    assert not mine & {id(p) for p in live(ted).parameters()}
    assert {name.split(".")[0] for name in ted.state_dict()} == {"model", "filters"}
    assert {name for name, p in ted.named_parameters() if not p.requires_grad} == {
        f"filters.teacher.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
    }


def test_every_trainable_parameter_takes_part_even_where_nothing_carries_loss() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()
    for valid in (None, torch.zeros(B, L, dtype=torch.bool)):
        gradients = gradients_of(ted, [(inputs, labels, valid)])
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.fixture
def alone_in_a_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_under_ddp() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()
    expected = gradients_of(ted, [(inputs, labels, None)])
    outside = spread(ted, layers_of(ted.model), World(), "ddp", bf16=False)
    assert isinstance(outside, torch.nn.parallel.DistributedDataParallel)
    for _ in range(2):  # DDP complains at the second pass of a parameter that the first left out
        ted.zero_grad(set_to_none=True)
        outside(inputs, labels, None, None, 1 / 20)[0].backward()
    assert_same({n: p.grad for n, p in ted.named_parameters() if p.requires_grad}, expected, rtol=1e-9, atol=1e-12)


def test_without_gradients_the_teacher_does_not_run() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()

    def refuse(module, inputs):
        raise AssertionError("the teacher ran")

    live(ted).base_model.register_forward_pre_hook(refuse)
    with torch.no_grad():
        found = ted(inputs, labels)
        assert found == StudentLoss(ted.model, V, CE)(inputs, labels)
    with pytest.raises(AssertionError, match="the teacher ran"):
        ted(inputs, labels)


def test_what_a_checkpoint_needs_besides_the_student() -> None:
    ted = tiny_ted()
    names = [f"ted.{side}.{i}.{kind}" for side in ("student", "teacher") for i in (0, 1) for kind in ("weight", "bias")]
    assert list(ted.extra_parameters) == names
    assert {id(p) for p in [*ted.model.parameters(), *ted.extra_parameters.values()]} == {
        id(p) for p in ted.parameters()
    }
    assert ted.extra_parameters["ted.student.1.weight"] is ted.student_filters[1].weight


def test_nothing_is_kept_of_a_pass() -> None:
    ted, (inputs, labels) = tiny_ted(), batch()
    ted(inputs, labels)[0].backward()
    assert ted._caught._found is None
    assert ted._live.caught._found is None


@pytest.mark.parametrize(
    ("student", "teacher", "pairs", "expected"),
    [
        (2, 4, None, [(0, 1), (1, 3)]),
        (4, 2, None, [(1, 0), (3, 1)]),
        (3, 3, None, [(0, 0), (1, 1), (2, 2)]),
        (24, 48, 2, [(11, 23), (23, 47)]),
        (28, 48, 1, [(27, 47)]),
        (2, 5, None, [(0, 1), (1, 4)]),
    ],
)
def test_matched_layers(student: int, teacher: int, pairs: int | None, expected: list[tuple[int, int]]) -> None:
    assert matched_layers(student, teacher, pairs) == expected


def test_matched_layers_of_any_depths_are_distinct_and_end_together() -> None:
    for student in range(1, 13):
        for teacher in range(1, 13):
            for pairs in range(1, min(student, teacher) + 1):
                found = matched_layers(student, teacher, pairs)
                assert len(found) == pairs
                assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(found))
                assert min(found) >= (0, 0)
                assert found[-1] == (student - 1, teacher - 1)
    assert matched_layers(24, 48, None) == [(i, 2 * i + 1) for i in range(24)]


def gpt2(width: int, layers: int):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            n_positions=L,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


@pytest.mark.parametrize(
    "teacher", [tiny(12, 3), tiny(12, 3, kind=LlamaConfig), gpt2(12, 3)], ids=["qwen", "llama", "gpt2"]
)
def test_behind_the_last_layer_the_identity_has_the_teachers_own_loss(teacher) -> None:
    ted, (inputs, labels) = TedStudent(tiny(8, 2), V, CE, teacher, TedConfig(layers=1)), batch()
    last_TD = ted.teacher_hidden(inputs, slice(None))[0]
    with torch.no_grad():
        found = ted.task_loss(ted.teacher_filters[0](last_TD), labels.flatten(), 1.0)
        expected = functional.cross_entropy(
            teacher(input_ids=inputs).logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_gpt2_student() -> None:
    ted, (inputs, labels) = TedStudent(gpt2(8, 2), V, CE, tiny(12, 4), CONFIG).eval(), batch()
    total, ce, _ = ted(inputs, labels)
    total.backward()
    assert total > ce
    assert ted.model.transformer.h[0].mlp.c_fc.weight.grad.abs().sum() > 0


def double_the_last(module, inputs, output):
    output.last_hidden_state = 2.0 * output.last_hidden_state
    return output


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"ted.layers is 3, and the student has 2 layers, the teacher 4; set it to at most 2"
    ):
        TedStudent(tiny(8, 2), V, CE, tiny(12, 4), TedConfig(layers=3))
    with pytest.raises(UserError, match="the teacher predicts 60 tokens and the tokenizer has 61"):
        TedStudent(tiny(8, 2), V, CE, tiny(12, 4, rows=60), CONFIG)
    scaled = tiny(12, 2, kind=CohereConfig, logit_scale=0.1, bos_token_id=None, eos_token_id=0)
    with pytest.raises(UserError, match="CohereForCausalLM does more; use method kd"):
        TedStudent(tiny(8, 2), V, CE, scaled, CONFIG)
    nameless = tiny(8, 2)
    nameless._no_split_modules = None
    with pytest.raises(UserError, match=r"cannot find the layers of the student \(Qwen2ForCausalLM\); use method kd"):
        TedStudent(nameless, V, CE, tiny(12, 4), CONFIG)
    unusual = tiny(12, 2)
    unusual.model.register_forward_hook(double_the_last)
    with pytest.raises(UserError, match=r"cannot find the final norm of the teacher \(Qwen2ForCausalLM\)"):
        TedStudent(tiny(8, 2), V, CE, unusual, CONFIG)


def test_config() -> None:
    assert TedConfig().layers is None
    for wrong in ({"weight": 0.0}, {"layers": 0}, {"filter_steps": -1}, {"filters": 3}):
        with pytest.raises(ValidationError):
            TedConfig.model_validate(wrong)
