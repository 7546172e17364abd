from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from ddk.data import TrainData
from ddk.ted.filters import train_filters
from ddk.ted.student import TedStudent
from ddk.train_config import LossConfig, TedConfig

V, L = 61, 12
CPU = torch.device("cpu")
CE = LossConfig(gamma=0.0)


class Blocks:
    """Texts of a kind that a filter can learn: each token follows from the one before it, mostly."""

    def __init__(self, count: int, seed: int, step: int, masked: bool = False) -> None:
        random = np.random.default_rng(seed)
        start = random.integers(0, V, (count, 1))
        noise = np.where(random.random((count, L + 1)) < 0.1, random.integers(0, V, (count, L + 1)), 0)
        self.tokens = ((start + step * np.arange(L + 1) + noise) % V).astype(np.int32)
        self.mask = random.random((count, L)) < 0.7 if masked else None
        self.read_rows: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, indices):
        self.read_rows += [int(index) for index in indices]
        return self.tokens[np.asarray(indices)]

    def loss_mask(self, indices):
        return None if self.mask is None else self.mask[np.asarray(indices)]


def data(masked: bool = False) -> TrainData:
    return TrainData(blocks={"a": Blocks(60, 1, 1, masked), "b": Blocks(20, 2, 1, masked)}, targets=None)


def tiny(width: int, layers: int, rows: int, seed: int):
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=rows,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=L,
            initializer_range=0.2,
            attention_dropout=0.3,
        )
    )


def fresh(padding: float = 0.0, **config) -> TedStudent:
    """Below a teacher whose padded rows predict what no token is."""
    teacher = tiny(24, 4, V + 7, seed=2)
    with torch.no_grad():
        teacher.lm_head.weight[V:] += padding
    return TedStudent(
        tiny(16, 2, V + 3, seed=1), V, CE, teacher, TedConfig(filter_learning_rate=1e-2, **config)
    ).train()


def train(ted: TedStudent, steps: int, **more) -> list[tuple[int, float, float]]:
    told: list[tuple[int, float, float]] = []
    settings = {"data": data(), "batch_size": 6, "seed": 3, "device": CPU} | more
    train_filters(ted, steps=steps, on_step=lambda *report: told.append(report), **settings)
    return told


def weights(ted: TedStudent) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ted.filters.state_dict().items()}


def task_losses(ted: TedStudent, tokens: np.ndarray) -> list[float]:
    """Mean cross-entropy behind each filter, by plain means and without dropout."""
    was_training = ted.model.training
    ted.model.eval()
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    labels = torch.from_numpy(tokens[:, 1:].astype(np.int64)).flatten()
    teacher = ted._live.model
    losses = []
    with torch.no_grad():
        for filters, hidden in (
            (ted.student_filters, ted.student_hidden(inputs, slice(None))),
            (ted.teacher_filters, ted.teacher_hidden(inputs, slice(None))),
        ):
            for one, hidden_TD in zip(filters, hidden, strict=True):
                logits_TV = teacher.lm_head(teacher.model.norm(one(hidden_TD)))[:, :V]
                losses.append(functional.cross_entropy(logits_TV, labels).item())
    ted.model.train(was_training)
    return losses


def test_the_filters_learn_the_task() -> None:
    ted, held_out = fresh(), Blocks(20, 7, 1).tokens
    before = task_losses(ted, held_out)
    told = train(ted, 100)
    after = task_losses(ted, held_out)
    assert len(before) == 4
    assert all(late < early - 0.5 for early, late in zip(before, after, strict=True)), (before, after)
    assert [step for step, _, _ in told] == list(range(1, 101))
    assert told[-1][1] < told[0][1] - 0.5
    assert told[-1][2] < told[0][2] - 0.5


def test_what_is_told_is_the_mean_over_the_filters() -> None:
    blocks = Blocks(1, 1, 1)
    told = train(fresh(), 1, data=TrainData(blocks={"a": blocks}, targets=None), batch_size=1)
    expected = task_losses(fresh(), blocks.tokens)
    assert told[0][1] == pytest.approx(sum(expected[:2]) / 2, rel=1e-5)
    assert told[0][2] == pytest.approx(sum(expected[2:]) / 2, rel=1e-5)


def test_everything_follows_from_the_seed() -> None:
    one, same, other = fresh(), fresh(), fresh()
    told = train(one, 4)
    torch.manual_seed(99)
    assert train(same, 4) == told
    assert train(other, 4, seed=4) != told
    assert all(torch.equal(value, weights(same)[name]) for name, value in weights(one).items())


def test_domains_are_drawn_by_their_sizes() -> None:
    blocks = data()
    train(fresh(), 9, data=blocks, batch_size=8)
    read = {domain: len(reader.read_rows) for domain, reader in blocks.blocks.items()}
    assert read == {"a": 60, "b": 20}


