"""Methods with one mixture for the whole run, whatever the gap: ddk_equal, kd and cpt.

    ddk_equal  CE + γ·divergence, every domain drawn equally often (the paper's ablation ES)
    kd         the same loss, 'no domains': each drawn by its number of blocks, as from one shuffled corpus
    cpt        cross-entropy alone (γ = 0) on the same mixture as kd; no targets are read

`mixture.weights` replaces the mixture of any of them.
"""

from __future__ import annotations

from typing import Literal

from ddk.methods.base import Measured, Method, NextMixture
from ddk.mixture import MixtureConfig, fixed_mixture
from ddk.values import Mixture


def fixed(default: Literal["equal", "proportional"]) -> NextMixture:
    """The mixture that the configuration gives, or else `default`."""

    def next_mixture(now: Measured, config: MixtureConfig) -> Mixture:
        return fixed_mixture(default if config.weights is None else config.weights, now.sizes)

    return next_mixture


DDK_EQUAL = Method(next_mixture=fixed("equal"), follows_gap=False)
KD = Method(next_mixture=fixed("proportional"), follows_gap=False)
CPT = Method(next_mixture=fixed("proportional"), follows_gap=False, loss={"gamma": 0.0})
