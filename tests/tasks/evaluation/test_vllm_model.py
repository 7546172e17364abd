"""When benchmarks are put to vLLM, and which models are refused. What it answers: tests/flows/test_evaluate.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from tasks.evaluation.models import EvaluatedModel, evaluated_models
from tasks.teachers.config import TeacherConfig


def test_where_vllm_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(wanted: str, *, generates: bool, **engine: Any) -> str:
        config = TeacherConfig(model="m", **engine)
        model = EvaluatedModel(role="teacher", engine=config, tokenizer="m", digests={})
        return model.backend(wanted, generates=generates)

    monkeypatch.setattr("tasks.evaluation.models.on_gpu", lambda: False)
    assert {backend("auto", generates=generates) for generates in (True, False)} == {"hf"}
    assert backend("vllm", generates=False) == "vllm"
    monkeypatch.setattr("tasks.evaluation.models.on_gpu", lambda: True)
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
