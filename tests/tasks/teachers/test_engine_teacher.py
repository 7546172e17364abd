"""The real engine against a plain transformers forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import numpy as np
import psutil
import pytest
import torch
import transformers
from teacher_contract import TeacherContract

from ddk.errors import LostPartError, UserError
from ddk.values import SparseTargets
from tasks.capture.cache_targets import check_distribution
from tasks.teachers import config as teacher
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher

SEQ_LEN, VOCAB, K = 200, 4090, 16
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("default"),  # vLLM's own warnings are not ours to mend
]


@pytest.fixture(scope="module")
def config(teacher_folder: str) -> TeacherConfig:
    # Fewer tokens a pass than a block has: every block runs in pieces, and pieces of several blocks run together.
    return TeacherConfig(model=teacher_folder, k=K, dtype="float32", shard_blocks=6, max_batch_tokens=150)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (6, SEQ_LEN + 1)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Before:
    """What there was before the engine."""

    processes: set[int]
    files: set[str]
    environment: dict[str, str | None]


@pytest.fixture(scope="module")
def before() -> Before:
    resource_tracker.ensure_running()  # which stays
    return Before(processes(), shared_files(), environment())


def environment() -> dict[str, str | None]:
    """What the engine's processes read."""
    names = ("TMPDIR", "VLLM_RPC_BASE_PATH", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")
    return {name: os.environ.get(name) for name in (*names, "VLLM_WORKER_MULTIPROC_METHOD", "MALLOC_TRIM_THRESHOLD_")}


def processes() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != "zombie"}


def shared_files() -> set[str]:
    return set(glob.glob("/dev/shm/ddk-capture-*"))


@pytest.fixture(scope="module")
def engine(config: TeacherConfig, before: Before) -> Iterator[VllmTeacher]:
    with VllmTeacher(config, seq_len=SEQ_LEN, vocab_size=VOCAB) as teacher:
        assert processes() == before.processes, "an engine that is not needed must not start"
        yield teacher


@pytest.fixture(scope="module")
def captured(engine: VllmTeacher, tokens: np.ndarray) -> SparseTargets:
    return engine.capture(tokens)


@pytest.fixture(scope="module")
def truth(teacher_folder: str, tokens: np.ndarray) -> torch.Tensor:
    """Log-probabilities [B, L, V] of a float32 forward pass, normalised in float64 over the tokenizer's tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits
    return logits[..., :VOCAB].double().log_softmax(-1)


@pytest.fixture
def unopened(config: TeacherConfig) -> Callable[..., VllmTeacher]:
    return lambda **changes: VllmTeacher(config.model_copy(update=changes), seq_len=SEQ_LEN, vocab_size=VOCAB)


class TestVllm(TeacherContract):
    tail_tolerance = 1e-5


def test_a_shards_bytes_do_not_depend_on_what_was_captured_before(
    engine: VllmTeacher, captured: SparseTargets, tokens: np.ndarray
) -> None:
    engine.capture(tokens[::-1][:5])
    again = engine.capture(tokens)
    for field in dataclasses.fields(SparseTargets):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(captured, field.name))


def test_a_missed_position_is_an_error_not_a_zero(
    engine: VllmTeacher, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda prompts, parameters: original(prompts[:-1], parameters[:-1]))
    with pytest.raises(RuntimeError, match=f"missed {SEQ_LEN} of {6 * SEQ_LEN} positions; nothing was stored"):
        engine.capture(tokens)


FRONT_END = """
import sys
import numpy as np
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher
with VllmTeacher(TeacherConfig.model_validate_json(sys.argv[1]), seq_len=200, vocab_size=4090) as teacher:
    teacher.capture(np.ones((1, 201), dtype=np.int32))
"""


def command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_an_engine_ends_with_a_front_end_that_is_killed_while_it_starts(config: TeacherConfig) -> None:
    front_end = subprocess.Popen([sys.executable, "-c", FRONT_END, config.model_dump_json()])
    try:
        deadline = time.monotonic() + 120
        started: list[psutil.Process] = []
        while not any("spawn_main" in command(process) for process in started):
            assert front_end.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
            started = psutil.Process(front_end.pid).children(recursive=True)
    finally:
        front_end.kill()
        front_end.wait()
    assert not psutil.wait_procs(started, timeout=20)[1]


@pytest.mark.parametrize(
    ("change", "seq_len", "vocab_size", "message"),
    [
        ({}, 4096, VOCAB, "packing.seq_len is 4096, and teacher.model .* takes at most 1023; lower it"),
        ({}, 64, 9999, "predicts 4160 tokens, and its tokenizer has 9999"),
        ({"model": "/nowhere/teacher"}, 64, VOCAB, "teacher.model '/nowhere/teacher' cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    config: TeacherConfig, change: dict[str, object], seq_len: int, vocab_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        VllmTeacher(config.model_copy(update=change), seq_len=seq_len, vocab_size=vocab_size)


def test_auto_dtype_is_the_models_own_on_every_machine(config: TeacherConfig) -> None:
    assert teacher.resolved_dtype(config.model_copy(update={"dtype": "auto"})) == "bfloat16"


@pytest.mark.parametrize(
    ("field", "value"), [("logprobs", np.nan), ("tail_mass", np.inf), ("tail_mass", 0.9), ("true_logprobs", np.nan)]
)
def test_what_is_no_distribution_is_not_stored(captured: SparseTargets, field: str, value: float) -> None:
    check_distribution(captured)
    name = {"logprobs": "logprobs_BLK"}.get(field, f"{field}_BL")
    broken = getattr(captured, name).copy()
    broken.flat[7] = value
    with pytest.raises((RuntimeError, UserError)):
        check_distribution(dataclasses.replace(captured, **{name: broken}))


def test_its_death_is_noticed_and_all_of_it_ends_with_the_context(
    engine: VllmTeacher, captured: SparseTargets, tokens: np.ndarray, before: Before
) -> None:
    """The last test of this file: it kills the engine that the others share."""
    assert processes() - before.processes
    folder = engine._running.folder.path
    (process,) = (child for child in psutil.Process().children() if child.pid in set(engine._running.children))
    # As the kernel does where memory is short; while the front end waits for its answer.
    looks: list[list[int]] = []
    engine._running._calls.on_look = looks.append
    threading.Timer(0.5, process.kill).start()
    with pytest.raises(LostPartError, match="killed by signal 9; probably the machine was out of memory"):
        _ = [engine.capture(tokens) for _ in range(1000)]
    # One, where it has ended in the middle of a look.
    assert sum(process.pid not in seen for seen in looks) <= 1, "nothing waits for a time-out"
    engine.close()
    assert not os.path.exists(folder), "its sockets"
    psutil.wait_procs([psutil.Process(pid) for pid in processes() - before.processes], timeout=20)
    assert processes() <= before.processes
    for _ in range(100):  # tests beside this one have theirs for a moment
        if not (left := shared_files() - before.files):
            break
        time.sleep(0.1)
    assert not left
    assert environment() == before.environment
