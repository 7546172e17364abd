"""What is measured of the student on a domain's validation blocks: its perplexity, and its divergence from the teacher.

Both come from one forward pass. The divergence is the loss's own (direction, tail, temperature), a mean over the same
positions as the perplexity and without any γ: what the training minimises, on texts that it does not read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ddk.context import uniform_stretch
from ddk.data import loss_mask
from ddk.errors import UserError
from ddk.loss import teacher_of
from ddk.parallel import World
from ddk.train_config import LossConfig
from ddk.values import BlockReader, DomainGap, TargetReader

_ROWS = 512
"""Of logits that are normalised at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What the student was measured at on one domain's validation blocks."""

    ppl: float
    """exp(mean cross-entropy per token, natural log); infinite beyond what a float holds."""
    kl: float | None = None
    """Mean divergence from the teacher per token, in nats; None where no targets were given, or it is no finite
    number."""


def perplexity(
    student: Any, blocks: BlockReader, *, batch_size: int, world: World | None = None, scale: float = 1.0
) -> float:
    """ℓ of `held_out`, without targets; the arguments and errors are the same."""
    return held_out(student, blocks, batch_size=batch_size, world=world, scale=scale).ppl


@torch.no_grad()
def held_out(
    student: Any,
    blocks: BlockReader,
    targets: TargetReader | None = None,
    loss: LossConfig | None = None,
    *,
    batch_size: int,
    world: World | None = None,
    scale: float = 1.0,
) -> HeldOut:
    """Perplexity, and divergence from the teacher, over all positions of the blocks that carry loss.

    Args:
        student: a `ddk.student.StudentLoss`, or what `ddk.parallel.spread` makes of it; put into evaluation mode for
            the measurement and back afterwards.
        blocks: validation blocks [N, L + 1].
        targets: of the same blocks; None measures the perplexity alone.
        loss: the student's; needed with `targets`.
        batch_size: blocks a forward pass. Changes the speed, and the result only by rounding.
        world: the ranks that measure together, each its share.
        scale: by which the student's positions are divided; 1: ordinary ones.

    Raises:
        ValueError: there are no blocks, or no position in them carries loss; targets without a loss, or of another
            number of blocks.
    """
    if targets is not None and (loss is None or len(targets) != len(blocks)):
        raise ValueError(f"{len(blocks)} blocks need as many targets, and the loss; there are {len(targets)}")
    if len(blocks) == 0:
        raise ValueError("perplexity needs at least one block")
    world = world or World()
    was_training = student.training
    student.eval()
    found = torch.zeros(3, dtype=torch.float64, device=world.device)
    try:
        starts = list(range(0, len(blocks), batch_size))
        # Every rank passes as often, if need be over a batch that it does not count: FSDP gathers weights together.
        for turn in range(-(-len(starts) // world.size)):
            number = turn * world.size + world.rank
            start = starts[min(number, len(starts) - 1)]
            indices = np.arange(start, min(start + batch_size, len(blocks)))
            # A copy: a reader may hand out a read-only array, which torch warns of.
            tokens = torch.from_numpy(blocks.read(indices).astype(np.int64)).to(world.device)
            valid_BL = loss_mask(blocks, indices)
            valid = None if valid_BL is None else torch.from_numpy(valid_BL).to(world.device)
            teacher = None
            if targets is not None and loss is not None:
                teacher = teacher_of(targets.read(indices), loss, world.device)
            stretch = uniform_stretch(len(tokens), scale)
            _, ce, kl = student(tokens[:, :-1], tokens[:, 1:], valid, teacher, stretch=stretch)
            if number < len(starts):
                found[0] += ce
                found[1] += kl
                found[2] += tokens[:, 1:].numel() if valid is None else valid.sum()
    finally:
        student.train(was_training)
    ce_sum, kl_sum, positions = world.total(found).tolist()
    if positions == 0:
        raise ValueError("perplexity needs at least one position that carries loss")
    mean, kl_mean = ce_sum / positions, kl_sum / positions
    return HeldOut(
        # Beyond 709 exp overflows: infinite, as `domain_gap` then says in words.
        ppl=math.inf if mean > 709.0 else math.exp(mean),
        kl=kl_mean if targets is not None and math.isfinite(kl_mean) else None,
    )


@torch.no_grad()
def plain_perplexity(model: Any, blocks: BlockReader, *, vocab_size: int) -> float:
    """ℓ by the model's own forward pass and nothing of ours: what anybody measures who loads it.

    Args:
        model: a causal language model in evaluation mode.
        vocab_size: tokens; the model's rows beyond it are padding.

    Raises:
        ValueError: no position carries loss.
    """
    device = next(model.parameters()).device
    total, positions = 0.0, 0
    for index in range(len(blocks)):
        tokens = torch.from_numpy(blocks.read([index]).astype(np.int64)).to(device)
        mask = loss_mask(blocks, [index])
        valid = slice(None) if mask is None else torch.from_numpy(mask[0]).to(device)
        logits_LV = model(input_ids=tokens[:, :-1], use_cache=False).logits[0, :, :vocab_size]
        parts = (torch.split(tensor[valid], _ROWS) for tensor in (logits_LV, tokens[0, 1:]))
        for logits_CV, labels_C in zip(*parts, strict=True):
            total += torch.nn.functional.cross_entropy(logits_CV.float(), labels_C, reduction="sum").item()
            positions += len(labels_C)
    if positions == 0:
        raise ValueError("perplexity needs at least one position that carries loss")
    mean = total / positions
    return math.inf if mean > 709.0 else math.exp(mean)


def domain_gap(domain: str, student_ppl: float, teacher_ppl: float, *, step: int | None = None) -> DomainGap:
    """Both perplexities of a domain, checked.

    Args:
        step: of the training that the student's is of, where that is known.

    Raises:
        UserError: a perplexity is not finite: the student has diverged, or the teacher gives a true token no
            probability at all.
    """
    remedies = {
        "student": "the training has diverged: lower train.learning_rate"
        if step != 0
        else "before any training: the model itself gives no numbers there; try train.precision: fp32, or take another "
        "student.model",
        "teacher": "it rules out a token that occurs there; is its quantisation, or its dtype, too coarse?",
    }
    for who, value in (("student", student_ppl), ("teacher", teacher_ppl)):
        if not math.isfinite(value):
            raise UserError(f"the {who}'s perplexity on '{domain}' is {value}; {remedies[who]}")
    return DomainGap(domain=domain, student_ppl=student_ppl, teacher_ppl=teacher_ppl)
