"""The models that a run's benchmarks evaluate (the student before distillation, the distilled one, the teacher), and
the engines that run them.

A model is loaded only when it is asked something.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from storage.files import uri
from storage.files.digests import DigestCache
from storage.runs.folder import RunFolder
from tasks.evaluation.names import Role
from tasks.planning.models import local_folder, tokenizer_digests, weight_digests
from tasks.planning.tokenizer_files import has_tokenizer
from tasks.planning.weights import check_weights
from tasks.teachers.config import TeacherConfig, engine_version, on_gpu, resolved_dtype

Backend = Literal["hf", "vllm"]
BACKENDS: tuple[Backend, ...] = ("hf", "vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """One of the three."""

    role: Role
    engine: TeacherConfig
    """Its folder (`model`), and how it is run; the students' as the teacher's section has it, where that fits."""
    tokenizer: str
    """Folder of its tokenizer."""
    digests: Mapping[str, Any]
    """sha256 of its weights, its config and its tokenizer's files."""

    def backend(self, wanted: str, *, generates: bool) -> Backend:
        """What runs it for one benchmark.

        Left to itself, vLLM writes text where there is a GPU, and does everything for a model that one GPU of
        transformers cannot take. Choices are compared by transformers, which runs a question's choices of one token
        together.
        """
        if wanted in ("hf", "vllm"):
            return "hf" if wanted == "hf" else "vllm"
        if not on_gpu():
            return "hf"
        return "vllm" if generates or self.engine.tensor_parallel_size > 1 or self.engine.quantization else "hf"

    def dtype(self, backend: Backend) -> str:
        """Of the forward pass. On a CPU transformers computes in float32, unless the configuration says otherwise."""
        if backend == "hf" and self.engine.dtype == "auto" and not on_gpu():
            return "float32"
        return resolved_dtype(self.engine)

    def identity(self, backend: Backend) -> dict[str, Any]:
        """What of the model and its engine determines an answer."""
        engine = f"vllm {engine_version()}" if backend == "vllm" else f"transformers {metadata.version('transformers')}"
        return {**self.digests, "engine": engine, "dtype": self.dtype(backend)}


def require_harness() -> str:
    """The installed version of lm-evaluation-harness.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("ddk eval needs lm-evaluation-harness, which is not installed: pip install 'ddk-distill[eval]'")
    return metadata.version("lm_eval")


@contextmanager
def evaluated_models(
    roles: Sequence[Role], *, root: str, run: str, student: StudentConfig, teacher: TeacherConfig
) -> Iterator[list[EvaluatedModel]]:
    """Each model with its files on this machine; a student on S3 is copied for as long as the context lasts.

    Raises:
        UserError: a model is not there, or its weights are not whole.
    """
    digests = DigestCache(uri.join(root, "digests.json"))
    with ExitStack() as stack:
        models = [_model(role, root, run, student, teacher, digests, stack) for role in roles]
        yield models


def _model(
    role: Role,
    root: str,
    run: str,
    student: StudentConfig,
    teacher: TeacherConfig,
    digests: DigestCache,
    stack: ExitStack,
) -> EvaluatedModel:
    if role == "teacher":
        if teacher.source == "server":
            raise UserError(
                "teacher.source is 'server', so its weights cannot be evaluated here; set teacher.source: engine "
                "and teacher.model to its folder, or evaluate only the others (--models before,student)"
            )
        folder = local_folder(teacher.model, teacher.revision, "teacher.model")
        engine = teacher.model_copy(update={"model": folder, "revision": None})
        return _described(role, engine, folder, digests)
    if role == "student":
        folder = stack.enter_context(_final_student(root, run))
        field = "the run's student"
    else:
        folder = local_folder(student.model, student.revision, "student.model")
        field = "student.model"
    tokenizer = (
        folder
        if has_tokenizer(folder)
        else local_folder(teacher.model, teacher.revision, "teacher.model", weights=False)
    )
    engine = TeacherConfig(
        model=folder,
        trust_remote_code=student.trust_remote_code,
        max_batch_tokens=teacher.max_batch_tokens,
        gpu_memory_utilization=teacher.gpu_memory_utilization,
        cpu_kv_cache_gib=teacher.cpu_kv_cache_gib,
    )
    return _described(role, engine, tokenizer, digests, field)


@contextmanager
def _final_student(root: str, run: str) -> Iterator[str]:
    folder = RunFolder(root, run)
    if folder.summary() is None:
        raise UserError(
            f"run '{run}' has no final student yet ({folder.student_url}); finish it with `ddk train`, or evaluate "
            f"only the others (--models before,teacher)"
        )
    if faults := folder.student_faults():
        raise UserError(f"{faults[0]}; run the same `ddk train` again, which saves the student from its checkpoint")
    with uri.local_folder_copy(folder.student_url) as local:
        yield local


def _described(
    role: Role, engine: TeacherConfig, tokenizer: str, digests: DigestCache, field: str = "teacher.model"
) -> EvaluatedModel:
    check_weights(engine.model, field)
    described = {
        "weights": weight_digests(engine.model, digests, field),
        "tokenizer": tokenizer_digests(tokenizer, digests),
        **({"quantization": engine.quantization} if engine.quantization else {}),
    }
    return EvaluatedModel(role=role, engine=engine, tokenizer=tokenizer, digests=described)


@contextmanager
def running(model: EvaluatedModel, backend: Backend, *, seed: int, on_progress: Callable[[int], None]) -> Iterator[Any]:
    """The model, loaded, as the harness takes one; its memory and its processes are gone afterwards.

    Args:
        on_progress: hears how many requests were answered since its last call.

    Raises:
        UserError: it cannot be loaded.
    """
    lm: Any
    if backend == "vllm":
        engine_version()
        from tasks.evaluation.vllm_model import VllmModel

        lm = VllmModel(model.engine, tokenizer=model.tokenizer, seed=seed, on_progress=on_progress)
    else:
        import torch

        from tasks.evaluation.transformers_model import TransformersModel

        lm = TransformersModel(
            StudentConfig(model=model.engine.model, trust_remote_code=model.engine.trust_remote_code),
            tokenizer=model.tokenizer,
            dtype=getattr(torch, model.dtype(backend)),
            device="cuda" if on_gpu() else "cpu",
            field=f"the {model.role}'s folder",
            on_progress=on_progress,
        )
    try:
        yield lm
    finally:
        lm.close()
