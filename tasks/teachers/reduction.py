"""What capture keeps of a chunk of logits: the same numbers from torch (GPUs) and from a compiled kernel (CPUs).

    ids, logprobs      the k most probable tokens and their log-probabilities, in descending order
    tail_mass          the mass outside them, summed over what is outside, so that it keeps its relative precision
                       where it is tiny; exactly 0 for k = V
    true_logprobs      log-probability of the token that does come next
    entropy            −Σ p log p over the whole vocabulary, in nats
    tail_mass_at       the mass outside the same tokens in softmax(logits / T), for each further temperature T
    drawn              tokens drawn with replacement from the whole distribution, ascending: where the cumulative
                       distribution first exceeds each of the given uniform numbers, which are ascending themselves

Imports none of ours but the kernel: this runs inside vLLM's worker. Shape letters: N rows, V tokens of the tokenizer,
K kept, M further temperatures, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTPUTS = ("ids", "logprobs", "tail_mass", "true_logprobs", "entropy", "tail_mass_at", "drawn")


def reduce_logits(
    logits_NV: Tensor,
    labels_N: Tensor,
    k: int,
    temperatures: Sequence[float] = (),
    uniforms_ND: Tensor | None = None,
) -> dict[str, Tensor]:
    """Reduce with torch, on whatever device the logits are; overwrites the logits.

    Args:
        logits_NV: float32, padded vocabulary rows already cut off.
        labels_N: int64, the true next tokens.
        uniforms_ND: float64 in [0, 1), ascending within a row.

    Returns:
        By the names in the module's docstring: ids [N, K] and drawn [N, D] int64, logprobs [N, K], tail_mass,
        true_logprobs and entropy [N], tail_mass_at [N, M] float32.
    """
    top = logits_NV.topk(k, dim=-1)
    largest_N1 = top.values[:, :1]
    true_N = logits_NV.gather(-1, labels_N[:, None])[:, 0] - largest_N1[:, 0]
    shifted_NV = logits_NV.sub_(largest_N1)
    drawn_ND = _drawn(shifted_NV, uniforms_ND)
    shifted_NK = top.values - largest_N1
    tails = []
    for temperature in temperatures:
        outside_N = (shifted_NV / temperature).exp_().scatter_(-1, top.indices, 0.0).sum(-1)
        tails.append(outside_N / ((shifted_NK / temperature).exp().sum(-1) + outside_N))
    exp_NV = shifted_NV.exp()
    # x·eˣ; where x is −inf the product is 0, not NaN.
    weighted_N = shifted_NV.clamp_(min=-1e30).mul_(exp_NV).sum(-1)
    outside_N = exp_NV.scatter_(-1, top.indices, 0.0).sum(-1)
    total_N = shifted_NK.exp().sum(-1) + outside_N
    log_total_N = total_N.log()
    return {
        "ids": top.indices,
        "logprobs": shifted_NK - log_total_N[:, None],
        "tail_mass": outside_N / total_N,
        "true_logprobs": true_N - log_total_N,
        "entropy": log_total_N - weighted_N / total_N,
        "tail_mass_at": torch.stack(tails, -1) if tails else logits_NV.new_empty((len(logits_NV), 0)),
        "drawn": drawn_ND,
    }


def _drawn(shifted_NV: Tensor, uniforms_ND: Tensor | None) -> Tensor:
    if uniforms_ND is None or uniforms_ND.shape[1] == 0:
        return torch.empty((len(shifted_NV), 0), dtype=torch.int64, device=shifted_NV.device)
    # Float64: over 150,000 tokens a float32 sum would lose the rare ones.
    cumulative_NV = shifted_NV.double().exp_().cumsum_(-1)
    targets_ND = uniforms_ND.to(shifted_NV.device) * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, targets_ND, right=True).clamp_(max=shifted_NV.shape[1] - 1)
