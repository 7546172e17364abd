"""The public path against a plain transformers forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest
import torch
from teacher_contract import TeacherContract, check_captured
from tiny_model import make_tiny_model, true_logprobs

from ddk.errors import UserError
from ddk.values import SparseTargets
from tasks.capture.cache_targets import check_distribution
from tasks.teachers import prompt_teacher as vllm_portable
from tasks.teachers.config import TeacherConfig
from tasks.teachers.prompt_teacher import PortableTeacher

SEQ_LEN, VOCAB, K = 200, 512, 16
pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("default"),  # vLLM's own warnings are not ours to mend
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    # The blocks are as long as the model's context, and a pass takes less than a block: all run in pieces.
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"), rows=VOCAB, context=SEQ_LEN + 1)
    return TeacherConfig(
        model=folder, source="prompt_logprobs", k=VOCAB, dtype="float32", shard_blocks=6, max_batch_tokens=150
    )


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (6, SEQ_LEN + 1)).astype(np.int32)


@pytest.fixture(scope="module")
def truth(config: TeacherConfig, tokens: np.ndarray) -> torch.Tensor:
    return true_logprobs(config.model, tokens)


@pytest.fixture(scope="module")
def engine(config: TeacherConfig) -> Iterator[PortableTeacher]:
    """Started for K = V; fewer can be asked of it too."""
    with PortableTeacher(config, seq_len=SEQ_LEN, vocab_size=VOCAB) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def everything(engine: PortableTeacher, tokens: np.ndarray) -> SparseTargets:
    return engine.capture(tokens)


def ask_for_k(engine: PortableTeacher, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "config", engine.config.model_copy(update={"k": K}))
    patch.setattr(engine, "_asked", K)


@pytest.fixture
def top(engine: PortableTeacher, everything: SparseTargets, monkeypatch: pytest.MonkeyPatch) -> PortableTeacher:
    """The same engine, which runs since `everything`, asked for K."""
    ask_for_k(engine, monkeypatch)
    return engine


@pytest.fixture(scope="module")
def captured(engine: PortableTeacher, everything: SparseTargets, tokens: np.ndarray) -> SparseTargets:
    with pytest.MonkeyPatch.context() as patch:
        ask_for_k(engine, patch)
        return engine.capture(tokens)


@pytest.fixture
def unopened(config: TeacherConfig) -> Callable[..., PortableTeacher]:
    return lambda **changes: PortableTeacher(config.model_copy(update=changes), seq_len=SEQ_LEN, vocab_size=VOCAB)


class TestPortable(TeacherContract):
    tail_tolerance = 3e-6  # a processor without AVX-512 is 1e-6 off


def test_it_has_no_entropy(captured: SparseTargets) -> None:
    assert captured.entropy is None


def test_the_whole_vocabulary(everything: SparseTargets, tokens: np.ndarray, truth: torch.Tensor) -> None:
    assert everything.ids.shape == (6, SEQ_LEN, VOCAB)
    assert (np.sort(everything.ids, axis=-1) == np.arange(VOCAB)).all()
    expected = np.take_along_axis(truth.numpy(), everything.ids.astype(np.int64), axis=-1)
    np.testing.assert_allclose(everything.logprobs, expected, atol=1e-4, rtol=0)
    assert everything.tail_mass.max() < 1e-6
    # Every true token is among the kept ones here, so its value stands twice.
    own = np.argmax(everything.ids == tokens[:, 1:, None], axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(everything.logprobs, own[..., None], axis=-1)[..., 0], everything.true_logprobs
    )


def test_padded_rows_are_dropped(
    top: PortableTeacher, everything: SparseTargets, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = 400
    monkeypatch.setattr(top, "vocab_size", few)
    captured = top.capture(tokens % few)
    kept = captured.logprobs > -np.inf
    assert 0.5 < kept.mean() < 0.95, "the test needs padding among the most probable"
    assert captured.ids.max() < few
    assert (captured.ids[~kept] == 0).all()
    assert (kept[..., :-1] >= kept[..., 1:]).all(), "what is dropped lies behind what is kept"
    check_distribution(captured)


def test_groups_change_nothing(
    top: PortableTeacher, tokens: np.ndarray, truth: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_portable, "GROUP_ENTRIES", 4 * SEQ_LEN * (K + 1))
    captured = top.capture(tokens)
    check_captured(captured, tokens, truth, TestPortable.tail_tolerance)
    assert captured.entropy is None


def test_what_only_the_engine_gives_is_refused(config: TeacherConfig) -> None:
    for field, value, shown in (("draws", 8, "8"), ("tail_temperatures", (2.0,), r"\[2.0\]")):
        with pytest.raises(
            UserError, match=rf"teacher.{field} is {shown}, .* set source: engine, or leave {field} out"
        ):
            PortableTeacher(config.model_copy(update={field: value}), seq_len=SEQ_LEN, vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"packing.seq_len is 201, and teacher.model .* takes at most 200; lower it"):
        PortableTeacher(config, seq_len=SEQ_LEN + 1, vocab_size=VOCAB)


def test_the_engines_processes_end_with_it(engine: PortableTeacher, everything: SparseTargets) -> None:
    """The last test of this file: it ends the engine that the others share."""

    def engines() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if "VLLM::" in _command(child)]

    before = engines()
    assert before
    environment = dict(os.environ)
    engine.close()
    engine.close()
    assert not psutil.wait_procs(before, timeout=20)[1]
    assert dict(os.environ) == environment
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment, "the engine's environment must not stay behind"


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
