"""Our own numbers: the paper's methods, and ways to keep a teacher, on the quickstart's models and corpora.

    make bench-methods                                   all parts, about four hours on two idle cores
    .venv/bin/python benchmarks/bench_methods.py --part methods

Comparisons, each by `ddk compare` on one configuration, with equal tokens and learning rates:

    methods       cpt, cpt_doremi, kd, minillm, ddk_equal, ddk_no_smoothing, ddk, and fixed mixtures
    targets       kd from k = 8, 16, 64 kept tokens with each treatment of the tail, and from random draws, beside
                  kd from the teacher's whole distribution (k = the vocabulary) and cross-entropy alone
    sensitivity   ddk with other intervals K and smoothing coefficients α, beside equal sampling
    long          ddk and equal sampling, four times as many steps
    fast          likewise, at three times the learning rate
    level         likewise, on three domains whose gaps are nearly equal from the start

The runs lie below `--root` and are resumed: what is complete is not run again. What they measured is kept whole in
`benchmarks/out/comparisons/`; rows and RESULTS.md are made from that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import harness
import yaml
from harness import Row, publish, row
from target_deviation import deviations

from flows.config import load_config
from tasks.comparing.data import Comparison, Measure, by_seed
from tasks.comparing.report import read_comparison

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PRESETS = os.path.join(CHECKOUT, "flows", "presets")
DOMAINS = ("math", "code", "books", "web", "zh_books")
DENSE = "dense"
VOCABULARY = 4090
"""Of the quickstart's tokenizer: as many tokens are its teacher's whole distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One call of `ddk compare`."""

    name: str
    seeds: str
    methods: tuple[str, ...]
    baseline: str
    settings: dict[str, object]
    variants: dict[str, dict[str, object]] = field(default_factory=dict)
    domains: tuple[str, ...] = DOMAINS

    def only(self, names: str | None) -> Study:
        """With these variants alone, and the baseline; all for None."""
        if names is None:
            return self
        wanted = {*names.split(","), self.baseline}
        methods = tuple(method for method in self.methods if method in wanted) or self.methods[:1]
        variants = {name: fields for name, fields in self.variants.items() if name in wanted}
        return replace(self, methods=methods, variants=variants)

    def smaller(self, steps: int | None, blocks: int | None) -> Study:
        """With so many steps, and blocks to train on in each domain; None: as many as it has."""
        fewer: dict[str, object] = {} if steps is None else {"train.steps": steps}
        if blocks is not None:
            fewer |= {f"domains.{domain}.max_train_blocks": blocks for domain in self.domains}
        return replace(self, settings={**self.settings, **fewer})

    def command(self, root: str, seeds: str | None) -> list[str]:
        return [
            *(sys.executable, "-m", "flows", "compare", self._config(root)),
            *("--root", root, "--name", self.name, "--seeds", seeds or self.seeds),
            *("--methods", ",".join(self.methods), "--baseline", self.baseline),
            *(part for field, value in self.settings.items() for part in ("--set", f"{field}={json.dumps(value)}")),
            *(part for name, fields in self.variants.items() for part in ("--variant", _by_hand(name, fields))),
        ]

    def _config(self, root: str) -> str:
        """The quickstart's, with fewer domains where the study has fewer."""
        path = os.path.join(PRESETS, "quickstart.yaml")
        if self.domains == DOMAINS:
            return path
        config = load_config(path, (), root).model_dump(mode="json")
        config["domains"] = {domain: config["domains"][domain] for domain in self.domains}
        os.makedirs(root, exist_ok=True)
        path = os.path.join(root, f"{self.name}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file)
        return path


def _by_hand(name: str, fields: dict[str, object]) -> str:
    return f"{name}: " + "; ".join(f"{field}={json.dumps(value)}" for field, value in fields.items())


def _fixed() -> dict[str, dict[str, object]]:
    """The mixture that the student was pre-trained on, and two that turn it round."""
    with open(os.path.join(PRESETS, "quickstart", "assets.json"), encoding="utf-8") as file:
        pretrained = json.load(file)["student"]["recipe"]["mixture"]
    lagging = ("math", "code", "zh_books")
    mixtures = {
        "as pre-trained": pretrained,
        "three quarters lagging": {domain: 2 if domain in lagging else 1 for domain in DOMAINS},
        "nine tenths lagging": {domain: 6 if domain in lagging else 1 for domain in DOMAINS},
    }
    return {f"fixed {name}": {"method": "kd", "mixture.weights": of} for name, of in mixtures.items()}


def _targets() -> dict[str, dict[str, object]]:
    kd: dict[str, object] = {"method": "kd"}
    found = {
        f"k={k} {tail}": {**kd, "teacher.k": k, "loss.tail": tail}
        for k in (8, 16, 64)
        for tail in ("bucket", "renormalise", "residual")
    }
    for draws in (16, 50):
        found[f"{draws} draws"] = {**kd, "teacher.k": 8, "teacher.draws": draws, "loss.tail": "sampled"}
    # So fine a grid that nothing is lost by it, and small shards, as a position has 4,090 entries.
    exact = {"teacher.k": VOCABULARY, "teacher.codec.levels": 65534, "teacher.shard_blocks": 16}
    return {DENSE: {**kd, **exact}, **found}


def _settings(
    train_blocks: int | None, validation_blocks: int, domains: tuple[str, ...] = DOMAINS
) -> dict[str, object]:
    """150 steps of 16 blocks of 256 positions, an interval of 25."""
    blocks = {
        f"domains.{domain}.{limit}": value
        for domain in domains
        for limit, value in (("max_train_blocks", train_blocks), ("max_validation_blocks", validation_blocks))
    }
    return {**blocks, "train.steps": 150, "train.warmup_steps": 15, "mixture.interval": 25}


def _of_two(name: str, settings: dict[str, object], domains: tuple[str, ...] = DOMAINS) -> Study:
    """What decides whether DDK wins: the same, but for these settings."""
    return Study(
        name=name,
        seeds="0,1,2",
        methods=("ddk", "ddk_equal"),
        baseline="ddk",
        settings={**_settings(None, 64, domains), **settings},
        domains=domains,
    )


STUDIES = {
    "methods": Study(
        name="methods",
        seeds="0,1,2,3,4",
        methods=("cpt", "cpt_doremi", "kd", "minillm", "ddk_equal", "ddk_no_smoothing", "ddk"),
        baseline="ddk",
        settings=_settings(None, 64),  # every block that the corpora give, so that kd draws by their sizes
        variants=_fixed(),
    ),
    "targets": Study(
        name="targets",
        seeds="0,1,2",
        methods=("cpt",),
        baseline=DENSE,
        # At γ = 1 the student follows the targets as much as the text, and shows more of what they lack.
        settings={**_settings(192, 32), "loss.gamma": 1.0, "teacher.k": 8},
        variants=_targets(),
    ),
    "sensitivity": Study(
        name="sensitivity",
        seeds="0,1,2",
        methods=("ddk", "ddk_equal"),
        baseline="ddk",
        settings=_settings(None, 64),
        variants={
            **{f"ddk, K = {steps}": {"method": "ddk", "mixture.interval": steps} for steps in (10, 50, 75)},
            **{f"ddk, α = {alpha:g}": {"method": "ddk", "mixture.alpha": alpha} for alpha in (0.25, 0.75, 1.0)},
        },
    ),
    "long": _of_two("long", {"train.steps": 600, "train.warmup_steps": 60, "mixture.interval": 25}),
    "fast": _of_two("fast", {"train.learning_rate": 3e-3, "train.min_learning_rate": 1.5e-4}),
    "level": _of_two("level", {}, ("math", "code", "zh_books")),
}


def main() -> int:
    asked = _arguments()
    harness.OUT = asked.out
    kept = os.path.join(asked.out, "comparisons")
    os.makedirs(kept, exist_ok=True)
    failed = False
    for name in asked.part:
        study = STUDIES[name].only(asked.only).smaller(asked.steps, asked.blocks)
        failed |= subprocess.run(study.command(asked.root, asked.seeds), check=False).returncode != 0
        comparison = read_comparison(asked.root, name)
        _keep(os.path.join(kept, f"{name}.json"), comparison.model_dump_json().replace(asked.root, "root"))
        if name == "targets":
            student = os.path.join(PRESETS, "quickstart", "student")
            found = deviations(asked.root, comparison, DENSE, student)
            _keep(os.path.join(kept, "deviation.json"), json.dumps(found))
    holds = publish("methods", asked.called, list(rows(kept)))
    return 0 if holds and not failed else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=os.path.join(CHECKOUT, "build", "bench-methods"), help="of stores and runs")
    parser.add_argument("--part", action="append", choices=sorted(STUDIES), help="by default all")
    parser.add_argument("--seeds", help="other ones, e.g. 0,1")
    parser.add_argument("--only", help="these variants alone, e.g. ddk,kd, to try it")
    parser.add_argument("--steps", type=int, help="fewer or more, to try it")
    parser.add_argument("--blocks", type=int, help="to train on in each domain, fewer to try it")
    parser.add_argument("--out", default=harness.OUT, help="folder of the results")
    parser.add_argument("--called", default="make bench-methods", help="how it was run, for the record")
    asked = parser.parse_args()
    asked.part = asked.part or list(STUDIES)
    asked.root, asked.out = os.path.abspath(asked.root), os.path.abspath(asked.out)
    return asked


