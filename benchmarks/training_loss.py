"""The fused loss beside what it replaces, at a large vocabulary: `time` in one process, `memory` in one a variant.

plain   F.cross_entropy(hidden @ W.T): training without a teacher
naive   sparse distillation as it is usually written: log_softmax of all logits, a gather at the stored ids, the
        bucket for the rest, and the cross-entropy
fused   ddk.fused.fused_loss: the same CE + γ·KL
fused_ce    the same without a teacher
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ddk.fused import fused_loss
from ddk.loss import Teacher, teacher_side
from ddk.train_config import LossConfig

T, D, V, K = 2048, 512, 151_936, 64
LOSS = LossConfig(gamma=0.2)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs() -> Inputs:
    """Hidden states, projection, labels, and a teacher's top k with its tail."""
    torch.manual_seed(0)
    hidden_TD = torch.randn(T, D).requires_grad_()
    weight_VD = (0.02 * torch.randn(V, D)).requires_grad_()
    labels_T = torch.randint(V, (T,))
    ids_TK = torch.stack([torch.randperm(V)[:K] for _ in range(T)])
    logprobs_TK = (2.0 * torch.randn(T, K)).log_softmax(-1) + torch.tensor(0.9).log()
    return hidden_TD, weight_VD, labels_T, ids_TK, logprobs_TK, torch.full((T,), 0.1)


def plain(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *_: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, labels_T)


def naive(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ids_TK: Tensor, logprobs_TK: Tensor, tail_T: Tensor
) -> Tensor:
    logits_TV = hidden_TD @ weight_VD.T
    log_q_TK = logits_TV.log_softmax(-1).gather(-1, ids_TK)
    log_rest_T = torch.log1p(-log_q_TK.exp().sum(-1).clamp_max(1 - 1e-6))
    kl_T = (logprobs_TK.exp() * (logprobs_TK - log_q_TK)).sum(-1) + tail_T * (tail_T.log() - log_rest_T)
    return torch.nn.functional.cross_entropy(logits_TV, labels_T) + LOSS.gamma * kl_T.mean()


def fused(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, ids_TK: Tensor, logprobs_TK: Tensor, tail_T: Tensor
) -> Tensor:
    teacher: Teacher = teacher_side(ids_TK, logprobs_TK, tail_T, LOSS)
    return fused_loss(hidden_TD, weight_VD, labels_T, teacher, LOSS, scale=1 / T).total


def fused_ce(hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *_: Tensor) -> Tensor:
    return fused_loss(hidden_TD, weight_VD, labels_T, None, LOSS, scale=1 / T).total


VARIANTS: dict[str, Callable[..., Tensor]] = {"plain": plain, "naive": naive, "fused": fused, "fused_ce": fused_ce}


def once(variant: str, given: Inputs) -> tuple[float, float]:
    """Seconds of a forward and backward pass, and the loss."""
    given[0].grad = given[1].grad = None
    started = time.perf_counter()
    loss = VARIANTS[variant](*given)
    loss.backward()
    return time.perf_counter() - started, loss.item()


def times(rounds: int) -> dict[str, list[float]]:
    """Interleaved; the first round warms up. The losses must agree."""
    given = inputs()
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds + 1):
        losses = {}
        for variant in VARIANTS:
            seconds, losses[variant] = once(variant, given)
            if turn:
                found[variant].append(seconds)
        if abs(losses["naive"] - losses["fused"]) > 1e-3 or abs(losses["plain"] - losses["fused_ce"]) > 1e-3:
            raise SystemExit(f"the variants disagree: {losses}")
    return found


def peak_mib(variant: str) -> float:
    """Peak memory of one pass above what its inputs take, in MiB: a process of its own must ask."""
    given = inputs()
    few = [one if number == 1 else one[:8] for number, one in enumerate(given)]  # starts threads and libraries
    once(variant, (few[0].detach().requires_grad_(), *few[1:]))  # type: ignore[arg-type]
    given[1].grad = None
    gc.collect()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the high-water mark begins anew
    before = memory_kib("VmRSS")
    once(variant, given)
    return (memory_kib("VmHWM") - before) / 1024


def memory_kib(what: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))


if __name__ == "__main__":
    print(json.dumps(times(int(sys.argv[2])) if sys.argv[1] == "time" else peak_mib(sys.argv[1])))
