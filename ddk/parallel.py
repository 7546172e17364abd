"""One student on several processes: what each computes, and what they exchange.

Each process ('rank') holds one device. Under 'ddp' every rank has the whole student and gradients are averaged; under
'fsdp' (FSDP2) each has a share of every matrix, layer by layer, and optimizer state likewise. Either way a step's
batch is cut into equal shares and what is reported is summed over all, so that training does not depend on the number
of ranks but for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ddk.train_config import Parallel

Precision = Literal["bf16", "fp32"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The processes that train one student, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    talk: Any = None
    """The group for what is said beside the training: on the CPU, and patient."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: every `size`-th, from `rank` on."""
        return items[self.rank :: self.size]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same on each; `values` is left as it is."""
        if self.size == 1:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def gather(self, value: T) -> list[T]:
        """What each rank has, in the order of the ranks. Small things only."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.talk)
        return found

    def from_first(self, value: T | None) -> T:
        """What rank 0 has, on every rank; the others' is ignored."""
        if self.size == 1:
            return cast("T", value)
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0, group=self.talk)
        return cast("T", held[0])

    def wait_for_all(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.talk)


def join_world(device: Literal["cpu", "cuda"]) -> World:
    """Join the other processes that torchrun has started; without torchrun, the world is this process only.

    Args:
        device: each rank takes one GPU of its machine, or the CPU with gloo.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    own = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if "WORLD_SIZE" not in os.environ:
        return World(device=own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    # Between two intervals rank 0 waits for whoever leads it: for an evaluation elsewhere, perhaps for hours.
    talk = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return World(rank=dist.get_rank(), size=size, local_rank=local, device=own, talk=talk)


def leave_world(world: World) -> None:
    """Part from the others once all are here; the process should end at once, with `os._exit`.

    gloo now and then aborts while Python tears down ('terminate called without an active exception', one exit in ten
    on two CPU ranks), which torchrun would report as a failed training.
    """
    if dist.is_initialized():
        world.wait_for_all()
        dist.destroy_process_group()


def spread(module: torch.nn.Module, layers: Sequence[torch.nn.Module], world: World, how: Parallel, bf16: bool) -> Any:
    """The module on all ranks: to be called in its place.

    Args:
        module: on this rank's device, with the same weights on every rank.
        layers: what is gathered and freed as one under 'fsdp'; the rest is one more group.
        bf16: under 'fsdp', whether what is gathered is computed in bfloat16 (the shares stay float32, and gradients
            are summed in it); 'ddp' leaves that to autocast.
    """
    if world.size == 1 and not dist.is_initialized():
        return module
    if how == "ddp":
        ids = [world.local_rank] if world.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(
            module, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy)


def synchronise(module: Any, wanted: bool) -> None:
    """Whether the next backward pass of a module of `spread` exchanges gradients; only a step's last one need."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = wanted
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(wanted)


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its division into shares. Every rank must call it, for the same tensors in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_first(tensors: Mapping[str, Tensor], world: World, keep: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`keep` of every whole tensor, on rank 0; nothing elsewhere. One tensor at a time is whole on the device."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if world.is_first:
            found[name] = keep(full)
    return found
