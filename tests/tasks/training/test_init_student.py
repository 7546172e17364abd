"""Students cut out of their teachers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config

from ddk.cutting import even_layers
from ddk.errors import UserError
from tasks.training.init_student import init_student

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, **HEADS),
    "qwen2": Qwen2Config(**SMALL, **HEADS, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, **HEADS, head_dim=16, use_sliding_window=True, max_window_layers=3, sliding_window=8),
    "mixtral": MixtralConfig(**SMALL, **HEADS, num_local_experts=2),
    "gpt2": GPT2Config(vocab_size=300, n_embd=64, n_layer=6, n_head=4, n_positions=64),
}
TOKENS = torch.arange(20)[None] * 7 % 300


def teacher(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not all alike
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return str(folder)


def logits(folder: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


def layers_of(model: Any) -> torch.nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_are_those_of_the_teacher(tmp_path: Path, kind: str) -> None:
    """The reference: the teacher, whose other layers are passed over."""
    source = teacher(tmp_path / "teacher", kind)
    made = init_student(source, str(tmp_path / "student"), [0, 2, 5], None)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    every = layers_of(model)
    for at, layer in enumerate(every):
        if at not in made.layers:
            layer.forward = lambda hidden, *_, **__: hidden
    with torch.no_grad():
        expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits(made.folder), expected, rtol=1e-5, atol=1e-5)
    assert made.parameters < made.parameters_before
    config = transformers.AutoConfig.from_pretrained(made.folder)
    assert config.num_hidden_layers == 3
    if kind == "qwen3":
        types = transformers.AutoConfig.from_pretrained(source).layer_types
        assert config.layer_types == [types[at] for at in (0, 2, 5)]
    assert "not a model to use" in Path(made.folder, "README.md").read_text()
    assert transformers.AutoTokenizer.from_pretrained(made.folder).encode("hi")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_heads_and_channels_with_the_largest_weights_stay(tmp_path: Path, kind: str) -> None:
    """The reference: a teacher whose other heads and channels are zero computes what the student does.

    A norm divides by the root of the mean square, which over half of the channels is larger by √2.
    """
    folder = tmp_path / "teacher"
    source = teacher(folder, kind)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden = torch.zeros(64, dtype=torch.bool)
    hidden[::2] = True
    inner = torch.arange(96) >= 48
    groups = torch.tensor([False, True, True, False])
    heads = groups.repeat_interleave(2)
    rows = {"q": heads.repeat_interleave(dim), "k": groups.repeat_interleave(dim), "v": groups.repeat_interleave(dim)}
    with torch.no_grad():
        for layer in model.model.layers:
            for name, keep in rows.items():
                projection = getattr(layer.self_attn, f"{name}_proj")
                projection.weight *= keep[:, None] * hidden
                if projection.bias is not None:
                    projection.bias *= keep
            layer.self_attn.o_proj.weight *= hidden[:, None] * rows["q"]
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight *= inner[:, None] * hidden
            layer.mlp.down_proj.weight *= hidden[:, None] * inner
        model.model.embed_tokens.weight *= hidden
        model.lm_head.weight *= 1.0 if config.tie_word_embeddings else hidden
    model.save_pretrained(folder)
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
    made = init_student(source, str(tmp_path / "student"), None, 0.5)
    student = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32).eval()
    small = student.config
    assert (small.hidden_size, small.intermediate_size) == (32, 48)
    assert (small.num_attention_heads, small.num_key_value_heads) == (4, 2)
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (4 * dim, 32)
    with torch.no_grad():
        for module in student.modules():
            # Not the norms of single heads, whose dimension stays.
            if "Norm" in type(module).__name__ and module.weight.shape == (32,):
                module.weight *= 2**0.5
        # eps has another share in a mean over half of the channels.
        torch.testing.assert_close(student(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)


def test_layers_are_spread_evenly() -> None:
    assert even_layers(30, 11) == [0, 3, 6, 9, 12, 14, 17, 20, 23, 26, 29]
    assert even_layers(4, 4) == [0, 1, 2, 3]
    assert even_layers(6, 2) == [0, 5]
    assert even_layers(6, 1) == [5]


@pytest.mark.parametrize(
    ("kind", "layers", "width", "message"),
    [
        ("llama", None, None, "nothing is cut; say how many layers to keep"),
        ("llama", 7, None, "--layers is 7, and the model has 6 layers"),
        ("llama", [0, 6], None, "--layers names layer 6, and the model has the layers 0 to 5"),
        ("llama", [2, 1], None, "--layers is 2,1; name each layer once, in ascending order"),
        ("llama", None, 1.5, "--width is 1.5; it must lie between 0 and 1"),
        ("mixtral", None, 0.5, "the width of a model of type 'mixtral' cannot be cut: what 'model.layers.0"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path: Path, kind: str, layers: Any, width: Any, message: str) -> None:
    source = teacher(tmp_path / "teacher", kind)
    with pytest.raises(UserError, match=message):
        init_student(source, str(tmp_path / "student"), layers, width)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(UserError, match="is there already"):
        init_student("nothing", str(tmp_path / "student"), 2, None)
    source = teacher(tmp_path / "teacher", "llama")
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 8}))
    with pytest.raises(UserError, match=r"has no weights for 'model\.layers\.3"):
        init_student(source, str(tmp_path / "other"), [0, 1, 2, 7], None)
