"""The fused loss beside what it replaces, at a large vocabulary: times in one process, peak memory in one a variant.

    training_loss.py time ROUNDS GIB    for each variant the wall time, processor time and page faults of every round;
                                        GIB of memory are taken and let go beforehand
    training_loss.py VARIANT            the peak memory of a pass, in MiB

plain   F.cross_entropy(hidden @ W.T): training without a teacher
naive   sparse distillation as it is usually written: log_softmax of all logits, a gather at the stored ids, the
        bucket for the rest, and the cross-entropy
fused   ddk.fused.fused_loss: the same CE + γ·KL
fused_ce    the same without a teacher

Whole logits are blocks of more than a gigabyte. glibc asks the kernel for each of them anew and gives it back at once,
so a pass that holds logits also pays for a million page faults, which is no work of the loss. KEEPING are the settings
under which glibc keeps what it once had. They are not enough: glibc (up to 2.37) cannot put an aligned block where one
of the same size has just been freed, and would go on growing; it takes one large free stretch to cut the blocks from,
which is what GIB is for. The faults of a pass say whether it worked: then they are about 0.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ddk.fused import fused_loss
from ddk.loss import Teacher, teacher_side
from ddk.train_config import LossConfig

T, D, V, K = 2048, 512, 151_936, 64
LOSS = LossConfig(gamma=0.2)
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "64000000000", "MALLOC_TRIM_THRESHOLD_": "64000000000"}
KEPT_GIB = 8
"""More than any variant holds at once."""
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


@dataclass(frozen=True, slots=True)
class Measured:
    """What the passes of a variant took, one entry a round."""

    wall: list[float] = field(default_factory=list)
    """Seconds."""
    processor: list[float] = field(default_factory=list)
    """Seconds of all threads, the kernel's work for them included."""
    faults: list[int] = field(default_factory=list)
    """Pages that the kernel had to hand out."""


def once(variant: str, given: Inputs, measured: Measured) -> float:
    """A forward and backward pass. Returns the loss."""
    given[0].grad = given[1].grad = None
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    wall, processor = time.perf_counter(), time.process_time()
    loss = VARIANTS[variant](*given)
    loss.backward()
    measured.wall.append(time.perf_counter() - wall)
    measured.processor.append(time.process_time() - processor)
    measured.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
    return loss.item()


def times(rounds: int, gib: int) -> dict[str, Measured]:
    """Interleaved; the first round warms up. The losses must agree."""
    stretch = torch.ones(gib << 30, dtype=torch.uint8)
    del stretch
    given = inputs()
    found: dict[str, Measured] = {variant: Measured() for variant in VARIANTS}
    for turn in range(rounds + 1):
        losses = {variant: once(variant, given, found[variant] if turn else Measured()) for variant in VARIANTS}
        if abs(losses["naive"] - losses["fused"]) > 1e-3 or abs(losses["plain"] - losses["fused_ce"]) > 1e-3:
            raise SystemExit(f"the variants disagree: {losses}")
    return found


def peak_mib(variant: str) -> float:
    """Peak memory of one pass above what its inputs take, in MiB: a process of its own must ask."""
    given = inputs()
    few = [one if number == 1 else one[:8] for number, one in enumerate(given)]  # starts threads and libraries
    once(variant, (few[0].detach().requires_grad_(), *few[1:]), Measured())  # type: ignore[arg-type]
    given[1].grad = None
    gc.collect()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the high-water mark begins anew
    before = memory_kib("VmRSS")
    once(variant, given, Measured())
    return (memory_kib("VmHWM") - before) / 1024


def memory_kib(what: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what))


def main() -> None:
    if sys.argv[1] == "time":
        found = times(int(sys.argv[2]), int(sys.argv[3]))
        print(json.dumps({variant: asdict(measured) for variant, measured in found.items()}))
    else:
        print(json.dumps(peak_mib(sys.argv[1])))


if __name__ == "__main__":
    main()
