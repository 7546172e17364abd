"""CE + γ·divergence of the student on sparse teacher targets (the paper's Eq. 3), position by position.

For a position with stored set S (K tokens), teacher probabilities p_i for i ∈ S, tail mass r = 1 − Σ_S p_i, student
probabilities q_i, q_r = 1 − Σ_S q_i, and the true next token y, the two distributions that are compared are

    tail          teacher                        student             what it is, and when to use it
    bucket        p on S, r on 'all the rest'    q on S, q_r         A lower bound of the full divergence (merging
                                                                     outcomes never raises one). It supervises the
                                                                     tail's mass, not its shape. The default.
    renormalise   p/(1 − r) on S                 q/(1 − q_r) on S    Biased: nothing outside S has a gradient, and the
                                                                     tail may grow unseen. For caches of other tools.
    residual      p on S, and + r at y           q everywhere        A distribution over the whole vocabulary; biased
                                                                     towards the label by r. Good where K is small.
    sampled       c_i/N of N random draws        q everywhere        Its gradient is that of the full forward KL on
                                                                     average over the draws (Anshumann et al., ACL
                                                                     2025). For small caches; `teacher.draws`.

and the divergence between them (m = β·p + (1 − β)·q)

    forward_kl      Σ p log(p/q)                     covers all of the teacher's modes; the paper's, and the default
    reverse_kl      Σ q log(q/p)                     settles on some of them; MiniLLM's
    jensen_shannon  β·KL(p‖m) + (1 − β)·KL(q‖m)      between the two, and bounded

With K = V, bucket, renormalise and residual are all the full divergence. A temperature T divides both models' logits.
From log-probabilities at 1, p_i at T is exp(log p_i/T) scaled to a sum of 1 − r_T; the tail's mass r_T is
stored where `teacher.tail_temperatures` asks for it. The divergence is not multiplied by T², as in the paper.

What cannot be known is refused: 'sampled' has one direction and one temperature, and reverse_kl is infinite under
'residual', which gives most tokens no probability. Under 'bucket' a tail that was stored as 0 would make reverse_kl
infinite as well; there it counts as at least `SMALLEST_TAIL`.

Everything follows from the student's logits at S and y and from the log-sum-exp of all the others: with lse_S of the
gathered logits that gives the normaliser, the cross-entropy, and q_r without the cancellation of 1 − Σ q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddk.domain_tree import lineage
from ddk.train_config import LossConfig
from ddk.values import Float32Array, SparseTargets

SMALLEST_TAIL = 1e-6
"""What a tail that was stored as 0 counts as in reverse_kl."""
_NEVER = -1e30
"""Log-probability of what is no outcome: exp gives 0, and unlike −inf its differences are numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The teacher's side of some positions, ready to be compared. T positions, K entries."""

    ids_TK: Tensor
    """int64, distinct among a position's entries; any id where there is no entry."""
    log_p_TK: Tensor
    """float32; −inf where there is no entry."""
    log_tail_T: Tensor
    """float32, log r: the probability that is not in `log_p_TK`. −inf where there is none."""
    entropy_T: Tensor | None = None
    """float32, nats, of the whole distribution. Only for random draws: the KL's constant, which they do not give."""
    gamma_T: Tensor | None = None
    """float32, the weight γ of each position; None: `LossConfig.gamma` everywhere."""

    def __len__(self) -> int:
        return len(self.ids_TK)

    def __getitem__(self, rows: slice | Tensor) -> Teacher:
        return Teacher(
            ids_TK=self.ids_TK[rows],
            log_p_TK=self.log_p_TK[rows],
            log_tail_T=self.log_tail_T[rows],
            entropy_T=None if self.entropy_T is None else self.entropy_T[rows],
            gamma_T=None if self.gamma_T is None else self.gamma_T[rows],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over positions, natural log; divide by the number of positions for means."""

    total: Tensor
    """ce + γ·kl, a scalar float32, differentiable."""
    ce: Tensor
    """Cross-entropy with the true tokens, a scalar float32 without gradient."""
    kl: Tensor
    """The divergence from the teacher, likewise; zero where no targets were given."""


def teacher_side(
    ids_TK: Tensor, logprobs_TK: Tensor, tail_mass_T: Tensor, loss: LossConfig, tail_mass_at_T: Tensor | None = None
) -> Teacher:
    """Top-k targets as the loss compares them.

    Args:
        ids_TK: stored tokens, int64, distinct within a position.
        logprobs_TK: the teacher's log-probabilities of them (full distribution, temperature 1). An entry of −inf is
            no entry, whatever its id; positions may keep fewer than K, or none.
        tail_mass_T: the teacher's probability outside them, in [0, 1].
        loss: temperature and tail.
        tail_mass_at_T: that at `loss.temperature`, where `loss.tail_temperature` asks for it.

    Raises:
        ValueError: the loss needs the tail's mass at its temperature, and it is not given.
    """
    log_p_TK = logprobs_TK.float()
    if loss.tail == "renormalise":
        # A position without entries has nothing to compare; zeros keep its softmax from being 0/0.
        empty_T1 = ~(log_p_TK > -torch.inf).any(-1, keepdim=True)
        log_p_TK = (log_p_TK.masked_fill(empty_T1, 0.0) / loss.temperature).log_softmax(-1)
        return Teacher(
            ids_TK=ids_TK,
            log_p_TK=log_p_TK.masked_fill(empty_T1, -torch.inf),
            log_tail_T=torch.full_like(tail_mass_T, -torch.inf, dtype=torch.float32),
        )
    if loss.tail_temperature is not None:
        if tail_mass_at_T is None:
            raise ValueError(f"temperature {loss.temperature} needs the tail's mass at it")
        tail_mass_T = tail_mass_at_T
        scaled_TK = log_p_TK / loss.temperature
        kept_T1 = scaled_TK.logsumexp(-1, keepdim=True)
        log_p_TK = (
            torch.where(kept_T1 > -torch.inf, scaled_TK - kept_T1, scaled_TK) + torch.log1p(-tail_mass_T)[:, None]
        )
    return Teacher(ids_TK=ids_TK, log_p_TK=log_p_TK, log_tail_T=tail_mass_T.float().log())


def sampled_side(ids_TN: Tensor, counts_TN: Tensor, entropy_T: Tensor | None) -> Teacher:
    """Random draws as the loss compares them: c/N of every distinct token.

    Args:
        ids_TN: distinct tokens, int64.
        counts_TN: how often each was drawn; 0 is no entry.
        entropy_T: of the teacher's whole distribution, nats; None leaves the draws' own in its place, which is
            smaller (the gradient is the same).
    """
    counts_TN = counts_TN.float()
    log_p_TN = (counts_TN / counts_TN.sum(-1, keepdim=True).clamp_min(1.0)).log()
    nothing_T = torch.full_like(log_p_TN[:, 0], -torch.inf)
    return Teacher(ids_TK=ids_TN, log_p_TK=log_p_TN, log_tail_T=nothing_T, entropy_T=entropy_T)


def teacher_of(
    targets: SparseTargets, loss: LossConfig, device: torch.device | str = "cpu", rows: slice = slice(None)
) -> Teacher:
    """The teacher's side of some blocks' positions (B·L of them), on the device.

    Raises:
        ValueError: the targets lack what the loss asks for (random draws, or the tail at its temperature).
    """

    def tensor(array: np.ndarray[Any, Any]) -> Tensor:
        found = torch.from_numpy(array[rows])
        if torch.device(device).type == "cuda":
            found = found.pin_memory().to(device, non_blocking=True)
        return found.flatten(0, 1)

    if loss.tail == "sampled":
        if targets.sampled is None:
            raise ValueError("loss.tail is 'sampled' and the targets hold no random draws; set teacher.draws")
        drawn, entropy = targets.sampled, targets.entropy_BL
        return sampled_side(
            tensor(drawn.ids_BLN).long(), tensor(drawn.counts_BLN), None if entropy is None else tensor(entropy)
        )
    at = None
    if loss.tail_temperature is not None:
        if loss.tail_temperature not in targets.tail_mass_at:
            raise ValueError(
                f"loss.temperature is {loss.temperature} and the targets hold no tail mass at it; add it to "
                f"teacher.tail_temperatures, or set loss.tail: renormalise"
            )
        at = tensor(targets.tail_mass_at[loss.tail_temperature])
    return teacher_side(
        tensor(targets.ids_BLK).long(), tensor(targets.logprobs_BLK), tensor(targets.tail_mass_BL), loss, at
    )


def gamma_of(loss: LossConfig, domain: str) -> float:
    """γ of a domain: its own, or that of the nearest domain above it which has one, or else `loss.gamma`."""
    named = (loss.gamma_of[above] for above in reversed(lineage(domain)) if above in loss.gamma_of)
    return next(named, loss.gamma)


def position_gamma(
    loss: LossConfig, domains: Sequence[str], entropy_BL: Float32Array | None, positions: int
) -> Float32Array | None:
    """γ of every position [B, L] of some blocks; None where it is `loss.gamma` everywhere.

    Args:
        domains: of each block.
        entropy_BL: of the teacher's distribution, in nats.
        positions: L.

    Raises:
        ValueError: `loss.min_entropy` is set, and the targets hold no entropy.
    """
    if not loss.gamma_of and not loss.min_entropy:
        return None
    of_block = np.array([gamma_of(loss, domain) for domain in domains], np.float32)
    gamma_BL = np.repeat(of_block[:, None], positions, 1)
    if loss.min_entropy:
        if entropy_BL is None:
            raise ValueError(
                "loss.min_entropy is set and the targets hold no entropy (imported ones may lack it); set it to 0"
            )
        gamma_BL[entropy_BL < loss.min_entropy] = 0.0
    return gamma_BL


def position_losses(
    student_TK: Tensor,
    label_T: Tensor,
    rest_T: Tensor,
    rest_at_T: Tensor | None,
    stored_TK: Tensor | None,
    teacher: Teacher | None,
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence [T] from what they depend on of the student's logits.

    Differentiable in the first four, which is all that the fused pass needs (`ddk.fused`).

    Args:
        student_TK: logits at the stored ids; whatever is there where there is no entry.
        label_T: logit of the true token.
        rest_T: log-sum-exp of the logits of all tokens but the stored ones and the true one; −inf where there are
            none.
        rest_at_T: that of the logits divided by the temperature, where `temperature` is not 1 and `tail` is not
            'renormalise'.
        stored_TK: which entry is the true token.
        teacher: None for cross-entropy alone.
    """
    if teacher is None or stored_TK is None:
        normaliser_T = torch.logaddexp(label_T, _no_infinity(rest_T))
        return normaliser_T - label_T, torch.zeros_like(label_T)
    entry_TK = teacher.log_p_TK > -torch.inf
    is_label_TK = stored_TK & entry_TK
    label_apart_T = ~is_label_TK.any(-1)

    student_TK = torch.where(entry_TK, student_TK, _NEVER)
    label_or_never_T = torch.where(label_apart_T, label_T, _NEVER)
    rest_or_never_T = _no_infinity(rest_T)
    whole_T = torch.cat([student_TK, label_or_never_T[:, None], rest_or_never_T[:, None]], -1).logsumexp(-1)
    ce_T = whole_T - label_T

    if loss.tail == "renormalise":
        log_q_TK = (student_TK / loss.temperature).log_softmax(-1)
        return ce_T, _divergence(teacher.log_p_TK, torch.where(entry_TK, log_q_TK, _NEVER), loss)
    if loss.temperature != 1.0:
        if rest_at_T is None:
            raise ValueError("a temperature other than 1 needs the rest's log-sum-exp at it")
        student_TK = torch.where(entry_TK, student_TK / loss.temperature, _NEVER)
        label_or_never_T = torch.where(label_apart_T, label_T / loss.temperature, _NEVER)
        rest_or_never_T = _no_infinity(rest_at_T)
        whole_T = torch.cat([student_TK, label_or_never_T[:, None], rest_or_never_T[:, None]], -1).logsumexp(-1)

    log_q_TK = torch.where(entry_TK, student_TK - whole_T[:, None], _NEVER)
    # With K = V nothing is outside: what rounding left of the tail's mass must not meet a probability of 0.
    outside_T = torch.maximum(label_or_never_T, rest_or_never_T) > _NEVER / 2
    log_tail_T = torch.where(outside_T, teacher.log_tail_T, -torch.inf)
    if loss.tail == "residual":
        log_p_TK = torch.where(is_label_TK, torch.logaddexp(teacher.log_p_TK, log_tail_T[:, None]), teacher.log_p_TK)
        further_p = [torch.where(label_apart_T, log_tail_T, -torch.inf), torch.full_like(log_tail_T, -torch.inf)]
        further_q = [_minus(label_or_never_T, whole_T), _minus(rest_or_never_T, whole_T)]
    else:
        log_p_TK = teacher.log_p_TK
        if loss.divergence == "reverse_kl":
            log_tail_T = torch.where(outside_T, log_tail_T.clamp_min(math.log(SMALLEST_TAIL)), -torch.inf)
        further_p = [log_tail_T]
        further_q = [_minus(torch.logaddexp(label_or_never_T, rest_or_never_T), whole_T)]
    kl_T = _divergence(
        torch.cat([log_p_TK, torch.stack(further_p, -1)], -1),
        torch.cat([log_q_TK, torch.stack(further_q, -1)], -1),
        loss,
    )
    if teacher.entropy_T is not None:
        p_TK = teacher.log_p_TK.exp()
        own_T = -torch.where(entry_TK, p_TK * teacher.log_p_TK, 0.0).sum(-1)
        kl_T = kl_T + (own_T - teacher.entropy_T)
    return ce_T, kl_T


def has_closed_form(loss: LossConfig) -> bool:
    """Whether `closed_form` knows it: the forward KL over stored tokens and a bucket, or over draws."""
    return loss.divergence == "forward_kl" and loss.tail in ("bucket", "sampled") and loss.temperature == 1.0


def closed_form(
    known_TH: Tensor, rest_T: Tensor, stored_TK: Tensor, teacher: Teacher, gamma: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`position_losses` of the usual loss with its derivatives, written out: a third of the operations.

    With w the log-sum-exp of all logits, o that of those outside S, P = Σ_S p + r and a = 1 + γ·P:

        CE = w − z_y                           ∂(CE + γ·KL)/∂z_i    = a·q_i − γ·p_i                    i ∈ S
        KL = Σ_S p·(log p − z + w)             ∂(CE + γ·KL)/∂z_y    = a·q_y − γ·r·exp(z_y − o) − 1     y ∉ S
             + r·(log r − o + w)               ∂(CE + γ·KL)/∂rest   = a·q_rest − γ·r·exp(rest − o)

    and 1 less at the label's entry where y ∈ S.

    Args:
        known_TH: logits at the stored ids, and at the label behind them.
        rest_T, stored_TK, teacher: as of `position_losses`.
        gamma: γ, or that of each position [T].

    Returns:
        CE [T], KL [T], and the derivatives of CE + γ·KL: [T, K + 1] in known_TH (where the label is stored, all of its
        cross-entropy is in the last column) and [T] in rest_T.
    """
    entry_TK = teacher.log_p_TK > -torch.inf
    apart_T1 = ~(stored_TK & entry_TK).any(-1, keepdim=True)
    label_T = known_TH[:, -1]
    z_TH = torch.where(torch.cat([entry_TK, apart_T1], -1), known_TH, _NEVER)
    outside_T = torch.logaddexp(z_TH[:, -1], rest_T)
    whole_T = torch.logaddexp(z_TH[:, :-1].logsumexp(-1), outside_T)
    log_q_TH = z_TH - whole_T[:, None]
    q_TH = log_q_TH.exp()
    p_TK = teacher.log_p_TK.exp()
    # With K = V nothing is outside: what rounding left of the tail's mass must not meet a probability of 0.
    r_T = torch.where(outside_T > _NEVER / 2, teacher.log_tail_T.exp(), 0.0)
    kl_T = (p_TK * (teacher.log_p_TK.clamp_min(_NEVER) - log_q_TH[:, :-1])).sum(-1)
    kl_T += r_T * (teacher.log_tail_T.clamp_min(_NEVER) - (outside_T - whole_T).clamp_min(_NEVER))
    if teacher.entropy_T is not None:
        kl_T -= (p_TK * teacher.log_p_TK.clamp_min(_NEVER)).sum(-1) + teacher.entropy_T
    gamma_r_T = gamma * r_T
    a_T = 1.0 + gamma * p_TK.sum(-1) + gamma_r_T
    of_known_TH = a_T[:, None] * q_TH
    of_known_TH[:, :-1] -= (gamma if isinstance(gamma, float) else gamma[:, None]) * p_TK
    of_known_TH[:, -1] -= gamma_r_T * (z_TH[:, -1] - outside_T).exp() + 1.0
    of_rest_T = a_T * (rest_T - whole_T).exp() - gamma_r_T * (rest_T - outside_T).exp()
    return whole_T - label_T, kl_T, of_known_TH, of_rest_T


def _no_infinity(log_mass: Tensor) -> Tensor:
    """−inf has no finite gradient through a log-sum-exp of nothing else."""
    return torch.where(log_mass == -torch.inf, _NEVER, log_mass)


def _minus(log_mass: Tensor, whole: Tensor) -> Tensor:
    return torch.where(log_mass > _NEVER / 2, log_mass - whole, _NEVER)


def _divergence(log_p: Tensor, log_q: Tensor, loss: LossConfig) -> Tensor:
    """Over the last axis; p is 0 at −inf, q at `_NEVER`. No gradient flows into p."""
    p, q = log_p.exp(), log_q.exp()
    finite_p = torch.where(log_p == -torch.inf, _NEVER, log_p)
    if loss.divergence == "forward_kl":
        return (p * (finite_p - log_q)).sum(-1)
    if loss.divergence == "reverse_kl":
        return torch.where(log_q > _NEVER / 2, q * (log_q - finite_p), 0.0).sum(-1)
    mean = torch.logaddexp(finite_p + math.log(loss.beta), log_q + math.log1p(-loss.beta))
    teacher = p * (finite_p - mean)
    student = torch.where(log_q > _NEVER / 2, q * (log_q - mean), 0.0)
    return (loss.beta * teacher + (1.0 - loss.beta) * student).sum(-1)
