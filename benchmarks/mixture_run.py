"""One training of bench_mixtures.py, in the process that calls it: the product's trainer, mixtures and stores, without
checkpoints and Prefect, so that hundreds of short runs need not start a process each."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from mixture_settings import configuration
from mixture_trials import TRIALS

from ddk.gap import domain_gap
from ddk.methods.base import Interval, measured
from ddk.methods.registry import mixture_after
from ddk.parallel import World
from flows.config import Config
from flows.stages import plan_of
from storage.runs.mixtures import MixtureRecord, make_record
from tasks.comparing.data import ComparedRun
from tasks.training.rank import RankTraining
from tasks.training.run_inputs import RunInputs

INTERVAL = 25


def run(setting: str, steps: int, rule: str, fields: dict[str, Any], seed: int, root: str) -> ComparedRun:
    """Train one student under one rule; keeps the first and the last measurement.

    Args:
        fields: of the configuration, as `section.field`, in which the rule differs from the quickstart's; `trial` names
            a rule of mixture_trials.py that takes the place of the method's.
    """
    torch.set_num_threads(1)
    common = {"train.steps": steps, "train.warmup_steps": steps // 10, "mixture.interval": INTERVAL, "seed": seed}
    trial = fields.get("trial")
    given = {name: value for name, value in fields.items() if name != "trial"}
    config = _with(configuration(setting, Path(root)), {**common, **given})
    records = _records(config, trial)
    return ComparedRun(
        variant=rule,
        seed=seed,
        run=f"{setting}-{steps}-{rule}-{seed}".replace(" ", "-"),
        status="complete",
        seq_len=config.packing.seq_len,
        records=(records[0], records[-1]),
    )


def _with(config: Config, fields: dict[str, Any]) -> Config:
    given = config.model_dump(mode="json")
    for name, value in fields.items():
        *sections, last = name.split(".")
        place = given
        for section in sections:
            place = place[section]
        place[last] = value
    return Config.model_validate(given)


def _records(config: Config, trial: str | None) -> list[MixtureRecord]:
    """Every measurement of the run, as `ddk train` makes them."""
    inputs = RunInputs(config.settings, plan_of(config))
    records: list[MixtureRecord] = []
    with tempfile.TemporaryDirectory() as nowhere:
        job = inputs.job.model_copy(update={"run_url": nowhere})
        training = RankTraining(job, World(device=torch.device("cpu")))
        while True:
            step, drawn = training.state.step, training.state.sampler.drawn
            gaps = [
                domain_gap(domain, student, inputs.teacher_ppl[domain], step=step)
                for domain, student in training.perplexities().items()
            ]
            past = [Interval(step=one.step, gaps=one.gaps, mixture=one.mixture) for one in records]
            progress = step / config.train.steps
            if trial is None:
                mixture = mixture_after(config.method, past, gaps, config.mixture, inputs.sizes, progress=progress)
            else:
                now = measured(past, gaps, inputs.sizes, None, progress)
                mixture = TRIALS[trial](now, config.mixture)
            records.append(
                make_record(
                    version=len(records),
                    step=step,
                    tokens_seen=sum(drawn.values()) * inputs.seq_len,
                    gaps=gaps,
                    mixture=mixture,
                    blocks_drawn=drawn,
                    positions=inputs.positions,
                )
            )
            if step >= config.train.steps:
                return records
            training.train_interval(mixture, records[-1].version, config.mixture.interval, lambda report: None)
