"""The output projection and the loss in one: from hidden states to CE + γ·divergence and its gradients, in chunks.

A step's logits are its largest tensor by far: at 8,192 positions and 152,000 tokens, 5 GB in float32, and plain code
holds three of them. Here, the projection, the loss and the gradients are computed for
one chunk of positions at a time, in the chunk's own memory; only the gradients of the hidden states [T, D] and of the
projection [V, D] are kept. The gradient is computed in the forward pass, while the chunk exists (as in Liger-Kernel and
cut-cross-entropy), so the backward pass only scales it.

For a chunk, with H the columns of the stored ids and of the label:

1. z = h·Wᵀ + b; z_H is gathered, and hidden from the rest of the row by −inf;
2. one sweep turns the row into exp(z − max) and its sum: the log-sum-exp of everything outside H;
3. `ddk.loss.position_losses` gives the loss as a function of z_H and of that number, and autograd its derivatives:
   K + 2 numbers per position, for any divergence and treatment of the tail (the derivatives of the usual loss are
   written out in `ddk.loss.closed_form`);
4. the gradient of the logits is the row of step 2 times one number, and the derivatives added at H;
5. two products give the gradients of h and W.

At a temperature T other than 1, step 2 is done for z/T too. Nothing here depends on the divergence, so a new one only
needs a line in `ddk.loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddk.loss import LossSums, Teacher, closed_form, has_closed_form, position_losses
from ddk.train_config import LossConfig

CHUNK_BYTES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20}
"""Of a chunk's logits in float32, by the device's type. Smaller saves memory, larger saves sweeps over [V, D]."""
_SWEEP_BYTES = 2 * 2**20
"""Of the rows that a CPU takes through step 2 at once, so that they stay in its second-level cache."""


def fused_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    teacher: Teacher | None,
    loss: LossConfig,
    *,
    bias_V: Tensor | None = None,
    vocab_size: int | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> LossSums:
    """Cross-entropy and divergence from hidden states, summed over the positions.

    Args:
        hidden_TD: the decoder's last hidden states, any float dtype. Products are taken in this dtype, or in
            autocast's; everything else in float32.
        weight_VD: the output projection, any float dtype; its gradient is summed in float32.
        labels_T: true next tokens, int64.
        teacher: None for cross-entropy alone.
        loss: γ, divergence, tail, temperature.
        bias_V: the projection's, if it has one.
        vocab_size: tokens of the tokenizer; rows of the projection from there on are padding, and take no part.
        scale: what `total` is multiplied by, e.g. 1 / (positions of the global batch).
        chunk_bytes: see `CHUNK_BYTES`.
    """
    vocab = weight_VD.shape[0] if vocab_size is None else vocab_size
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind):
        hidden_TD = hidden_TD.to(torch.get_autocast_dtype(kind))  # norms give float32 there
    wants_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    settings = _Settings(
        labels_T=labels_T,
        teacher=teacher if loss.gamma > 0.0 else None,
        loss=loss,
        vocab_size=vocab,
        scale=scale,
        chunk=_chunk_rows(hidden_TD.device.type, vocab, chunk_bytes),
        wants_gradient=wants_gradient,
    )
    total, ce, kl = _FusedLoss.apply(hidden_TD, weight_VD, bias_V, settings)  # type: ignore[no-untyped-call]
    return LossSums(total=total, ce=ce, kl=kl)


def dense_loss(
    logits_TV: Tensor, labels_T: Tensor, teacher: Teacher | None, loss: LossConfig, *, scale: float = 1.0
) -> LossSums:
    """The same from logits, for models whose logits are more than a projection (a soft cap, a learned scale).

    Args:
        logits_TV: any float dtype, without padded vocabulary rows. [T, V] is there already; float32 copies are
            made a chunk at a time.
    """
    settings = _Settings(
        labels_T=labels_T,
        teacher=teacher if loss.gamma > 0.0 else None,
        loss=loss,
        vocab_size=logits_TV.shape[1],
        scale=scale,
        chunk=_chunk_rows(logits_TV.device.type, logits_TV.shape[1], None),
        wants_gradient=torch.is_grad_enabled() and logits_TV.requires_grad,
    )
    total, ce, kl = _DenseLoss.apply(logits_TV, settings)  # type: ignore[no-untyped-call]
    return LossSums(total=total, ce=ce, kl=kl)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    labels_T: Tensor
    teacher: Teacher | None
    loss: LossConfig
    vocab_size: int
    scale: float
    chunk: int
    """Positions."""
    wants_gradient: bool

    def rows(self, positions: int) -> list[slice]:
        return [slice(start, min(start + self.chunk, positions)) for start in range(0, positions, self.chunk)]


def _chunk_rows(device: str, vocab_size: int, chunk_bytes: int | None) -> int:
    return max(1, (chunk_bytes or CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])) // (4 * vocab_size))


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            vocab = settings.vocab_size
            used_VD = weight_VD[:vocab].to(hidden_TD.dtype)
            wanted = [
                settings.wants_gradient and tensor is not None and tensor.requires_grad
                for tensor in (hidden_TD, weight_VD, bias_V)
            ]
            hidden_gradient_TD = torch.empty_like(hidden_TD) if wanted[0] else None
            weight_gradient_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD)) if wanted[1] else None
            bias_gradient_V = (
                torch.zeros_like(bias_V, dtype=_wide(bias_V)) if bias_V is not None and wanted[2] else None
            )
            sums = torch.zeros(3, device=hidden_TD.device, dtype=_wide(hidden_TD))
            memory: Tensor | None = None
            for rows in settings.rows(len(hidden_TD)):
                hidden_CD = hidden_TD[rows]
                if hidden_TD.dtype == sums.dtype:
                    # One chunk's memory for all of them.
                    if memory is None:
                        memory = hidden_TD.new_empty(len(hidden_CD), vocab)
                    logits_CV = torch.mm(hidden_CD, used_VD.T, out=memory[: len(hidden_CD)])
                else:
                    logits_CV = (hidden_CD @ used_VD.T).to(sums.dtype)
                if bias_V is not None:
                    logits_CV += bias_V[:vocab].to(logits_CV.dtype)
                sums += _consume(logits_CV, rows, settings)
                gradient_CV = logits_CV.to(hidden_TD.dtype)
                if hidden_gradient_TD is not None:
                    torch.mm(gradient_CV, used_VD, out=hidden_gradient_TD[rows])
                if weight_gradient_VD is not None:
                    if gradient_CV.dtype == weight_gradient_VD.dtype:
                        weight_gradient_VD[:vocab].addmm_(gradient_CV.T, hidden_CD)
                    else:
                        weight_gradient_VD[:vocab] += gradient_CV.T @ hidden_CD
                if bias_gradient_V is not None:
                    bias_gradient_V[:vocab] += logits_CV.sum(0)
        ctx.gradients = (hidden_gradient_TD, weight_gradient_VD, bias_gradient_V)
        ctx.dtypes = (hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return _results(ctx, sums, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_ce: Tensor, of_kl: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(of_total.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
        gradient_TV = torch.empty_like(logits_TV) if settings.wants_gradient else None
        sums = torch.zeros(3, device=logits_TV.device, dtype=_wide(logits_TV))
        for rows in settings.rows(len(logits_TV)):
            logits_CV = logits_TV[rows].to(sums.dtype, copy=True)
            sums += _consume(logits_CV, rows, settings)
            if gradient_TV is not None:
                gradient_TV[rows] = logits_CV
        ctx.gradient = gradient_TV
        return _results(ctx, sums, settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, of_ce: Tensor, of_kl: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(of_total.to(gradient.dtype)), None


def _results(ctx: Any, sums: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    ce, kl, weighted_kl = sums.unbind()
    total = (ce + weighted_kl) * settings.scale
    ce, kl = ce.clone(), kl.clone()
    ctx.mark_non_differentiable(ce, kl)
    return total, ce, kl


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _consume(logits_CV: Tensor, rows: slice, settings: _Settings) -> Tensor:
    """Steps 1 to 4 of the module's docstring: sums [3] of CE, divergence, and γ times the divergence.

    The logits become their gradient.
    """
    labels_C1 = settings.labels_T[rows, None]
    teacher = None if settings.teacher is None else settings.teacher[rows]
    gamma = _gamma(teacher, settings.loss)
    if teacher is None:
        hidden_CH, stored_CK = labels_C1, None
    else:
        # What is no entry hides the label once more: no token of its own, and the label is hidden anyway.
        ids_CK = torch.where(teacher.log_p_TK > -torch.inf, teacher.ids_TK, labels_C1)
        hidden_CH, stored_CK = torch.cat([ids_CK, labels_C1], -1), ids_CK == labels_C1
    known_CH = logits_CV.gather(1, hidden_CH)
    logits_CV.scatter_(1, hidden_CH, -torch.inf)
    temperature = settings.loss.temperature if settings.loss.tail != "renormalise" and teacher is not None else 1.0
    scaled_CV = None if temperature == 1.0 else logits_CV / temperature
    rest_C, sum_C = _exponentials(logits_CV)
    rest_at_C, sum_at_C = (None, None) if scaled_CV is None else _exponentials(scaled_CV)

    if teacher is not None and stored_CK is not None and has_closed_form(settings.loss):
        ce_C, kl_C, of_known_CH, of_rest_C = closed_form(known_CH, rest_C, stored_CK, teacher, gamma)
        of_known_CH *= settings.scale
        of_rest_C *= settings.scale
        of_rest_at_C = None
    else:
        ce_C, kl_C, of_known_CH, of_rest_C, of_rest_at_C = _derived(
            known_CH, rest_C, rest_at_C, stored_CK, teacher, settings
        )
    if settings.wants_gradient:
        logits_CV.mul_((of_rest_C / sum_C)[:, None])
        if scaled_CV is not None and sum_at_C is not None and of_rest_at_C is not None:
            logits_CV.addcmul_(scaled_CV, (of_rest_at_C / (sum_at_C * temperature))[:, None])
        logits_CV.scatter_add_(1, hidden_CH, of_known_CH)
    return torch.stack([ce_C.sum(), kl_C.sum(), (gamma * kl_C).sum()])


def _derived(
    known_CH: Tensor,
    rest_C: Tensor,
    rest_at_C: Tensor | None,
    stored_CK: Tensor | None,
    teacher: Teacher | None,
    settings: _Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """CE [C], divergence [C], and the total's derivatives in the first three arguments, by autograd."""
    inputs = [known_CH, rest_C] + ([] if rest_at_C is None else [rest_at_C])
    with torch.set_grad_enabled(settings.wants_gradient):
        for one in inputs:
            one.requires_grad_(settings.wants_gradient)
        ce_C, kl_C = position_losses(
            known_CH[:, :-1], known_CH[:, -1], rest_C, rest_at_C, stored_CK, teacher, settings.loss
        )
        total = ((ce_C + _gamma(teacher, settings.loss) * kl_C) * settings.scale).sum()
    if not settings.wants_gradient:
        return ce_C, kl_C, known_CH, rest_C, rest_at_C
    of_known_CH, of_rest_C, *of_rest_at = torch.autograd.grad(total, inputs)
    return ce_C.detach(), kl_C.detach(), of_known_CH, of_rest_C, of_rest_at[0] if of_rest_at else None


