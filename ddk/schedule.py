"""The learning rate as a function of the step, so that there is no scheduler to save.

`cosine`: linear from 0 to the peak over the warm-up, then half a cosine down to the minimum at the last step.

`wsd` (warm-up, stable, decay; Hu et al. 2024, 'MiniCPM', arXiv 2404.06395): after the warm-up the peak, until a share
of the steps is left, over which the rate falls linearly to the minimum. What was trained before the decay does not
depend on the number of steps, so that a longer run branches off from any checkpoint of the stable part.
"""

from __future__ import annotations

import math

from ddk.train_config import TrainConfig


def learning_rate(config: TrainConfig, step: int, start: int = 0) -> float:
    """Of step `step` (from 0).

    Example: cosine, warmup_steps 10, steps 110: step 4 has half the peak, step 9 all of it, step 109 the minimum.

    Args:
        start: where the warm-up begins; above 0 in a run that goes on from another one's checkpoint.
    """
    warmup = min(config.warmup_steps, config.steps - start)
    if step < start + warmup:
        return config.learning_rate * (step - start + 1) / warmup
    lowest, span = config.min_learning_rate, config.learning_rate - config.min_learning_rate
    if config.schedule == "wsd":
        begins = decay_start(config)
        if step < begins:
            return config.learning_rate
        return lowest + span * (config.steps - step - 1) / (config.steps - begins)
    progress = (step + 1 - start - warmup) / max(1, config.steps - start - warmup)
    return lowest + span * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def decay_start(config: TrainConfig) -> int:
    """The first step of the decay, with schedule wsd."""
    return config.steps - max(1, round(config.decay_share * config.steps))
