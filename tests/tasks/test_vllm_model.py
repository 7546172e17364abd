"""The vLLM backend against transformers: the same questions, the same answers; and its end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lm_eval.api.instance import Instance

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from tasks.benchmark_models import EvaluatedModel, evaluated_models, running
from tasks.teacher import TeacherConfig
from tasks.transformers_model import TransformersModel

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own warnings are not ours to mend


def test_vllm_answers_as_transformers_does_and_leaves_nothing_running(teacher_folder: str) -> None:
    engine = TeacherConfig(model=str(Path(teacher_folder).resolve()), dtype="float32", max_batch_tokens=512)
    model = EvaluatedModel(role="teacher", engine=engine, tokenizer=engine.model, digests={"weights": {}})
    choices = [
        ("Question: What is 2 + 2?\nAnswer:", " 4"),
        ("Question: What is 2 + 2?\nAnswer:", " five"),
        ("def add(a, b):", " return a + b"),
        ("word " * 900, "end"),
    ]
    prompts = ["def add(a, b):\n    return", "Once upon a time", "x = 1\n" * 400]
    options = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    requests = {
        "loglikelihood": [_request("loglikelihood", *pair) for pair in choices],
        "generate_until": [_request("generate_until", prompt, options) for prompt in prompts],
    }
    with running(model, "vllm", seed=1, on_progress=lambda _: None) as lm:
        found = {kind: getattr(lm, kind)(asked) for kind, asked in requests.items()}
        engines = [child for child in psutil.Process().children(recursive=True) if "VLLM::" in _command(child)]
        assert engines
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive
    plain = TransformersModel(
        StudentConfig(model=engine.model), tokenizer=engine.model, dtype=torch.float32, device="cpu", field="x"
    )
    expected = {kind: getattr(plain, kind)(asked) for kind, asked in requests.items()}
    plain.close()
    # vLLM counts the 70 rows of padding of this model's vocabulary among its tokens, and reads one token less.
    for (logprob, greedy), (other, same) in zip(found["loglikelihood"], expected["loglikelihood"], strict=True):
        assert logprob == pytest.approx(other, abs=0.15)
        assert greedy == same
    assert found["generate_until"] == expected["generate_until"]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("test", 0, 1))


def test_where_vllm_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(wanted: str, *, generates: bool, **engine: Any) -> str:
        config = TeacherConfig(model="m", **engine)
        model = EvaluatedModel(role="teacher", engine=config, tokenizer="m", digests={})
        return model.backend(wanted, generates=generates)

    monkeypatch.setattr("tasks.benchmark_models.on_gpu", lambda: False)
    assert {backend("auto", generates=generates) for generates in (True, False)} == {"hf"}
    assert backend("vllm", generates=False) == "vllm"
    monkeypatch.setattr("tasks.benchmark_models.on_gpu", lambda: True)
    assert backend("auto", generates=True) == "vllm"
    assert backend("auto", generates=False) == "hf"
    assert backend("auto", generates=False, tensor_parallel_size=2) == "vllm"
    assert backend("auto", generates=False, quantization="fp8") == "vllm"
    assert backend("hf", generates=True) == "hf"


@pytest.mark.parametrize("role", ["teacher", "before"])
def test_weights_that_are_cut_are_named_before_a_question_is_made(
    role: Any, tmp_path: Path, teacher_folder: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(teacher_folder, model)
    weights = sorted(model.glob("*.safetensors"))[-1]
    weights.write_bytes(weights.read_bytes()[:-100])
    config = {"student": StudentConfig(model=str(model)), "teacher": TeacherConfig(model=str(model))}
    with (
        pytest.raises(UserError, match=r"safetensors \((teacher|student)\.model\) has .* cut short"),
        evaluated_models([role], root=str(tmp_path), run="none", **config),
    ):
        pass
