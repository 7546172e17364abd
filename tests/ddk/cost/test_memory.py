"""The student's memory: state against a real training's tensors, the peak against a simulated step of the real code."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from fake_data import MIXTURE, tiny_model, train_data
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM

from ddk import fused, student
from ddk.cost.memory import CONTEXT_BYTES, Part, activation_bytes, state_bytes, student_memory
from ddk.cost.shape import ModelShape, shape_of
from ddk.loss import Teacher
from ddk.student import StudentLoss
from ddk.train_config import LossConfig, TrainConfig
from ddk.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

B, L = 2, 512
WIDE = {
    "llama": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": False,
    },
    "gpt_bigcode": {
        "n_embd": 512, "n_inner": 2048, "n_layer": 4, "n_head": 8, "n_positions": 1024, "vocab_size": 4096,
        "multi_query": True, "bos_token_id": 0, "eos_token_id": 0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}  # fmt: skip


def total(parts: list[Part]) -> float:
    return sum(part.bytes for part in parts)


def of(parts: list[Part], what: str) -> Part:
    return next(part for part in parts if part.what == what)


def shape() -> ModelShape:
    return shape_of(AutoConfig.for_model("llama", **WIDE["llama"]))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_moments_are_those_of_a_training(tied: bool) -> None:
    model = tiny_model(tied=tied)
    config = TrainConfig(steps=1, batch_size=4, device="cpu")
    trainer = Trainer(model, train_data(), config=config, loss=LossConfig(), vocab_size=50, seed=0)
    trainer.train_interval(MIXTURE, 0, 1)
    held = 0
    for parameter in trainer.parameters.values():
        moments = trainer.optimizer.state[parameter]
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, moments["exp_avg"], moments["exp_avg_sq"])
        held += sum(tensor.nbytes for tensor in tensors)
    assert state_bytes(shape_of(model.config).parameters) == held


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Fake tensors hold no numbers: nothing can be compared with them.
    monkeypatch.setattr(student, "is_projection", lambda model: True)
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", fused.CHUNK_BYTES["cuda"])
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def simulated_peak(kind: str, *, bf16: bool, checkpointing: bool, k: int = 16) -> int:
    """Bytes of all tensors at the worst moment of two steps of the real loss and AdamW, on fake tensors."""
    config = AutoConfig.for_model(kind, **WIDE[kind])
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = StudentLoss(model, config.vocab_size, LossConfig())
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tokens, rows = torch.zeros(B, L, dtype=torch.int64), B * L
        teacher = Teacher(
            ids_TK=torch.zeros(rows, k, dtype=torch.int64),
            log_p_TK=torch.zeros(rows, k),
            log_tail_T=torch.zeros(rows),
        )
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for step in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    value = loss(tokens, tokens, None, teacher, 1.0)[0]
                value.backward()
                optimizer.step()
                if step == 0:
                    optimizer.zero_grad(set_to_none=False)
                    tracker.reset_mod_stats()
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("kind", "bf16", "checkpointing"),
    [
        ("llama", True, False),
        ("llama", True, True),
        ("llama", False, False),
        ("gpt_bigcode", True, False),
    ],
)
def test_the_peak_is_that_of_a_simulated_step(kind: str, bf16: bool, checkpointing: bool) -> None:
    train = TrainConfig(
        steps=1, batch_size=B, activation_checkpointing=checkpointing, precision="bf16" if bf16 else "fp32"
    )
    of_kind = shape_of(AutoConfig.for_model(kind, **WIDE[kind]))
    parts = student_memory(of_kind, train, LossConfig(), seq_len=L, ranks=1)
    peak = simulated_peak(kind, bf16=bf16, checkpointing=checkpointing)
    assert total(parts) - CONTEXT_BYTES == pytest.approx(peak, rel=0.1)


def test_what_the_options_save_and_cost() -> None:
    def parts(ranks: int = 8, **changes: object) -> list[Part]:
        train = TrainConfig(**{"steps": 1, "batch_size": 32, "micro_batch_size": 2, **changes})  # type: ignore[arg-type]
        return student_memory(shape(), train, LossConfig(), seq_len=L, ranks=ranks)

    plain, state = parts(), "weights, gradients, AdamW"
    assert of(parts(micro_batch_size=4), "activations").bytes == 2 * of(plain, "activations").bytes
    assert of(parts(activation_checkpointing=True), "activations").bytes < of(plain, "activations").bytes / 3
    assert of(plain, state).bytes == 16 * shape().parameters
    sharded = parts(parallel="fsdp")
    assert of(sharded, state).bytes == 2 * shape().parameters
    # Gradients are whole while micro-batches add up; with one a step they are not.
    assert of(sharded, "gathered gradients").bytes == 4 * shape().parameters
    assert of(parts(parallel="fsdp", micro_batch_size=4), "gathered gradients").bytes < shape().parameters * 4
    assert of(parts(ranks=1, parallel="fsdp"), state).bytes == 16 * shape().parameters, "one rank holds all"
    assert "weights in bfloat16" not in [part.what for part in parts(precision="fp32")]
    assert activation_bytes(shape(), bf16=False) > activation_bytes(shape(), bf16=True)


def test_a_batch_that_the_gpus_cannot_share() -> None:
    with pytest.raises(ValueError, match="cannot be shared equally by 3 processes"):
        student_memory(shape(), TrainConfig(steps=1, batch_size=8), LossConfig(), seq_len=L, ranks=3)
