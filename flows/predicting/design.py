"""The smallest set of runs that determines a law, through `ddk compare`, on one teacher cache.

A domain's law has up to four constants that only its share determines, so that every domain is given five different
shares in six mixtures: equal sampling, and five in which each domain takes the weights 1/4, 1/2, 1, 2 and 4 in turn (a
Latin square). The learning rate is held after the warm-up (`train.min_learning_rate` = `train.learning_rate`): then
every measurement of a run is a point, and the lengths cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError
from flows.comparing.variants import Request, Variant, planned_runs
from flows.config import Config
from flows.costing.estimate import estimate
from flows.costing.run_size import Assumptions

WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
MEASUREMENTS = 8
"""Of a run, spread evenly over its steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesignCost:
    """What the runs take, estimated as `ddk plan --cost` does."""

    runs: int
    tokens: int
    """Positions that all runs together train on."""
    gpu_hours: float
    """Training and measuring of all runs."""
    capture_hours: float
    """Of the one cache, if it is not there."""


def design(config: Config, folder: str, *, name: str, students: Sequence[str], seed: int) -> Request:
    """The runs, as a request of `ddk compare`.

    Args:
        folder: that relative paths of students are relative to.
        students: folders or names of further students; the configuration's comes first.

    Raises:
        UserError: there is one domain, whose share is 1 in any mixture.
    """
    domains = list(config.domains)
    if len(domains) < 2:
        raise UserError("a law of the mixture needs at least two domains, and the configuration has one")
    models = [config.student.model, *students]
    variants = [
        Variant(name=_named(number, label, len(models)), method="ddk_equal", fields=_fields(config, model, weights))
        for number, model in enumerate(models)
        for label, weights in _mixtures(domains).items()
    ]
    return Request(name=name, variants=tuple(variants), seeds=(seed,), baseline=variants[0].name, folder=folder)


def cost(config: Config, request: Request, assumed: Assumptions) -> DesignCost:
    """What the request takes.

    Raises:
        UserError: the configuration refuses a variant, or a model's config is not available.
    """
    hours, tokens, capture = 0.0, 0, 0.0
    runs = planned_runs(config, request)
    for run in runs:
        if run.config is None:
            raise UserError(str(run.refusal))
        found = estimate(run.config, assumed)
        hours += found.value("GPU time", "training") + found.value("GPU time", "gap")
        tokens += int(found.value("positions", "training"))
        capture = found.value("GPU time", "capture")
    return DesignCost(runs=len(runs), tokens=tokens, gpu_hours=hours, capture_hours=capture)


def _mixtures(domains: Sequence[str]) -> dict[str, dict[str, float] | str]:
    """By label; the weight of a domain moves one place from mixture to mixture."""
    found: dict[str, dict[str, float] | str] = {"equal": "equal"}
    for turn in range(len(WEIGHTS)):
        found[f"m{turn + 1}"] = {domain: WEIGHTS[(at + turn) % len(WEIGHTS)] for at, domain in enumerate(domains)}
    return found


def _named(number: int, label: str, models: int) -> str:
    return label if models == 1 else f"s{number} {label}"


def _fields(config: Config, model: str, weights: dict[str, float] | str) -> dict[str, Any]:
    return {
        "student.model": model if model == config.student.model or not os.path.isdir(model) else os.path.abspath(model),
        "mixture.weights": weights,
        "mixture.interval": max(1, config.train.steps // MEASUREMENTS),
        "mixture.stop_ratio": None,
        "train.overtrained": "warn",
        "train.min_learning_rate": config.train.learning_rate,
    }