def test_only_the_filters_change_and_the_teachers_are_frozen_again() -> None:
    ted = fresh()
    student, teacher = copy.deepcopy(ted.model.state_dict()), copy.deepcopy(ted._live.model.state_dict())
    train(ted, 3)
    assert all(torch.equal(value, student[name]) for name, value in ted.model.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in ted._live.model.state_dict().items())
    assert ted.model.training
    assert all(p.requires_grad for p in ted.student_filters.parameters())
    assert not any(p.requires_grad for p in ted.teacher_filters.parameters())
    # A gradient left behind would take part in the clipping of the first step's.
    assert all(p.grad is None for p in [*ted.parameters(), *ted._live.model.parameters()])


def test_in_the_end_every_output_has_a_mean_square_of_1_and_the_same_task_loss() -> None:
    held_out = Blocks(40, 7, 1).tokens
    inputs = torch.from_numpy(held_out[:, :-1].astype(np.int64))
    ted = fresh()
    before = task_losses(ted, held_out)
    train(ted, 0, batch_size=80)
    ted.eval()
    assert task_losses(ted, held_out) == pytest.approx(before, rel=1e-3)
    with torch.no_grad():
        found = [one(h) for one, h in zip(ted.student_filters, ted.student_hidden(inputs, slice(None)), strict=True)]
        found += [one(h) for one, h in zip(ted.teacher_filters, ted.teacher_hidden(inputs, slice(None)), strict=True)]
    assert [one.square().mean().item() for one in found] == pytest.approx([1.0] * 4, rel=0.1)


def test_padded_rows_take_no_part() -> None:
    one, other = fresh(), fresh(padding=50.0)
    assert train(one, 3) == train(other, 3)
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("masked", [False, True])
def test_micro_batches_add_up(masked: bool) -> None:
    one, parts = fresh(), fresh()
    told = train(one, 3, data=data(masked))
    again = train(parts, 3, data=data(masked), micro_batch_size=4)
    for first, second in zip(told, again, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
    for name, value in weights(one).items():
        assert torch.allclose(weights(parts)[name], value, rtol=1e-3, atol=1e-4), name


def test_masked_positions_take_no_part() -> None:
    blocks = data(masked=True)
    told = train(fresh(), 1, data=blocks, batch_size=80)
    tokens = np.concatenate([reader.tokens for reader in blocks.blocks.values()])
    mask = np.concatenate([reader.mask for reader in blocks.blocks.values()])
    ted = fresh()
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    rows = torch.from_numpy(mask.flatten().nonzero()[0])
    labels = torch.from_numpy(tokens[:, 1:].astype(np.int64)).flatten()[rows]
    teacher = ted._live.model
    with torch.no_grad():
        expected = [
            functional.cross_entropy(teacher.lm_head(teacher.model.norm(h))[:, :V], labels).item()
            for h in ted.eval().teacher_hidden(inputs, rows)
        ]
    assert told[0][2] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_a_documents_first_token_carries_no_loss_behind_a_separator() -> None:
    assert train(fresh(), 2, separator=5) != train(fresh(), 2)
    assert train(fresh(), 2, separator=V + 1) == train(fresh(), 2)


def test_bf16() -> None:
    told = train(fresh(), 10, precision="bf16")
    exact = train(fresh(), 10)
    assert told[0][1:] == pytest.approx(exact[0][1:], rel=0.02)
    assert told[-1][1:] == pytest.approx(exact[-1][1:], rel=0.05)
    assert not torch.is_autocast_enabled("cpu")


def test_an_error_of_the_reader_leaves_no_trace() -> None:
    class Broken(Blocks):
        def read(self, indices):
            raise OSError("the disk is gone")

    ted = fresh()
    with pytest.raises(OSError, match="the disk is gone"):
        train(ted, 2, data=TrainData(blocks={"a": Broken(4, 1, 1)}, targets=None))
    assert ted.model.training
    assert not any(p.requires_grad for p in ted.teacher_filters.parameters())


def test_the_rate_falls_linearly() -> None:
    ted = fresh()
    seen = [weights(ted)]
    train_filters(
        ted, data(), steps=4, batch_size=6, seed=3, device=CPU, on_step=lambda *report: seen.append(weights(ted))
    )
    # Adam moves no weight by much more than its rate, and at its first step every weight by just that.
    moves = [max((b[n] - a[n]).abs().max().item() for n in a) for a, b in itertools.pairwise(seen)]
    assert moves[0] == pytest.approx(1e-2, rel=1e-3)
    for move, share in zip(moves[1:], (0.75, 0.5, 0.25), strict=True):
        assert 0.5 * share * 1e-2 < move < 1.2 * share * 1e-2
