"""Counted against the weights themselves, and against what torch says that a forward pass does."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tasks.flops import ModelSize, model_size, size_of


def tensors(folder):
    """Shape of every tensor, from the headers of the safetensors files."""
    shapes = {}
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            shapes |= {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    return shapes


def test_parameters_are_those_of_the_files(teacher_folder):
    found = model_size(teacher_folder)
    # Tied: the files hold the table once, and it is the output projection.
    assert found.parameters == sum(torch.Size(shape).numel() for shape in tensors(teacher_folder).values())
    assert (found.layers, found.attention_width) == (4, 256)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_only_looked_up_does_not_count(tied):
    config = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert size_of(config).parameters == layers + 32 + 100 * 32


@pytest.mark.parametrize("seq_len", [64, 256])
def test_a_forward_pass_is_what_torch_counts(teacher_folder, seq_len):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        teacher_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, seq_len, dtype=torch.int64))
    # Norms and biases are parameters too, though no products: a thousandth here.
    assert model_size(teacher_folder).forward_flops(seq_len) == pytest.approx(
        counter.get_total_flops() / seq_len, rel=5e-3
    )


def test_the_formula():
    assert ModelSize(parameters=1000, layers=2, attention_width=8).forward_flops(16) == 2000 + 4 * 2 * 8 * 16


def test_what_is_not_known_is_none(tmp_path):
    assert model_size("/no/such/model") is None
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    assert model_size(str(tmp_path)) is None
