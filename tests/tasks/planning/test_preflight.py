"""What does not fit is said before anything is captured, from headers, configs and tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_rows import topk_rows, write_topk
from safetensors.torch import load_file, save_file
from tiny_model import SMALLEST
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.parallel import World
from ddk.student import load_student, save_student, student_weights
from ddk.train_config import StudentConfig
from storage.corpus.domain import DomainConfig
from tasks.packing.pack_rows import pack_rows
from tasks.planning import preflight
from tasks.planning.preflight import check_student
from tasks.planning.store_plan import Plan, plan_stores
from tasks.teachers.config import TeacherConfig
from tasks.teachers.vllm_engine import Engine
from tasks.training.saved_student import check_saved_student, sample_of

L, BYTES = 10, 257


def write_tokenizer(folder: Path, *, added: tuple[str, ...] = (), shift: int = 0, files: str = "json") -> None:
    """Every byte is a token, behind the one that ends a text; `shift` gives them other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {byte: 1 + (i + shift) % 256 for i, byte in enumerate(alphabet)}
    kind = "PreTrainedTokenizerFast"
    if files == "vocab":
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        kind = "Qwen2Tokenizer"
    else:
        made = Tokenizer(BPE(vocab=vocab, merges=[]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(one, special=True) for one in ("<|endoftext|>", *added)])
        made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(folder: Path, config: Any = None, *, rows: int = 320, **tokenizer: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config or transformers.LlamaConfig(vocab_size=rows, **SMALLEST)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="40KB")
    write_tokenizer(folder, **tokenizer)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student that fit, and rows of predictions."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "teacher")
    make_model(folder / "student")
    for name, lengths in (("train", [21, 31]), ("validation", [21])):
        rows = topk_rows(lengths)
        for row in rows:
            row["input_ids"] = row["input_ids"] % 256 + 1
            row["topk_ids"] = (row["topk_ids"][:, :1] + 3 * torch.arange(8).numpy()) % BYTES
        write_topk(folder / f"{name}.parquet", [{k: v for k, v in row.items() if k != "true_logprobs"} for row in rows])
    return folder


@pytest.fixture
def student(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "student", tmp_path / "student"))


