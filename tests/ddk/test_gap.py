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
from ddk.values import SparseTargets

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


# The divergence from the teacher, in the same pass

K = 6
LOSSES = {
    "forward_kl": LossConfig(gamma=0.3),
    "reverse_kl": LossConfig(gamma=0.3, divergence="reverse_kl"),
    "jensen_shannon": LossConfig(gamma=0.3, divergence="jensen_shannon", beta=0.3),
    "renormalised": LossConfig(gamma=0.3, tail="renormalise", temperature=2.0),
}


class MarkedBlocks(Blocks):
    """Position j of a block carries loss where (block + j) is no multiple of 3."""

    def loss_mask(self, indices) -> np.ndarray:
        return (np.asarray(indices)[:, None] + np.arange(L)) % 3 != 0


class Targets:
    """A random teacher over all V tokens in float64, of which the K most probable are kept."""

    k, vocab_size = K, V

    def __init__(self, size: int) -> None:
        logits_NLV = torch.from_numpy(2.0 * np.random.default_rng(1).standard_normal((size, L, V)))
        self.log_p_NLV = logits_NLV.log_softmax(-1)
        self.kept_NLK, self.ids_NLK = self.log_p_NLV.topk(K)

    def __len__(self) -> int:
        return len(self.log_p_NLV)

    def read(self, indices) -> SparseTargets:
        rows = np.asarray(indices)
        kept = self.kept_NLK.numpy()[rows]
        return SparseTargets(
            ids_BLK=self.ids_NLK.numpy()[rows].astype(np.int32),
            logprobs_BLK=kept.astype(np.float32),
            tail_mass_BL=(1 - np.exp(kept).sum(-1)).astype(np.float32),
            true_logprobs_BL=np.zeros(kept.shape[:2], np.float32),
        )


def dense_divergence(model, tokens: np.ndarray, targets: Targets, loss: LossConfig, counted_NL: np.ndarray) -> float:
    """By its definition, in float64, from all logits of a plain forward pass."""
    model.eval()
    with torch.no_grad():
        logits_NLV = model(input_ids=torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits[..., :V].double()
    q_NLK = logits_NLV.softmax(-1).gather(-1, targets.ids_NLK)
    p_NLK = targets.kept_NLK.exp()
    if loss.tail == "renormalise":
        p_NLK, q_NLK = (one ** (1 / loss.temperature) for one in (p_NLK, q_NLK))
        p, q = (one / one.sum(-1, keepdim=True) for one in (p_NLK, q_NLK))
    else:
        p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p_NLK, q_NLK))
    if loss.divergence == "forward_kl":
        found_NL = (p * (p / q).log()).sum(-1)
    elif loss.divergence == "reverse_kl":
        found_NL = (q * (q / p).log()).sum(-1)
    else:
        m = loss.beta * p + (1 - loss.beta) * q
        found_NL = (loss.beta * p * (p / m).log() + (1 - loss.beta) * q * (q / m).log()).sum(-1)
    return float(found_NL[torch.from_numpy(counted_NL)].mean())


@pytest.mark.parametrize("marked", [False, True], ids=["all", "marked"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_divergence_is_that_of_its_definition(blocks: Blocks, loss: LossConfig, marked: bool) -> None:
    """7 blocks in batches of 3, padded rows in the model; the perplexity is the same with targets and without."""
    model, targets = tiny_model(PADDED), Targets(N)
    used = MarkedBlocks(blocks.tokens) if marked else blocks
    counted = used.loss_mask(np.arange(N)) if isinstance(used, MarkedBlocks) else np.ones((N, L), np.bool_)
    student = StudentLoss(model, V, loss)
    found = gap.held_out(student, used, targets, loss, batch_size=3)
    assert found.kl == pytest.approx(dense_divergence(model, blocks.tokens, targets, loss, counted), rel=1e-5)
    alone = gap.held_out(student, used, batch_size=3)
    assert alone.kl is None
    assert found.ppl == pytest.approx(alone.ppl, rel=1e-6)


def test_targets_of_other_blocks_are_refused(blocks: Blocks) -> None:
    loss = LOSSES["forward_kl"]
    with pytest.raises(ValueError, match="7 blocks need as many targets, and the loss; there are 6"):
        gap.held_out(StudentLoss(tiny_model(), V, loss), blocks, Targets(N - 1), loss, batch_size=3)


def test_a_gap_is_checked() -> None:
    assert domain_gap("web", 6.0, 4.0).ratio == 1.5
    with pytest.raises(ValueError, match="the student's perplexity on 'web' is nan; the training has diverged"):
        domain_gap("web", math.nan, 4.0, step=7)
    with pytest.raises(ValueError, match="perplexity on 'web' is nan; before any training: the model itself"):
        domain_gap("web", math.nan, 4.0, step=0)
    with pytest.raises(ValueError, match=r"the teacher's perplexity on 'web' is inf; it rules out a token"):
        domain_gap("web", 6.0, math.inf)
