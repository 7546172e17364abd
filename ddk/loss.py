"""CE + γ·KL of the student on sparse teacher targets (the paper's Eq. 3, forward KL: teacher first).

For a position with stored set S (K tokens), teacher probabilities p_i for i ∈ S, tail mass r = 1 − Σ_S p_i, student
probabilities q_i and the true next token y:

    bucket       Σ_S p log(p/q) + r log(r/q_r), with q_r = 1 − Σ_S q: everything outside S is one more 'token'.
                 A lower bound of the full KL; it supervises the tail's mass, not its shape. The default.
    renormalise  Σ_S p̂ log(p̂/q̂), p̂ and q̂ renormalised over S: no gradient at all outside S.
    residual     the tail's mass is given to the true token: Σ p′ log(p′/q) with p′ = p on S and + r at y. A proper
                 divergence over the whole vocabulary, biased towards the label.

With K = V all three are the full KL. A temperature T divides both models' logits; p at T is known only up to the
tail's mass at T, which is not stored, so T ≠ 1 asks for 'renormalise'. The KL is not multiplied by T², as in the
paper.

Everything comes from one pass over the vocabulary, the log-sum-exp outside S: with lse_S of the gathered logits it
gives the student's normaliser, the cross-entropy and q_r without the cancellation of 1 − Σ q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Tail = Literal["bucket", "renormalise", "residual"]


class LossConfig(BaseModel):
    """CE + γ·KL and its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gamma: float = Field(default=0.2, ge=0.0)
    """Weight γ of the KL term; 0 trains on cross-entropy alone and reads no targets."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Temperature T of both distributions in the KL term. Other than 1 needs `tail: renormalise`."""
    tail: Tail = "bucket"
    """What becomes of the teacher's probability outside the stored tokens: 'bucket', 'renormalise' or 'residual'."""

    @model_validator(mode="after")
    def _temperature_has_its_tail(self) -> LossConfig:
        if self.temperature != 1.0 and self.tail != "renormalise":
            raise ValueError(
                f"temperature {self.temperature} with tail '{self.tail}' needs the tail's mass at that temperature, "
                f"which is not stored; set tail: renormalise, or temperature: 1.0"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """Sums over positions, natural log; divide by the number of positions for means."""

    ce: Tensor
    """Cross-entropy with the true tokens, a scalar float32."""
    kl: Tensor
    """KL(teacher ‖ student), a scalar float32; zero where no targets were given."""


def cross_entropy_sum(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Σ −log q(label), a scalar float32. Logits in any float dtype, without padded vocabulary rows."""
    return torch.nn.functional.cross_entropy(logits_TV.float(), labels_T, reduction="sum")


def distillation_sums(
    logits_TV: Tensor,
    labels_T: Tensor,
    ids_TK: Tensor,
    logprobs_TK: Tensor,
    tail_mass_T: Tensor,
    *,
    tail: Tail = "bucket",
    temperature: float = 1.0,
) -> LossSums:
    """Cross-entropy and KL, each summed over the positions.

    Args:
        logits_TV: the student's, any float dtype; padded vocabulary rows already cut off (V is the tokenizer's).
        labels_T: true next tokens, int64.
        ids_TK: stored tokens, int64, distinct within a position.
        logprobs_TK: the teacher's log-probabilities of them (full distribution, temperature 1). An entry of −inf is
            no entry, whatever its id; positions may keep fewer than K, or none.
        tail_mass_T: the teacher's probability outside them, in [0, 1].
        tail: see the module's docstring.
        temperature: see the module's docstring.

    Raises:
        ValueError: a temperature other than 1 without `tail='renormalise'`.
    """
    if temperature != 1.0 and tail != "renormalise":
        raise ValueError(f"temperature {temperature} needs tail='renormalise', not '{tail}'")
    logits_TV = logits_TV.float()
    kept_TK = logprobs_TK > -torch.inf
    any_T = kept_TK.any(-1)
    # What is no entry takes the id of one, so that it hides no token of its own.
    ids_TK = torch.where(kept_TK, ids_TK, ids_TK.gather(-1, kept_TK.int().argmax(-1, keepdim=True)))
    student_TK = logits_TV.gather(-1, ids_TK)
    student_label_T = logits_TV.gather(-1, labels_T[:, None])[:, 0]
    rest_T = logits_TV.scatter(-1, ids_TK, -torch.inf).logsumexp(-1)
    if not any_T.all():  # there the scatter has hidden token 0
        rest_T = torch.where(any_T, rest_T, logits_TV.logsumexp(-1))
    student_TK = student_TK.masked_fill(~kept_TK, -torch.inf)
    normaliser_T = torch.logaddexp(student_TK.logsumexp(-1), rest_T)
    ce = (normaliser_T - student_label_T).sum()

    if tail == "renormalise":
        # A position without entries has nothing to compare; zeros keep its softmax from being 0/0.
        teacher_TK = logprobs_TK.float().masked_fill(~any_T[:, None], 0.0)
        student_TK = student_TK.masked_fill(~any_T[:, None], 0.0)
        kl_T = _kl((teacher_TK / temperature).log_softmax(-1), (student_TK / temperature).log_softmax(-1)).sum(-1)
        return LossSums(ce=ce, kl=kl_T.sum())

    log_student_TK = student_TK - normaliser_T[:, None]
    tail_mass_T = tail_mass_T.float()
    if tail == "bucket":
        kl_T = _kl(logprobs_TK.float(), log_student_TK).sum(-1)
        # With K = V nothing is outside: what rounding left of the tail's mass must not meet log q_r = −inf.
        outside_T = torch.where(rest_T > -torch.inf, tail_mass_T, 0.0)
        kl_T = kl_T + _kl(outside_T.log(), rest_T - normaliser_T)
        return LossSums(ce=ce, kl=kl_T.sum())

    is_label_TK = (ids_TK == labels_T[:, None]) & kept_TK
    stored_T = is_label_TK.any(-1)
    raised_TK = torch.logaddexp(logprobs_TK.float(), tail_mass_T.log()[:, None])
    kl_T = _kl(torch.where(is_label_TK, raised_TK, logprobs_TK.float()), log_student_TK).sum(-1)
    label_T = _kl(torch.where(stored_T, 0.0, tail_mass_T).log(), student_label_T - normaliser_T)
    return LossSums(ce=ce, kl=(kl_T + label_T).sum())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p·(log p − log q), elementwise; 0 where p is 0, also where log q is −inf there. No gradient flows into p."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
