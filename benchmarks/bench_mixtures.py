"""Which mixture lowers the largest gap without a price: rules against equal sampling and DDK's own frontier.

    make bench-mixtures                                                  what is missing of all settings that can be run
    .venv/bin/python benchmarks/bench_mixtures.py --corpora DIR          with 'eight', which reads a folder of corpora
    .venv/bin/python benchmarks/bench_mixtures.py --setting five --steps 150 --seeds 0,1

Three settings (mixture_settings.py), two lengths, five seeds, equal tokens. Every run is kept in
`benchmarks/out/mixtures/<setting>-<steps>.json` as soon as it is finished, and is not run again while its rule has the
same settings: what is interrupted goes on, on this machine or another. `--report` makes the tables from what is there.

`mixture_verdicts.py` says how a rule is judged. RESULTS.md has the tables, docs/images the pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import mixture_run
from harness import Row, publish, row
from mixture_settings import SETTINGS, prepare
from mixture_verdicts import EQUAL, FRONTIER, figures

from ddk.mixture import MixtureConfig
from tasks.comparing.data import ComparedRun, ComparedVariant, Comparison
from tasks.comparing.plots import frontier_figure
from tasks.reporting.plots import as_png

CHECKOUT = Path(__file__).resolve().parents[1]
RETAIN = {
    f"mixture.{name}": MixtureConfig.model_fields[name].default
    for name in ("retain_alpha", "retain_temperature", "retain_weight", "retain_tolerance")
}
"""Spelt out, so that runs with other defaults are run again."""
RULES: dict[str, dict[str, Any]] = {
    EQUAL: {"method": "ddk_equal"},
    **{f"ddk {alpha:g}": {"method": "ddk", "mixture.alpha": alpha} for alpha in (0.1, 0.25, 0.5, 0.75)},
    "retain": {"method": "ddk_retain", **RETAIN},
    "retain γ=1": {"method": "ddk_retain", "loss.gamma": 1.0, **RETAIN},
    "retain γ=1 κ=8": {"method": "ddk_retain", "loss.gamma": 1.0, **RETAIN, "mixture.retain_weight": 8.0},
    "velocity": {"method": "ddk", "trial": "velocity"},
    "slope": {"method": "ddk", "trial": "slope"},
    "kept slope γ=1": {"method": "ddk", "trial": "kept slope", "loss.gamma": 1.0, **RETAIN},
    "equal γ=1": {"method": "ddk_equal", "loss.gamma": 1.0},
    "equal KL>0.5 nats": {"method": "ddk_equal", "loss.min_entropy": 0.5},
}
LENGTHS = (150, 600)
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Job:
    setting: str
    steps: int
    rule: str
    seed: int


def main() -> int:
    asked = _arguments()
    if not asked.report:
        settings = [one for one in asked.setting if one != "eight" or asked.corpora is not None]
        if settings != asked.setting:
            print("the setting 'eight' is left out: it reads a folder of corpora, which --corpora names")
        run_missing(settings, asked)
    kept = [read(setting, steps) for setting, steps in _kept()]
    draw(kept)
    holds = publish("mixtures", "make bench-mixtures", [one for comparison in kept for one in rows(comparison)])
    return 0 if holds else 1


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=CHECKOUT / "build" / "bench-mixtures", help="of models and stores")
    parser.add_argument("--corpora", type=Path, help="folder with <domain>/train.jsonl and validation.jsonl")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="by default all")
    parser.add_argument("--steps", type=numbers, default=list(LENGTHS), help="lengths of a run, e.g. 150")
    parser.add_argument("--seeds", type=numbers, default=list(SEEDS), help="e.g. 0,1")
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES), help="e.g. equal,ddk 0.5")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, with a thread each")
    parser.add_argument("--report", action="store_true", help="run nothing; make the tables")
    asked = parser.parse_args()
    asked.setting = asked.setting or list(SETTINGS)
    return asked


def run_missing(settings: Sequence[str], asked: argparse.Namespace) -> None:
    """Run what is not kept yet, seed by seed, so that what is there is whole for as many seeds as possible."""
    jobs = [
        Job(setting, steps, rule, seed)
        for steps, seed, setting, rule in itertools.product(asked.steps, asked.seeds, settings, asked.rules)
        if not _is_kept(Job(setting, steps, rule, seed))
    ]
    # 'three' reads a part of what 'five' does.
    for setting in dict.fromkeys("five" if job.setting == "three" else job.setting for job in jobs):
        prepare(setting, asked.root, asked.corpora)
    print(f"{len(jobs)} runs to do, {asked.workers} at once")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(asked.workers, mp_context=context) as pool:
        waiting = {
            pool.submit(
                mixture_run.run, job.setting, job.steps, job.rule, RULES[job.rule], job.seed, str(asked.root)
            ): job
            for job in jobs
        }
        for number, done in enumerate(as_completed(waiting), start=1):
            keep(waiting[done], done.result())
            print(f"{number} of {len(jobs)}: {waiting[done]}", flush=True)


def _path(setting: str, steps: int) -> Path:
    return Path(harness.OUT) / "mixtures" / f"{setting}-{steps}.json"


def read(setting: str, steps: int) -> Comparison:
    """What is kept; empty at first."""
    path = _path(setting, steps)
    if path.exists():
        return Comparison.model_validate_json(path.read_text(encoding="utf-8"))
    return Comparison(name=f"{setting}-{steps}", baseline=EQUAL, seeds=(), domains=(), variants=(), runs=())


def _is_kept(job: Job) -> bool:
    return any((run.variant, run.seed) == (job.rule, job.seed) for run in _valid(read(job.setting, job.steps)))


def _valid(kept: Comparison) -> list[ComparedRun]:
    """The runs whose rule has the same settings today."""
    same = {one.name for one in kept.variants if one.name not in RULES or one.settings == _settings(one.name)}
    return [run for run in kept.runs if run.variant in same]


def _settings(rule: str) -> dict[str, str]:
    return {field: json.dumps(value) for field, value in RULES[rule].items()}


def keep(job: Job, run: ComparedRun) -> None:
    """Add a run; those of a rule under other settings go."""
    kept = read(job.setting, job.steps)
    runs = {(one.variant, one.seed): one for one in [*_valid(kept), run]}
    variants = {one.name: one for one in kept.variants} | {
        name: ComparedVariant(name=name, method=fields["method"], settings=_settings(name))
        for name, fields in RULES.items()
    }
    ran = {variant for variant, _ in runs}
    order = [name for name in dict.fromkeys([*RULES, *variants]) if name in ran]
    comparison = kept.model_copy(
        update={
            "seeds": tuple(sorted({seed for _, seed in runs})),
            "domains": tuple(run.records[0].perplexities),
            "variants": tuple(variants[name] for name in order),
            "runs": tuple(runs[key] for key in sorted(runs, key=lambda key: (order.index(key[0]), key[1]))),
        }
    )
    path = _path(job.setting, job.steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(comparison.model_dump_json(exclude_defaults=True) + "\n", encoding="utf-8")
    part.replace(path)


def rows(comparison: Comparison) -> Iterator[Row]:
    """A row for each figure of each rule that is not on DDK's frontier itself."""
    for variant in comparison.variants:
        if variant.name not in FRONTIER:
            for figure in figures(comparison, variant.name):
                if figure.by_seed:
                    name = f"{comparison.name}, {variant.name}: {figure.what}"
                    yield row(name, list(figure.by_seed.values()), figure.unit, figure.limit, figure.relation)


def draw(kept: Sequence[Comparison]) -> None:
    """docs/images/mixtures-<setting>-<steps>.png, of all that are kept."""
    for comparison in kept:
        path = CHECKOUT / "docs" / "images" / f"mixtures-{comparison.name}.png"
        path.write_bytes(as_png(frontier_figure(comparison)))


def _kept() -> list[tuple[str, int]]:
    return [(setting, steps) for setting in SETTINGS for steps in LENGTHS if _path(setting, steps).exists()]


if __name__ == "__main__":
    raise SystemExit(main())