def _gamma(teacher: Teacher | None, loss: LossConfig) -> float | Tensor:
    """γ, or that of each position of the chunk."""
    if teacher is None:
        return 0.0
    return loss.gamma if teacher.gamma_T is None else teacher.gamma_T


def _exponentials(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn rows into exp(row − max); returns log-sum-exp [C], and the sums [C] that the rows now have.

    A row of −inf alone becomes zeros, with the sum 1 and the log-sum-exp −inf.
    """
    rows = len(logits_CV)
    if logits_CV.device.type == "cpu":
        rows = max(1, _SWEEP_BYTES // (logits_CV.element_size() * logits_CV.shape[1]))
    found = [_sweep(logits_CV[start : start + rows]) for start in range(0, len(logits_CV), rows)]
    return torch.cat([rest for rest, _ in found]), torch.cat([total for _, total in found])


def _sweep(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    largest_R = logits_RV.amax(1).nan_to_num_(neginf=0.0, posinf=torch.inf, nan=torch.nan)
    sum_R = logits_RV.sub_(largest_R[:, None]).exp_().sum(1)
    nothing_R = sum_R == 0.0
    return (largest_R + sum_R.log()).masked_fill_(nothing_R, -torch.inf), sum_R.masked_fill_(nothing_R, 1.0)
