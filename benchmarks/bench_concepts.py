"""Evaluate, train on the weak concepts, evaluate: does `mixture.follow: accuracy` mend what a student lacks?

    make bench-concepts        about twenty minutes on one core; what has been run is kept below build/bench-concepts

Facts about numbers by concept (concept_facts.py). The teacher was trained on all concepts alike; the student on
addition and on both concepts of order, with next to nothing of the three others. The code of `ddk eval` asks both; then
the student is distilled with each mixture, for the same number of steps, and asked again:

    equal   every concept equally often (ddk_equal)         accuracy   mixture.follow: accuracy
    gap     DDK, by perplexities                            both       mixture.follow: both
    both, retain    mixture.follow: both, with the method ddk_retain

Weak concepts are those that the student lacks by its making, not by what was measured. Five seeds; differences are
paired by seed, with their 95% interval.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import concept_facts as made
import yaml
from harness import Row, publish, row
from in_process import train, with_fields

from ddk.concepts import rolled_up_tallies
from flows.config import Config, load_config
from storage.files.digests import DigestCache
from storage.runs.evaluations import EvaluationFolder, concepts_of
from tasks.comparing.spreads import paired_difference
from tasks.evaluation.evaluate_model import Evaluation, evaluate_model
from tasks.evaluation.local_files import OWN, DataFolder
from tasks.evaluation.models import EvaluatedModel
from tasks.evaluation.names import Benchmark, EvaluationConfig
from tasks.evaluation.questions import Measure, build_measures
from tasks.planning.models import tokenizer_digests, weight_digests
from tasks.reporting.scores import report_evaluation
from tasks.teachers.config import TeacherConfig

CHECKOUT = Path(__file__).resolve().parents[1]
BUILD = CHECKOUT / "build" / "bench-concepts"
WEAK = ("arithmetic/subtraction", "arithmetic/multiplication", "arithmetic/remainder")
STRONG = tuple(concept for concept in made.CONCEPTS if concept not in WEAK)
STEPS, INTERVAL, SEEDS = 400, 40, (0, 1, 2, 3, 4)
FIRST = "first"
"""The run whose evaluation the mixtures follow."""
FOLLOWED = {"mixture.accuracy_run": FIRST, "mixture.accuracy_model": "before"}
RULES: dict[str, dict[str, Any]] = {
    "equal": {"method": "ddk_equal"},
    "accuracy": {"method": "ddk", "mixture.follow": "accuracy", **FOLLOWED},
    "gap": {"method": "ddk"},
    "both": {"method": "ddk", "mixture.follow": "both", **FOLLOWED},
    "both, retain": {"method": "ddk_retain", "mixture.follow": "both", **FOLLOWED},
}


def main() -> int:
    prepare()
    config = load_config(str(BUILD / "config.yaml"))
    measures = asked()
    ask(config, measures, FIRST, {"before": BUILD / "student", "teacher": BUILD / "teacher"})
    for seed in SEEDS:
        for rule, fields in RULES.items():
            run(config, measures, rule, fields, seed)
    return 0 if publish("concepts", "make bench-concepts", list(rows(config.root))) else 1


def make_models() -> None:
    """Texts and models; left as they are where they are there."""
    made.write_texts(BUILD / "texts")
    lacking = {concept: 0.01 if concept in WEAK else (1 - 0.01 * len(WEAK)) / len(STRONG) for concept in made.CONCEPTS}
    alike = dict.fromkeys(made.CONCEPTS, 1 / len(made.CONCEPTS))
    if not (BUILD / "student" / "tokenizer.json").exists():
        made.make_model(BUILD / "student", lacking, hidden=64, layers=2, steps=450, rate=5e-3)
    if not (BUILD / "teacher" / "tokenizer.json").exists():
        made.make_model(BUILD / "teacher", alike, hidden=96, layers=3, steps=500, rate=3e-3)


def prepare() -> None:
    """Models, blocks and targets; left as they are where they are there."""
    make_models()
    config = {
        "run": "concepts",
        "root": "./root",
        "domains": {
            concept: {
                **{split: f"texts/{concept}/{split}.jsonl" for split in ("train", "validation")},
                "text_field": "answer",
                "prompt_field": "question",
                "max_train_blocks": 800,
                "max_validation_blocks": 40,
            }
            for concept in made.CONCEPTS
        },
        "packing": {"seq_len": made.SEQ_LEN},
        "teacher": {"model": "./teacher", "k": 16, "dtype": "float32"},
        "student": {"model": "./student"},
        "train": {
            "steps": STEPS,
            "batch_size": 24,
            "micro_batch_size": 24,
            "warmup_steps": 10,
            "device": "cpu",
            "learning_rate": 2e-3,
            "min_learning_rate": 2e-4,
        },
        "mixture": {"interval": INTERVAL},
    }
    (BUILD / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = BUILD / "prepared"
    if done.exists():
        return
    for stage in ("pack", "cache"):
        subprocess.run([sys.executable, "-m", "flows", stage, str(BUILD / "config.yaml")], check=True)
    done.touch()


def asked() -> list[Measure]:
    """The questions, with their paths, as `ddk eval --data` reads them."""
    folder = DataFolder(str(BUILD / "texts" / "questions"), "concept")
    return build_measures([Benchmark(OWN)], folder=folder, completions=lambda domain: (), limit=None, seed=1234)


def ask(config: Config, measures: list[Measure], run_name: str, folders: Mapping[str, Path]) -> None:
    """Put models to the questions, and keep their answers with the run."""
    evaluation = Evaluation(measures, EvaluationFolder(config.root, run_name), EvaluationConfig(backend="hf"))
    digests = DigestCache(str(Path(config.root) / "digests.json"))
    for role, folder in folders.items():
        place = str(folder)
        model = EvaluatedModel(
            role=role,  # type: ignore[arg-type]
            engine=TeacherConfig(model=place),
            tokenizer=place,
            digests={
                "weights": weight_digests(place, digests, "model"),
                "tokenizer": tokenizer_digests(place, digests),
            },
        )
        evaluate_model.fn(evaluation, model)
    report_evaluation(config.root, run_name)


def name_of(rule: str, seed: int) -> str:
    return f"{rule.replace(', ', '-')}-{STEPS}-{seed}"


def run(config: Config, measures: list[Measure], rule: str, fields: Mapping[str, Any], seed: int) -> None:
    """Train one student and ask it; nothing where that has been done."""
    name = name_of(rule, seed)
    if any(one["model"] == "student" for one in EvaluationFolder(config.root, name).records()):
        return
    student = BUILD / "students" / name
    records = train(with_fields(config, {**fields, "run": name, "seed": seed}), export=str(student))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILD / "student" / file, student / file)
    shares = {concept: f"{p:.2f}" for concept, p in records[-1].probabilities.items()}
    print(f"{name}: last mixture {json.dumps(shares)}", flush=True)
    ask(config, measures, name, {"student": student})
    shutil.rmtree(student)


def accuracies(root: str, run_name: str, role: str) -> dict[str, float]:
    """By concept, and by concept with `/new` and `/seen`."""
    (record,) = [one for one in EvaluationFolder(root, run_name).records() if one["model"] == role]
    tallies = {path: by_metric["acc,none"] for path, by_metric in concepts_of(record).items()}
    return {node: tally.accuracy for node, tally in rolled_up_tallies(tallies).items()}


def rows(root: str) -> Iterator[Row]:
    """Accuracies by concept, then what each mixture gains over equal sampling, and whether the others hold."""
    before, teacher = accuracies(root, FIRST, "before"), accuracies(root, FIRST, "teacher")
    after = {rule: {seed: accuracies(root, name_of(rule, seed), "student") for seed in SEEDS} for rule in RULES}
    for concept in made.CONCEPTS:
        kind = "weak" if concept in WEAK else "strong"
        yield row(f"{concept} ({kind}): student before", [100 * before[concept]], "%")
        yield row(f"{concept} ({kind}): teacher", [100 * teacher[concept]], "%")
        for rule, by_seed in after.items():
            yield row(f"{concept} ({kind}): {rule}", [100 * found[concept] for found in by_seed.values()], "%")
    groups = {
        "weak concepts": WEAK,
        "strong concepts": STRONG,
        "all concepts": made.CONCEPTS,
        "weak concepts, new facts": tuple(f"{concept}/new" for concept in WEAK),
    }
    mean = {
        rule: {
            group: {seed: _mean(found, concepts) for seed, found in by_seed.items()}
            for group, concepts in groups.items()
        }
        for rule, by_seed in after.items()
    }
    for rule in RULES:
        for group, concepts in groups.items():
            start = _mean(before, concepts)
            gained = [value - start for value in mean[rule][group].values()]
            bar = {"strong concepts": -3.0}.get(group) if rule == "accuracy" else None
            yield row(f"{rule}, {group}: gained since before", gained, "points", bar, ">")
    for rule in [one for one in RULES if one != "equal"]:
        for group in groups:
            found = paired_difference(mean[rule][group], mean["equal"][group])
            if found is None or found.low is None or found.high is None:
                continue
            differences = [mean[rule][group][seed] - mean["equal"][group][seed] for seed in SEEDS]
            yield row(f"{rule} − equal, {group}", differences, "points")
            bar = 0.0 if (rule, group) == ("accuracy", "weak concepts") else None
            yield row(f"{rule} − equal, {group}: interval from", [found.low], "points", bar, ">")
            yield row(f"{rule} − equal, {group}: interval to", [found.high], "points")


def _mean(found: Mapping[str, float], concepts: tuple[str, ...]) -> float:
    """In percent, over the concepts."""
    return 100 * sum(found[concept] for concept in concepts) / len(concepts)


if __name__ == "__main__":
    raise SystemExit(main())
