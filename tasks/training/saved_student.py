"""Loads the saved student with plain transformers, and checks that it computes what was trained and reported.

The gaps of a report are measured through DDK's own loss, on the student in memory. Here the folder that was written is
loaded by transformers, and a few validation blocks go through its own forward pass.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping

import torch

from ddk.data import First
from ddk.errors import UserError
from ddk.gap import perplexity, plain_perplexity
from ddk.student import StudentLoss, load_student
from ddk.train_config import LossConfig, StudentConfig, TrainConfig
from ddk.trainer import resolve_device, resolve_precision
from ddk.values import BlockReader
from storage.blocks import open_blocks
from tasks.showing.progress import logger

_BLOCKS, _BLOCKS_OF_A_DOMAIN = 64, 8
_SAME = 0.01
"""Nats between two ways of computing with the same weights, beyond which they are not the same computation."""
_ROUNDING, _OTHER = 0.05, 0.5
"""Nats between the student in training and as it was saved, in bfloat16: more than rounding usually makes, and more
than it can."""


def sample_of(blocks: Mapping[str, str]) -> dict[str, int]:
    """Which domains, and how many of their first validation blocks.

    Args:
        blocks: URLs of the stores, by domain.
    """
    each = max(1, min(_BLOCKS_OF_A_DOMAIN, _BLOCKS // len(blocks)))
    found: dict[str, int] = {}
    for domain, url in list(blocks.items())[:_BLOCKS]:
        view = open_blocks(url, "validation")
        number = min(each, len(view))
        mask = view.loss_mask(range(number))
        if mask is None or mask.any():
            found[domain] = number
    return found


def check_saved_student(
    folder: str,
    measured: Mapping[str, float],
    blocks: Mapping[str, str],
    *,
    vocab_size: int,
    train: TrainConfig,
    trust_remote_code: bool,
) -> None:
    """Load the folder and measure it on the same blocks.

    Args:
        folder: a local folder, as `ddk.student.save_student` writes it.
        measured: perplexity by domain of the student in training, on the first blocks that `sample_of` names.
        blocks: URLs of the stores, by domain.

    Raises:
        UserError: the saved student computes something else.
    """
    sample = sample_of(blocks)
    device = resolve_device(train)
    dtype = torch.bfloat16 if resolve_precision(train, device) == "bf16" else torch.float32
    config = StudentConfig(model=folder, trust_remote_code=trust_remote_code)
    model = load_student(config, vocab_size, dtype=dtype, field="the saved student").to(device)
    try:
        ours = StudentLoss(model, vocab_size, LossConfig(gamma=0.0))
        for domain, before in measured.items():
            readers: BlockReader = First(open_blocks(blocks[domain], "validation"), sample[domain])
            plain = plain_perplexity(model, readers, vocab_size=vocab_size)
            _compare(domain, before, plain, perplexity(ours, readers, batch_size=1))
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _compare(domain: str, before: float, plain: float, ours: float) -> None:
    if not _within(plain, ours, _SAME):
        raise UserError(
            f"the saved student has a perplexity of {plain:.4g} on '{domain}' by its own forward pass, and {ours:.4g} "
            f"by the loss that it was trained with: another objective was trained than this model computes. Nothing is "
            f"reported as complete; please report the model's architecture"
        )
    if not _within(plain, before, _OTHER):
        raise UserError(
            f"the saved student has a perplexity of {plain:.4g} on '{domain}', and in training it had {before:.4g}: "
            f"what was saved is not what was trained. The newest checkpoint is whole; please report the model's "
            f"architecture"
        )
    if not _within(plain, before, _ROUNDING):
        logger.warning(
            "student: saved in bfloat16 its perplexity on '%s' is %.4g, and in training it was %.4g",
            *(domain, plain, before),
        )


def _within(one: float, other: float, nats: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return one == other
    return abs(math.log(one / other)) <= nats
