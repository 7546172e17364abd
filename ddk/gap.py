"""The student's perplexity on a domain's validation blocks."""

from __future__ import annotations

import math

import numpy as np
import torch

from ddk.errors import UserError
from ddk.loss import cross_entropy_sum
from ddk.student import forward_logits
from ddk.types import BlockReader, DomainGap


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    blocks: BlockReader,
    *,
    vocab_size: int,
    batch_size: int,
    autocast: torch.autocast | None = None,
) -> float:
    """ℓ = exp(mean cross-entropy per token, natural log) over all positions of the blocks.

    Args:
        model: a causal language model; put into evaluation mode for the measurement and back afterwards.
        blocks: validation blocks [N, L + 1].
        vocab_size: tokens of the tokenizer; the model's rows beyond it take no part in the normaliser.
        batch_size: blocks a forward pass. Changes the speed, and the result only by rounding.

    Raises:
        ValueError: there are no blocks.
    """
    if len(blocks) == 0:
        raise ValueError("perplexity needs at least one block")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, positions = 0.0, 0
    try:
        for start in range(0, len(blocks), batch_size):
            tokens_BL1 = blocks.read(np.arange(start, min(start + batch_size, len(blocks))))
            # A copy: a reader may hand out a read-only array, which torch warns of.
            tokens = torch.from_numpy(tokens_BL1.astype(np.int64)).to(device)
            logits_TV = forward_logits(model, tokens[:, :-1], vocab_size, autocast).flatten(0, 1)
            total += cross_entropy_sum(logits_TV, tokens[:, 1:].flatten()).double().item()
            positions += logits_TV.shape[0]
    finally:
        model.train(was_training)
    mean = total / positions
    # Beyond 709 exp overflows: infinite, as `domain_gap` then says in words.
    return math.inf if mean > 709.0 else math.exp(mean)


def domain_gap(domain: str, student_ppl: float, teacher_ppl: float) -> DomainGap:
    """Both perplexities of a domain, checked.

    Raises:
        UserError: a perplexity is not finite: the student has diverged, or the teacher gives a true token no
            probability at all.
    """
    remedies = {
        "student": "the training has diverged: lower train.learning_rate",
        "teacher": "it rules out a token that occurs there; is its quantisation, or its dtype, too coarse?",
    }
    for who, value in (("student", student_ppl), ("teacher", teacher_ppl)):
        if not math.isfinite(value):
            raise UserError(f"the {who}'s perplexity on '{domain}' is {value}; {remedies[who]}")
    return DomainGap(domain=domain, student_ppl=student_ppl, teacher_ppl=teacher_ppl)
