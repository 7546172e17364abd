from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ddk import gap
from ddk.domain_tree import rolled_up_ppl
from ddk.gap import domain_gap
from ddk.student import StudentLoss
from ddk.train_config import LossConfig

V, PADDED, L, N = 50, 64, 12, 7


def perplexity(model, blocks, *, vocab_size: int, batch_size: int, autocast=None) -> float:
    with autocast or contextlib.nullcontext():
        return gap.perplexity(StudentLoss(model, vocab_size, LossConfig(gamma=0.0)), blocks, batch_size=batch_size)


class Blocks:
    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, indices) -> np.ndarray:
        return self.tokens[np.asarray(indices)]


class ReadOnlyBlocks(Blocks):
    def read(self, indices) -> np.ndarray:
        tokens = super().read(indices)
        tokens.flags.writeable = False
        return tokens


def tiny_model(rows: int = V, dropout: float = 0.0) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        initializer_range=0.3,  # far from uniform predictions
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture
def blocks() -> Blocks:
    return Blocks(np.random.default_rng(0).integers(0, V, (N, L + 1), dtype=np.int32))


def plain_perplexity(model, tokens: np.ndarray) -> float:
    """One block at a time, with transformers' own shifted loss."""
    model.eval()
    losses = []
    with torch.no_grad():
        for row in torch.from_numpy(tokens.astype(np.int64)):
            losses.append(model(input_ids=row[None], labels=row[None]).loss.double().item())
    return math.exp(sum(losses) / len(losses))


def test_equals_transformers_own_loss(blocks: Blocks) -> None:
    model = tiny_model()
    expected = plain_perplexity(model, blocks.tokens)
    assert expected > 60, "the model must not be uniform, or the test shows little"
    assert perplexity(model, blocks, vocab_size=V, batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_leaves_rolled_up_are_what_all_their_blocks_give(blocks: Blocks) -> None:
    model = tiny_model()
    leaves = {"m/a": Blocks(blocks.tokens[:2]), "m/b": Blocks(blocks.tokens[2:])}
    measured = {leaf: perplexity(model, own, vocab_size=V, batch_size=3) for leaf, own in leaves.items()}
    positions = {leaf: len(own) * L for leaf, own in leaves.items()}
    assert measured["m/a"] != pytest.approx(measured["m/b"], rel=1e-2)
    expected = plain_perplexity(model, blocks.tokens)
    assert rolled_up_ppl(measured, positions, 1) == {"m": pytest.approx(expected, rel=1e-6)}


def test_the_batch_size_changes_rounding_only(blocks: Blocks) -> None:
    """7 blocks in batches of 3 leave one of 1: a mean of means would differ."""
    model = tiny_model()
    values = [perplexity(model, blocks, vocab_size=V, batch_size=size) for size in (1, 2, 3, 7, 100)]
    assert values == pytest.approx([values[0]] * 5, rel=1e-6)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_padded_rows_take_no_part(blocks: Blocks, size: float) -> None:
    """Rows beyond the tokenizer with huge logits: as if they were cut off."""
    padded, cut = tiny_model(PADDED), tiny_model(V)
    with torch.no_grad():
        for name, weight in cut.named_parameters():
            weight.copy_(padded.get_parameter(name)[:V] if "embed" in name or "lm_head" in name else 0)
            if not ("embed" in name or "lm_head" in name):
                weight.copy_(padded.get_parameter(name))
        padded.lm_head.weight[V:] = size
    ours = perplexity(padded, blocks, vocab_size=V, batch_size=3)
    assert ours == pytest.approx(perplexity(cut, blocks, vocab_size=V, batch_size=3), rel=1e-6)
    assert ours == pytest.approx(plain_perplexity(cut, blocks.tokens), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_off(blocks: Blocks, training: bool) -> None:
    model = tiny_model(dropout=0.5).train(training)
    first = perplexity(model, blocks, vocab_size=V, batch_size=3)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert perplexity(model, blocks, vocab_size=V, batch_size=3) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_an_error(blocks: Blocks) -> None:
    class Failing(Blocks):
        def read(self, indices) -> np.ndarray:
            raise OSError("gone")

    model = tiny_model().train()
    with pytest.raises(OSError, match="gone"):
        perplexity(model, Failing(blocks.tokens), vocab_size=V, batch_size=3)
    assert model.training


def test_a_read_only_array_is_fine(blocks: Blocks) -> None:
    model = tiny_model()
    expected = perplexity(model, blocks, vocab_size=V, batch_size=3)
    assert perplexity(model, ReadOnlyBlocks(blocks.tokens), vocab_size=V, batch_size=3) == expected


def test_in_bf16_it_is_close(blocks: Blocks) -> None:
    model = tiny_model()
    expected = perplexity(model, blocks, vocab_size=V, batch_size=3)
    autocast = torch.autocast("cpu", torch.bfloat16)
    values = [perplexity(model, blocks, vocab_size=V, batch_size=size, autocast=autocast) for size in (3, 7)]
    assert values == pytest.approx([expected, expected], rel=0.1)
    assert values[0] != expected


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match="perplexity needs at least one block"):
        perplexity(tiny_model(), Blocks(np.zeros((0, L + 1), np.int32)), vocab_size=V, batch_size=3)


def test_a_perplexity_beyond_floats_is_infinite_and_named(blocks: Blocks) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    student = perplexity(model, blocks, vocab_size=V, batch_size=3)
    assert student == math.inf
    with pytest.raises(ValueError, match=r"the student's perplexity on 'web' is inf; .* lower train.learning_rate"):
        domain_gap("web", student, 4.0)


def test_a_gap_is_checked() -> None:
    assert domain_gap("web", 6.0, 4.0).ratio == 1.5
    with pytest.raises(ValueError, match="the student's perplexity on 'web' is nan; the training has diverged"):
        domain_gap("web", math.nan, 4.0, step=7)
    with pytest.raises(ValueError, match="perplexity on 'web' is nan; before any training: the model itself"):
        domain_gap("web", math.nan, 4.0, step=0)
    with pytest.raises(ValueError, match=r"the teacher's perplexity on 'web' is inf; it rules out a token"):
        domain_gap("web", 6.0, math.inf)
