from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ddk.errors import UserError
from ddk.parallel import World
from ddk.student import load_student, load_tokenizer, save_student, student_weights
from ddk.train_config import StudentConfig

V, PADDED = 257, 272
SHAPE = {
    "vocab_size": PADDED,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def tiny_model(kind: str = "qwen2", tied: bool = False):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=tied))


def tiny_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """Every byte is a token. transformers makes a Qwen2Tokenizer of it in a Qwen2 folder: the special token is its."""
    vocabulary = {"<|endoftext|>": 0} | {
        byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)
    }
    model = Tokenizer(BPE(vocabulary, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model, **({"eos_token": "<|endoftext|>"} if eos else {}))


def save(model, path: str) -> None:
    save_student(model, student_weights(model, World()), path)
    tiny_tokenizer().save_pretrained(path)


@pytest.fixture
def folder(tmp_path) -> str:
    path = str(tmp_path / "student")
    save(tiny_model(), path)
    return path


def load(path: str, vocab_size: int = V):
    return load_student(StudentConfig(model=path), vocab_size)


def weights_file(folder: str) -> str:
    return os.path.join(folder, "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_saved_and_loaded_by_transformers(tmp_path, kind: str, tied: bool) -> None:
    model, path = tiny_model(kind, tied).train(), str(tmp_path / "a" / "b")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save(model, path)

    stored = load_file(weights_file(path))
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is not tied, "tied weights are stored once"
    assert not [name for name in os.listdir(path) if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["dtype"] == "bfloat16"

    loaded, info = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.bfloat16
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, before[name].to(torch.bfloat16)), name

    assert model.training, "the model in training is not touched"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) == V
    assert tokenizer.encode("a b é") == tiny_tokenizer().encode("a b é")
    assert tokenizer.decode(tokenizer.encode("a b é")) == "a b é"


@pytest.mark.parametrize("tied", [True, False])
def test_saving_again_over_an_older_student(tmp_path, tied: bool) -> None:
    path = str(tmp_path / "student")
    model = tiny_model(tied=tied)
    save(model, path)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    save(model, path)
    expected = model.model.embed_tokens.weight.to(torch.bfloat16).float()
    assert torch.equal(load(path).model.embed_tokens.weight, expected)


def test_loaded_in_float32_for_evaluation(folder: str) -> None:
    student = load(folder)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert not student.training
    assert next(student.parameters()).device.type == "cpu"
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_fewer_rows_than_tokens(folder: str) -> None:
    assert load(folder, PADDED).config.vocab_size == PADDED
    with pytest.raises(
        UserError, match=r"predicts 272 tokens and the tokenizer has 273; teacher and student must share"
    ):
        load(folder, PADDED + 1)


def test_no_such_folder(tmp_path) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"student.model '{missing}' cannot be loaded: there is no such folder"):
        load(missing)
    with pytest.raises(UserError, match=rf"the tokenizer of '{missing}' cannot be loaded"):
        load_tokenizer(missing)


def test_an_empty_folder(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded: Unrecognized model"):
        load(str(tmp_path))


def test_a_pickle_is_not_read(folder: str) -> None:
    torch.save(load_file(weights_file(folder)), os.path.join(folder, "pytorch_model.bin"))
    os.remove(weights_file(folder))
    with pytest.raises(UserError, match=r"cannot be loaded: .*no file named model.safetensors"):
        load(folder)


@pytest.mark.parametrize("kept", [5, 4000])
def test_damaged_weights(folder: str, kept: int) -> None:
    os.truncate(weights_file(folder), kept)
    with pytest.raises(UserError, match=r"cannot be loaded: .*deserializing header"):
        load(folder)


def test_missing_weights_are_not_made_up(folder: str) -> None:
    stored = load_file(weights_file(folder))
    for layer in (0, 1):
        stored.pop(f"model.layers.{layer}.mlp.up_proj.weight")
    save_file(stored, weights_file(folder), metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for 'model.layers.0.mlp.up_proj.weight' and 1 more; is the folder whole"
    ):
        load(folder)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_no_numbers(folder: str, value: float) -> None:
    stored = load_file(weights_file(folder))
    stored["model.layers.1.mlp.up_proj.weight"][2, 1] = value
    save_file(stored, weights_file(folder), metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds NaN or infinite weights, first in 'model.layers.1.mlp.up_proj.weight'"):
        load(folder)


def test_weights_of_another_shape(folder: str) -> None:
    stored = load_file(weights_file(folder))
    stored["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(stored, weights_file(folder), metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.weight' has shape \[3, 3\], a mismatch with the \[48, 32\]"):
        load(folder)


def edit_config(folder: str, **changes) -> None:
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump({**config, **changes}, file)


def test_an_unknown_architecture(folder: str) -> None:
    edit_config(folder, model_type="nothing_known")
    with pytest.raises(UserError, match=r"cannot be loaded: .*nothing_known"):
        load(folder)


def test_a_folders_own_code_does_not_run(folder: str, tmp_path) -> None:
    witness = tmp_path / "ran"
    with open(os.path.join(folder, "modeling_evil.py"), "w") as file:
        file.write(f"open({str(witness)!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig: pass\n")
    edit_config(
        folder,
        model_type="evil",
        auto_map={"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"},
    )
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    assert not witness.exists()


def test_the_tokenizer(folder: str, tmp_path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_fast
    assert len(tokenizer) == V
    without = str(tmp_path / "without")
    tiny_tokenizer(eos=False).save_pretrained(without)
    assert load_tokenizer(without).eos_token_id is None


def test_a_copied_folder_loads_too(folder: str, tmp_path) -> None:
    copy = str(tmp_path / "copy")
    shutil.copytree(folder, copy)
    one, other = load(folder), load(copy)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_config() -> None:
    assert StudentConfig(model="x").trust_remote_code is False
    with pytest.raises(ValidationError, match="Extra inputs"):
        StudentConfig.model_validate({"model": "x", "path": "y"})
