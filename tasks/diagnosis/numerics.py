"""Compares a capture and a training step on this machine with independent references."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from ddk.loss import teacher_of
from ddk.student import StudentLoss, load_tokenizer
from ddk.train_config import LossConfig
from ddk.values import SparseTargets
from tasks.diagnosis.result import Found
from tasks.planning.store_plan import vocabulary
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher

_BLOCKS, _LENGTH, _K = 8, 64, 16
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Nats of the true token's log-probability between two implementations of one model."""
_STEP, _STEP_BF16 = 1e-4, 0.1
"""Relative errors of a gradient."""
_RING = """
import os, torch, torch.distributed as dist
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
if torch.cuda.is_available():
    torch.cuda.set_device(rank)
one = torch.full((1 << 20,), float(rank), device="cuda" if torch.cuda.is_available() else "cpu")
dist.all_reduce(one)
assert float(one[0]) == size * (size - 1) / 2 == float(one[-1])
dist.destroy_process_group()
"""


def capture(folder: str) -> Found:
    """vLLM's engine on a small model against transformers' own forward pass, on the device and in the dtype of use.

    Args:
        folder: of the model.
    """
    cuda = torch.cuda.is_available()
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if cuda else "float32"
    size, _ = vocabulary(load_tokenizer(folder))
    tokens = np.random.default_rng(0).integers(1, size, (_BLOCKS, _LENGTH + 1), dtype=np.int32)
    config = TeacherConfig(
        model=folder, k=_K, dtype=dtype, shard_blocks=_BLOCKS, max_batch_tokens=512, gpu_memory_utilization=0.3
    )
    with VllmTeacher(config, seq_len=_LENGTH, vocab_size=size) as teacher:
        captured = teacher.capture(tokens)
    device = "cuda" if cuda else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1]).long().to(device)).logits[..., :size].double()
    labels = torch.from_numpy(tokens[:, 1:]).long().to(device)
    truth = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0].cpu().numpy()
    error = float(np.abs(captured.true_logprobs_BL - truth).max())
    said = f"{_BLOCKS} blocks captured by vLLM on {device} in {dtype}; largest deviation {error:.2g} nats"
    if not error <= _TOLERANCE[dtype]:
        return Found(
            "fail",
            f"{said}, and {_TOLERANCE[dtype]:g} is the most",
            "the engine computes something else than the model: install the locked versions (`make setup`), and if "
            "it stays, report the GPU and driver",
        )
    return Found("ok", said)


def training_step() -> Found:
    """Loss and gradient of a step, in float32 and in bfloat16, against dense float64 on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, targets = _example()
    loss = LossConfig(gamma=0.7)
    model = _model()
    wanted = _dense(copy.deepcopy(model).double(), tokens, targets, loss)
    found = _step(copy.deepcopy(model).to(device), tokens, targets, loss, bf16=False)
    low = _step(copy.deepcopy(model).to(device), tokens, targets, loss, bf16=True)
    errors = [_relative(one, wanted) for one in (found, low)]
    said = f"gradient on {device.type} against float64: off by {errors[0]:.1e} in float32, {errors[1]:.1e} in bfloat16"
    if not (errors[0] <= _STEP and errors[1] <= _STEP_BF16):
        return Found(
            "fail", f"{said}; {_STEP:g} and {_STEP_BF16:g} are the most", "install the locked versions (`make setup`)"
        )
    return Found("ok", said)


def collectives() -> Found:
    """`torch.distributed` over all GPUs, or over two processes of the CPU where there are none."""
    processes = torch.cuda.device_count() if torch.cuda.is_available() else 2
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if processes < 2:
        return Found("ok", "one GPU: nothing to be exchanged")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(_RING)
        script.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([*command, script.name], capture_output=True, text=True, timeout=180, check=False)  # noqa: S603
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        return Found(
            "fail",
            f"{backend} over {processes} processes failed ({last[0].strip()[:200]})",
            "set NCCL_DEBUG=INFO and run again; train.processes: 1 needs no exchange",
        )
    return Found("ok", f"{backend} sums over {processes} processes")


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 20.0  # a distribution that is not flat
    return model


def _example() -> tuple[Tensor, SparseTargets]:
    random = np.random.default_rng(1)
    tokens = torch.from_numpy(random.integers(0, 320, (2, 33)))
    logits = random.normal(size=(2, 32, 320)) * 3.0
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.argsort(-probabilities, -1)[..., :_K].astype(np.int32)
    kept = np.take_along_axis(probabilities, ids, -1)
    own = np.take_along_axis(probabilities, tokens[:, 1:, None].numpy(), -1)[..., 0]
    return tokens, SparseTargets(
        ids_BLK=ids,
        logprobs_BLK=np.log(kept).astype(np.float32),
        tail_mass_BL=(1.0 - kept.sum(-1)).astype(np.float32),
        true_logprobs_BL=np.log(own).astype(np.float32),
    )


def _step(model: Any, tokens: Tensor, targets: SparseTargets, loss: LossConfig, *, bf16: bool) -> Tensor:
    device = next(model.parameters()).device
    student = StudentLoss(model, 320, loss)
    teacher = teacher_of(targets, loss, device)
    tokens = tokens.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        total, _, _ = student(tokens[:, :-1], tokens[:, 1:], None, teacher, 1.0)
    total.backward()
    return _gradient(model)


def _dense(model: Any, tokens: Tensor, targets: SparseTargets, loss: LossConfig) -> Tensor:
    """Σ CE + γ·KL(p ‖ q) over the stored tokens and all others as one, as it is written."""
    log_q = model(tokens[:, :-1]).logits.log_softmax(-1)
    ce = -log_q.gather(-1, tokens[:, 1:, None])[..., 0]
    log_p = torch.from_numpy(targets.logprobs_BLK).double()
    rest = torch.from_numpy(targets.tail_mass_BL).double()
    stored = log_q.gather(-1, torch.from_numpy(targets.ids_BLK).long())
    others = (1.0 - stored.exp().sum(-1)).log()
    kl = (log_p.exp() * (log_p - stored)).sum(-1) + rest * (rest.log() - others)
    (ce + loss.gamma * kl).sum().backward()
    return _gradient(model)


def _gradient(model: Any) -> Tensor:
    return torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
