"""ddk_retain: the domains that lag are drawn most, and towards the end those that the student has begun to forget.

DDK follows the gap alone. A student that was trained on a mixture of its own loses what it is drawn less from: on the
domains that it knows best, DDK ends with a perplexity above where it began. Here, with the gap g and the loss f since
the start of the run, both in nats,

    g[i] = ln ℓ_S[i] − ln ℓ_T[i]
    f[i] = max(0, ln ℓ_S[i] − ln ℓ_S[i] at the start)
    s[i] = g[i]/τ + κ·p·f[i]/max(f₀, max_j f[j])        p: share of the run's steps that are done
    r[i] = α·exp(s[i])/Σ_j exp(s[j]) + (1 − α)/N

from the first interval on: no domain is ever drawn less than (1 − α)/N, unlike under Eq. 1, whose first interval may
leave out all domains but a few.

The domain that has lost most is raised by κ·p, and the others in proportion. How much it has lost does not matter:
where two domains have lost 2%, the weight is enough to bring them back; where four have lost 10%, they cannot all be
brought back, and must not take all that the lagging domains need. A loss below f₀ counts for less, so that noise in the
measurements changes little.

What was lost counts more the later it is. While the learning rate is high, every domain that is drawn little loses
some, most of which comes back by itself as the rate falls; and blocks that are drawn late, at a low rate, keep more of
a known domain than the same number drawn early. For the same reason the lagging domains come first.

The idea of letting what was lost compete with what is lacking is that of Replay on Demand (Thede et al., 2026), there
between single samples; here it is between domains, from measurements that DDK makes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ddk.methods.base import Measured, Method
from ddk.mixture import MixtureConfig, check_perplexities, equal_mixture, exponentiated_mixture
from ddk.values import Mixture


def retaining_mixture(
    student_ppl: Mapping[str, float],
    teacher_ppl: Mapping[str, float],
    first_ppl: Mapping[str, float],
    *,
    alpha: float,
    temperature: float,
    retention: float,
    tolerance: float,
    progress: float,
) -> Mixture:
    """The mixture above.

    Args:
        student_ppl: ℓ_S, measured now, by domain.
        teacher_ppl: ℓ_T.
        first_ppl: ℓ_S at the start of the run.
        alpha: α in [0, 1].
        temperature: τ > 0, in nats.
        retention: κ ≥ 0, in units of the exponent.
        tolerance: f₀ > 0, in nats.
        progress: p in [0, 1].

    Raises:
        ValueError: the domains differ, or a perplexity is not a positive finite number.
    """
    check_perplexities(student=student_ppl, teacher=teacher_ppl, start=first_ppl)
    lost = {d: max(0.0, math.log(student) - math.log(first_ppl[d])) for d, student in student_ppl.items()}
    scale = retention * progress / max(tolerance, *lost.values())
    rise = {
        d: (math.log(student) - math.log(teacher_ppl[d])) / temperature + scale * lost[d]
        for d, student in student_ppl.items()
    }
    return exponentiated_mixture(equal_mixture(student_ppl), rise, alpha)


def _next(now: Measured, config: MixtureConfig) -> Mixture:
    first = {gap.domain: gap.student_ppl for gap in now.past[0].gaps} if now.past else now.student_ppl
    return retaining_mixture(
        now.student_ppl,
        now.teacher_ppl,
        first,
        alpha=config.retain_alpha,
        temperature=config.retain_temperature,
        retention=config.retain_weight,
        tolerance=config.retain_tolerance,
        progress=now.progress,
    )


DDK_RETAIN = Method(next_mixture=_next, follows_gap=True, smoothing="retain_alpha")