def _keep(path: str, text: str) -> None:
    """Without the names of this machine's folders; runs may have been begun from another checkout."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(re.sub(r"/[\w./-]*/flows/presets/", "flows/presets/", text) + "\n")


def rows(kept: str) -> Iterator[Row]:
    """From what is kept of the parts that have been run."""
    for name in STUDIES:
        comparison = _kept(os.path.join(kept, f"{name}.json"))
        if comparison is None:
            continue
        if name == "targets":
            with open(os.path.join(kept, "deviation.json"), encoding="utf-8") as file:
                yield from _target_rows(comparison, json.load(file))
        else:
            yield from _method_rows(comparison)


def _kept(path: str) -> Comparison | None:
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return Comparison.model_validate_json(file.read())


def _method_rows(comparison: Comparison) -> Iterator[Row]:
    """How long a run takes, and the method's claim: that equal sampling is worse. All else stands in the tables."""
    seconds = [run.training_seconds for run in comparison.runs if run.counts and run.training_seconds is not None]
    yield row(f"{comparison.name}: training time of a run", seconds, "s")
    if comparison.name != "methods":
        return
    for what, measure in (("mean ratio", Measure(name="ratio")), ("largest ratio", Measure(name="worst_ratio"))):
        ddk, equal = (by_seed(comparison, name, measure) for name in ("ddk", "ddk_equal"))
        pairs = [equal[seed] - ddk[seed] for seed in ddk if seed in equal]
        if pairs:
            yield row(f"methods: ddk_equal − ddk, {what}", pairs, "", 0.0, ">")


def _target_rows(comparison: Comparison, found: dict[str, dict[str, list[float]]]) -> Iterator[Row]:
    measure = Measure(name="perplexity")
    base = by_seed(comparison, comparison.baseline, measure)
    for variant in comparison.variants:
        values = by_seed(comparison, variant.name, measure)
        ratios = [values[seed] / base[seed] for seed in values if seed in base]
        if ratios and variant.name != comparison.baseline:
            yield row(f"targets, {variant.name}: perplexity / dense kd's", ratios, "x")
    for name, of in found.items():
        if name != comparison.baseline:
            yield row(f"targets, {name}: gradient's deviation from dense", of["gradient"], "")


if __name__ == "__main__":
    sys.exit(main())
