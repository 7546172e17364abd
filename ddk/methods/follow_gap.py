"""ddk and ddk_no_smoothing: the domains where the student lags the teacher most are drawn most.

    ddk               the paper's method: the mixture by Eq. 1, and from then on by Eq. 2
    ddk_no_smoothing  the paper's ablation: by Eq. 1 at every interval

Both train on CE + γ·divergence, as the configuration sets it.
"""

from __future__ import annotations

from ddk.methods.base import Measured, Method
from ddk.mixture import MixtureConfig, initial_mixture, update_mixture
from ddk.values import Mixture


def _smoothed(now: Measured, config: MixtureConfig) -> Mixture:
    if now.previous is None:
        return initial_mixture(now.student_ppl, now.teacher_ppl, config.gap)
    return update_mixture(now.previous, now.student_ppl, now.teacher_ppl, config.alpha, config.gap)


def _unsmoothed(now: Measured, config: MixtureConfig) -> Mixture:
    return initial_mixture(now.student_ppl, now.teacher_ppl, config.gap)


DDK = Method(next_mixture=_smoothed, follows_gap=True, smoothing="alpha")
DDK_NO_SMOOTHING = Method(next_mixture=_unsmoothed, follows_gap=True)
