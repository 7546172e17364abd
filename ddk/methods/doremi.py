"""cpt_doremi: cross-entropy alone, on domain weights by group DRO over the excess loss.

DoReMi (Xie et al., NeurIPS 2023, 'Optimizing Data Mixtures Speeds Up Language Model Pretraining', Algorithm 1) raises
the weights of the domains where the model has most to gain. At each interval, with ℓ the perplexities,

    λ[i] = max(0, log ℓ_S[i] − log ℓ_ref[i])            excess loss, nats per token
    α'[i] = α[i]·exp(η·λ[i]) / Σ_j α[j]·exp(η·λ[j])     a step of exponentiated gradient ascent
    α[i] ← (1 − c)·α'[i] + c/N

from the uniform α. The paper's numbers are the defaults: η = 1 (`mixture.doremi_step`), c = 1e-3
(`mixture.doremi_smoothing`).

What differs from the original:
- The reference is the teacher, whose perplexities are stored already, unless `mixture.reference_run` names a finished
  run. The original trains a reference of the student's size; the teacher's loss is lower, so that λ is larger.
- The excess is clipped at 0 by domain. The original clips it token by token, on the batch in training; here it is the
  validation set's, once an interval. α therefore moves in fewer, less noisy steps; η can make up for that.
- One run trains the student on the moving α. In the original the moving α trains a small proxy only, and the model is
  trained on the average of its path.

The original's recipe takes three runs on one cache:
1. `--run reference --set method=cpt`
2. `--run proxy --set method=cpt_doremi --set mixture.reference_run=reference`
3. `--run main --set method=cpt` with `mixture.weights` set to `average_mixture` of the proxy's history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ddk.methods.base import Measured, Method
from ddk.mixture import (
    MixtureConfig,
    check_perplexities,
    equal_mixture,
    exponentiated_mixture,
    weighted_mixture,
)
from ddk.values import Mixture


def doremi_mixture(
    previous: Mixture,
    student_ppl: Mapping[str, float],
    reference_ppl: Mapping[str, float],
    step: float,
    smoothing: float,
) -> Mixture:
    """One step of the above.

    Args:
        previous: α, the mixture of the interval that has just ended.
        student_ppl: measured now, by domain.
        reference_ppl: likewise.
        step: η.
        smoothing: c.

    Raises:
        ValueError: the domains differ, or a perplexity is not a positive finite number.
    """
    check_perplexities(student=student_ppl, reference=reference_ppl)
    rise = {
        domain: step * max(0.0, math.log(student_ppl[domain]) - math.log(reference_ppl[domain]))
        for domain in student_ppl
    }
    return exponentiated_mixture(previous, rise, 1.0 - smoothing)


def average_mixture(history: Sequence[Mixture]) -> Mixture:
    """The mean of the mixtures that a run's intervals were trained under: what the original trains its model on.

    A run's history ends with a mixture that was measured and never trained under; leave that one out.

    Raises:
        ValueError: there are none, or they are of different domains.
    """
    if not history:
        raise ValueError("an average needs at least one mixture")
    domains = set(history[0].domains)
    for mixture in history:
        if set(mixture.domains) != domains:
            raise ValueError(f"one mixture has domains {sorted(domains)}, another {sorted(mixture.domains)}")
    return weighted_mixture(
        {domain: math.fsum(mixture.probabilities[domain] for mixture in history) for domain in history[0].domains}
    )


def _next(now: Measured, config: MixtureConfig) -> Mixture:
    if now.previous is None:
        return equal_mixture(list(now.student_ppl))
    return doremi_mixture(now.previous, now.student_ppl, now.reference_ppl, config.doremi_step, config.doremi_smoothing)


CPT_DOREMI = Method(next_mixture=_next, follows_gap=True, loss={"gamma": 0.0}, reads_reference=True)
