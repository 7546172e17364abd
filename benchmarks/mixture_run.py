"""One training of bench_mixtures.py: a rule in a setting, of which the first and the last measurement are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from in_process import train, with_fields
from mixture_settings import configuration
from mixture_trials import TRIALS

from tasks.comparing.data import ComparedRun

INTERVAL = 25


def run(setting: str, steps: int, rule: str, fields: dict[str, Any], seed: int, root: str) -> ComparedRun:
    """Train one student under one rule.

    Args:
        fields: of the configuration, as `section.field`, in which the rule differs from the quickstart's; `trial` names
            a rule of mixture_trials.py that takes the place of the method's.
    """
    common = {"train.steps": steps, "train.warmup_steps": steps // 10, "mixture.interval": INTERVAL, "seed": seed}
    trial = fields.get("trial")
    given = {name: value for name, value in fields.items() if name != "trial"}
    config = with_fields(configuration(setting, Path(root)), {**common, **given})
    records = train(config, rule=None if trial is None else TRIALS[trial])
    return ComparedRun(
        variant=rule,
        seed=seed,
        run=f"{setting}-{steps}-{rule}-{seed}".replace(" ", "-"),
        status="complete",
        seq_len=config.packing.seq_len,
        records=(records[0], records[-1]),
    )
