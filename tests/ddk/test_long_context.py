"""Against a plain forward pass and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fake_data import V, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from ddk.long_context import LongReader, mean_perplexity, position_edges


def capped() -> Gemma2ForCausalLM:
    """Its logits are more than a projection."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=0.5,
            initializer_range=0.5,
        )
    ).eval()


@pytest.mark.parametrize("make", [tiny_model, capped])
def test_losses_and_answers_are_those_of_the_model(make) -> None:
    model = make().eval()
    tokens = np.random.default_rng(0).integers(0, V, 1201, dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0, :, :V].double()
    wanted = -logits[:-1].log_softmax(-1).numpy()[np.arange(1200), tokens[1:]]
    reader = LongReader(model, V)
    np.testing.assert_allclose(reader.losses(tokens), wanted, rtol=1e-4, atol=1e-4)

    # Greedy, a token at a time.
    prompt = tokens[:40].tolist()
    answer: list[int] = []
    for _ in range(3):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([prompt + answer])).logits[0, -1, :V].argmax()))
    assert reader.would_write(prompt, answer)
    assert not reader.would_write(prompt, [*answer[:2], (answer[2] + 1) % V])


def test_stretches_double_up_to_the_longest_input() -> None:
    assert position_edges(256, 2000) == [0, 256, 512, 1024, 2000]
    assert position_edges(256, 2048) == [0, 256, 512, 1024, 2048]
    assert position_edges(4096, 100) == [0, 100]


def test_a_perplexity_has_the_error_of_its_sequences() -> None:
    losses = np.array([[1.0, 3.0, 9.0], [2.0, 2.0, 9.0], [4.0, 3.0, 9.0]])
    ppl, error = mean_perplexity(losses, 0, 2)
    means = np.array([2.0, 2.0, 3.5])
    assert ppl == pytest.approx(math.exp(means.mean()))
    assert error == pytest.approx(ppl * means.std(ddof=1) / math.sqrt(3))
    assert mean_perplexity(losses[:1], 2, 3) == (pytest.approx(math.exp(9.0)), None)
    assert mean_perplexity(losses + 1000.0, 0, 1)[0] == math.inf
