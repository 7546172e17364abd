"""One training of a benchmark, in the process that calls it: the product's trainer, mixtures and stores, without
Prefect and a process of its own, so that hundreds of short runs can be made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ddk.gap import domain_gap
from ddk.methods.base import Interval, Measured, measured
from ddk.methods.registry import mixture_after
from ddk.mixture import MixtureConfig
from ddk.parallel import World
from ddk.values import Mixture
from flows.config import Config
from flows.stages import plan_of
from storage.runs.mixtures import MixtureHistory, MixtureRecord, make_record
from tasks.training.rank import RankTraining
from tasks.training.run_inputs import RunInputs

Rule = Callable[[Measured, MixtureConfig], Mixture]


def with_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """The configuration with other values, by `section.field`."""
    given = config.model_dump(mode="json")
    for name, value in fields.items():
        *sections, last = name.split(".")
        place = given
        for section in sections:
            place = place[section]
        place[last] = value
    return Config.model_validate(given)


def train(
    config: Config,
    *,
    rule: Rule | None = None,
    folder: str | None = None,
    until: int | None = None,
    export: str | None = None,
) -> list[MixtureRecord]:
    """Every measurement of the run, as `ddk train` makes them.

    Args:
        rule: in the place of the method's.
        folder: keeps the measurements and a checkpoint there, from which the same call goes on.
        until: stop at this step, with a checkpoint; the next call goes on from there.
        export: a folder for the student that it ends with.
    """
    torch.set_num_threads(1)
    inputs = RunInputs(config.settings, plan_of(config))
    until = config.train.steps if until is None else until
    with ExitStack() as stack:
        url = stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder
        history = MixtureHistory(url)
        records = history.records()
        if records and records[-1].step >= until:
            return records
        training = RankTraining(inputs.job.model_copy(update={"run_url": url}), World(device=torch.device("cpu")))
        while True:
            if not records or records[-1].step < training.state.step:
                records.append(_record(config, inputs, training, records, rule))
                history.append(records[-1])
            if training.state.step >= until:
                if folder is not None and until < config.train.steps:
                    training.save()
                if export is not None:
                    training.export(export)
                return records
            steps = min(config.mixture.interval, until - training.state.step)
            training.train_interval(records[-1].mixture, records[-1].version, steps, lambda report: None)


def _record(
    config: Config, inputs: RunInputs, training: RankTraining, records: list[MixtureRecord], rule: Rule | None
) -> MixtureRecord:
    step, drawn = training.state.step, training.state.sampler.drawn
    gaps = [
        domain_gap(domain, student, inputs.teacher_ppl[domain], step=step)
        for domain, student in training.perplexities().items()
    ]
    past = [Interval(step=one.step, gaps=one.gaps, mixture=one.mixture) for one in records]
    progress = step / config.train.steps
    if rule is None:
        mixture = mixture_after(
            config.method,
            past,
            gaps,
            config.mixture,
            inputs.sizes,
            progress=progress,
            accuracies=inputs.accuracies,
        )
    else:
        mixture = rule(measured(past, gaps, inputs.sizes, None, progress), config.mixture)
    return make_record(
        version=len(records),
        step=step,
        tokens_seen=sum(drawn.values()) * inputs.seq_len,
        gaps=gaps,
        mixture=mixture,
        blocks_drawn=drawn,
        positions=inputs.positions,
    )