def planned(models: Path, root: Path, teacher: Path | None = None, seq_len: int = L) -> Plan:
    domain = {name: str(models / f"{name}.parquet") for name in ("train", "validation")}
    return plan_stores(
        str(root),
        {"web": DomainConfig.model_validate({"targets": "topk", **domain})},
        PackingConfig(seq_len=seq_len),
        TeacherConfig(model=str(teacher or models / "teacher"), k=8),
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def change_tensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(first_shard(folder))
    change(tensors)
    save_file(tensors, first_shard(folder), metadata={"format": "pt"})


def with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[-1] = float("nan")


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def another_shape(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=64)


def not_in_the_files(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    index.write_text(json.dumps(content))
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        if tensors.pop("model.layers.1.mlp.up_proj.weight", None) is not None:
            save_file(tensors, path, metadata={"format": "pt"})


def quantised(method: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", quantization_config={"quant_method": method})


MISFITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file is cut": (lambda folder: os.truncate(first_shard(folder), 3000), "cut short or is still being written"),
    "a header is cut": (lambda folder: os.truncate(first_shard(folder), 20), "is cut short, or no safetensors file"),
    "a file is missing": (lambda folder: first_shard(folder).unlink(), r"lacks the weight file model-00001-of-"),
    "a tensor is missing": (not_in_the_files, "has no weights for 'model.layers.1.mlp.up_proj.weight'"),
    "shapes differ": (another_shape, r"has shape \[\d+, \d+\], a mismatch with the \[\d+, \d+\]"),
    "NaN": (lambda folder: change_tensor(folder, with_nan), "hold NaN or infinity"),
    "pickles": (pickled, r"its weights are in pytorch_model.bin, and other formats \(pickles\) are not read"),
    "positions": (lambda folder: edit(folder / "config.json", max_position_embeddings=9), "takes 9 positions"),
    **{
        method: (quantised(method), rf"is quantised \({method}, in its config.json\).*name the unquantised checkpoint")
        for method in ("bitsandbytes", "fp8", "gptq", "awq", "compressed-tensors")
    },
    "other ids": (lambda folder: write_tokenizer(folder, shift=100), "256 tokens differ"),
    "a generation config that does not load": (
        lambda folder: edit(folder / "generation_config.json", num_return_sequences=4),
        "generation_config.json cannot be read .*correct or remove it",
    ),
    "a damaged generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json cannot be read",
    ),
}


def test_longer_blocks_than_the_student_takes_need_its_preparation_for_longer_contexts(
    models: Path, student: Path, tmp_path: Path
) -> None:
    plan = planned(models, tmp_path / "root")
    plain, context = {"model": str(student)}, {"target": 64}
    whole = check_student(StudentConfig(**plain, context=context), plan).context
    assert whole is not None
    assert (whole.trained, whole.block, whole.factor, whole.min_scale) == (32, L, 2.0, 1)
    assert check_student(StudentConfig(**plain), plan).context is None

    edit(student / "config.json", max_position_embeddings=9)
    with pytest.raises(UserError, match=r"takes 9 positions; .* or set student\.context"):
        check_student(StudentConfig(**plain), plan)
    longer = check_student(StudentConfig(**plain, context=context), plan).context
    assert longer is not None
    assert (longer.trained, longer.min_scale, longer.factor) == (9, 2, 64 / 9)
    with pytest.raises(UserError, match=r"student\.context\.trained is 16, and .* declares 9 positions; lower it"):
        check_student(StudentConfig(**plain, context={**context, "trained": 16}), plan)
    edit(student / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(UserError, match="a student of type 'llama' already stretches its rotary positions"):
        check_student(StudentConfig(**plain, context=context), plan)


@pytest.mark.parametrize("name", list(MISFITS))
def test_a_misfit_is_said_before_anything_is_captured(name: str, models: Path, student: Path, tmp_path: Path) -> None:
    spoil, message = MISFITS[name]
    plan = planned(models, tmp_path / "root")
    assert check_student(StudentConfig(model=str(student)), plan).vocab_size == BYTES
    spoil(student)
    with pytest.raises(UserError, match=message) as caught:
        check_student(StudentConfig(model=str(student)), plan)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "root" / "targets").exists()


def test_a_teacher_that_lacks_a_shard(models: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(models / "teacher", tmp_path / "teacher"))
    first_shard(teacher).unlink()
    with pytest.raises(UserError, match=r"^teacher.model .* lacks the weight file model-00001-of-"):
        plan_stores(
            str(tmp_path / "root"),
            {"web": DomainConfig(train=str(models / "train.parquet"), validation=str(models / "validation.parquet"))},
            PackingConfig(seq_len=L),
            TeacherConfig(model=str(teacher), k=8),
        )


def test_a_teacher_that_vllm_runs_on_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once and in one line, where no engine has been started."""
    transformers.MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    monkeypatch.setattr("tasks.teachers.vllm_engine.on_gpu", lambda: False)
    with pytest.raises(UserError, match="is a mamba model, and vLLM has its state-space kernels"):
        Engine(TeacherConfig(model=str(tmp_path)))


def test_vocabularies_in_any_form(models: Path, tmp_path: Path) -> None:
    """vocab.json and merges.txt are a tokenizer as tokenizer.json is: equal ids pass, others do not."""
    teacher = make_model(tmp_path / "teacher", files="vocab")
    plan = planned(models, tmp_path / "root", teacher)
    make_model(tmp_path / "same", files="vocab")
    make_model(tmp_path / "other", files="vocab", shift=100)
    assert check_student(StudentConfig(model=str(tmp_path / "same")), plan)
    with pytest.raises(UserError, match="256 tokens differ"):
        check_student(StudentConfig(model=str(tmp_path / "other")), plan)


def test_tokens_that_one_of_them_adds(models: Path, tmp_path: Path) -> None:
    """A student's further ones are no target's; a teacher's the student would not know."""
    more = make_model(tmp_path / "more", added=("<think>",))
    assert check_student(StudentConfig(model=str(more)), planned(models, tmp_path / "root")).vocab_size == BYTES
    with pytest.raises(UserError, match=r"'<think>': 257 and None.*remove the tokenizer's files from the student's"):
        check_student(StudentConfig(model=str(models / "student")), planned(models, tmp_path / "root", more))


def test_a_token_beyond_the_rows_that_no_text_holds(models: Path, tmp_path: Path) -> None:
    picture = ("<image_soft_token>",)
    wide, narrow = (make_model(tmp_path / f"{rows}", rows=rows, added=picture) for rows in (320, BYTES))
    plan = planned(models, tmp_path / "root", wide)
    assert plan.vocab_size == BYTES + 1
    pack_rows.fn(plan, "web")
    assert check_student(StudentConfig(model=str(narrow)), plan).vocab_size == BYTES
    assert planned(models, tmp_path / "root", narrow).vocab_size == BYTES, "of the teacher likewise"
    # A token of a text's own beyond the rows is another matter.
    with pytest.raises(UserError, match="predicts 200 tokens and the tokenizer has 258"):
        check_student(StudentConfig(model=str(make_model(tmp_path / "200", rows=200, added=picture))), plan)


def test_a_block_that_holds_the_token(models: Path, tmp_path: Path) -> None:
    picture = ("<image_soft_token>",)
    wide, narrow = (make_model(tmp_path / f"{rows}", rows=rows, added=picture) for rows in (320, BYTES))
    rows = topk_rows([21])
    for row in rows:
        row["input_ids"] = row["input_ids"] % 256 + 1
        row["input_ids"][7] = BYTES
        row["topk_ids"] = row["topk_ids"][:, :1] * 0 + torch.arange(8).numpy()
    for name in ("train", "validation"):
        write_topk(tmp_path / f"{name}.parquet", [{k: v for k, v in row.items() if k[:4] != "true"} for row in rows])
    plan = planned(tmp_path, tmp_path / "root", wide)
    pack_rows.fn(plan, "web")
    with pytest.raises(UserError, match=r"a train block holds token 257, and student.model predicts 257 tokens"):
        check_student(StudentConfig(model=str(narrow)), plan)


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}),
        ({"do_sample": False, "top_k": 20}, {"top_k": 20, "do_sample": True}),
    ],
)
def test_a_generation_config_that_loads_can_be_saved(
    given: dict[str, Any], saved: dict[str, Any], models: Path, student: Path, tmp_path: Path
) -> None:
    """Published models name sampling parameters without do_sample: transformers reads that and does not write it."""
    edit(student / "generation_config.json", eos_token_id=0, **given)
    check_student(StudentConfig(model=str(student)), planned(models, tmp_path / "root"))
    model = load_student(StudentConfig(model=str(student)), BYTES)
    save_student(model, student_weights(model, World()), str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved.items() <= written.items()


def test_a_model_with_code_of_its_own_is_saved_with_it(models: Path, tmp_path: Path) -> None:
    student = make_model(tmp_path / "own")
    (student / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (student / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(student / "config.json", model_type="own", auto_map=own, architectures=["OwnModel"])
    plan = planned(models, tmp_path / "root")
    with pytest.raises(UserError, match=r"code in its folder; read that, and set student.trust_remote_code: true"):
        check_student(StudentConfig(model=str(student)), plan)
    config = StudentConfig(model=str(student), trust_remote_code=True)
    check_student(config, plan)
    model = load_student(config, BYTES)
    save_student(model, student_weights(model, World()), str(tmp_path / "saved"))
    again = load_student(StudentConfig(model=str(tmp_path / "saved"), trust_remote_code=True), BYTES)
    assert type(again).__name__ == "OwnModel"


def test_looked_into_once_as_long_as_nothing_changes(
    models: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(models, tmp_path / "root")
    first = check_student(StudentConfig(model=str(student)), plan)
    monkeypatch.setattr(preflight, "check_numbers", lambda *_: pytest.fail("read again"))
    assert check_student(StudentConfig(model=str(student)), plan) is first


def test_the_saved_student_computes_what_was_reported(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student whose logits are scaled, taken for a plain one: what transformers computes of it is something else."""
    from ddk.gap import plain_perplexity
    from ddk.train_config import TrainConfig
    from storage.blocks import open_blocks

    plan = planned(models, tmp_path / "root")
    pack_rows.fn(plan, "web")
    blocks = {"web": plan["web"].blocks_url}
    config = transformers.GraniteConfig(vocab_size=320, logits_scaling=8.0, initializer_range=1.0, **SMALLEST)
    folder = str(make_model(tmp_path / "granite", config))
    model = load_student(StudentConfig(model=folder), BYTES)
    right = plain_perplexity(model, open_blocks(blocks["web"], "validation"), vocab_size=BYTES)
    train = TrainConfig(steps=1, batch_size=1, device="cpu")

    def check(measured: float) -> None:
        check_saved_student(folder, {"web": measured}, blocks, vocab_size=BYTES, train=train, trust_remote_code=False)

    assert sample_of(blocks) == {"web": 2}
    check(right)
    with pytest.raises(UserError, match="what was saved is not what was trained"):
        check(2.0 * right)
    monkeypatch.setattr("ddk.student.is_projection", lambda model: True)
    with pytest.raises(UserError, match="another objective was trained than this model computes"):
        check(right)
