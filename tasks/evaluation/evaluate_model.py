"""Runs the benchmarks of one model, one at a time; stored results are reused.

When a benchmark (or a part of one) is done, a record is written in the run's folder, named by a key over model,
questions, scoring and engine. A kill therefore costs only the part in flight, and a second call finds all results.
Programs that a model wrote are stored with its answers, and executed if that is allowed, even later without asking the
model again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.files import uri
from storage.fingerprint import fingerprint
from storage.runs.evaluations import EvaluationFolder, record_name
from tasks.evaluation.code_execution import executed, program_of, read_back, stored
from tasks.evaluation.concepts import labelled, tallied, together
from tasks.evaluation.models import BACKENDS, Backend, EvaluatedModel, require_harness, running
from tasks.evaluation.names import EvaluationConfig
from tasks.evaluation.questions import CODE_TASKS, Measure, Part
from tasks.showing.progress import logger, meter

_BOOTSTRAP = 100
"""Samples for the error of the few metrics that are no mean."""
ASKING_VERSION = 2
"""Of how models are asked; raised where the same model would answer otherwise. 2: by the harness's own models, which
count padded rows of a vocabulary among its tokens."""


class Evaluation:
    """What one call evaluates: the benchmarks with their questions, and where results go.

    Args:
        measures: of `tasks.evaluation.questions.build_measures`.
        folder: of the run.
        config: what was asked for.
    """

    def __init__(self, measures: Sequence[Measure], folder: EvaluationFolder, config: EvaluationConfig) -> None:
        self.measures = tuple(measures)
        self.folder = folder
        self.config = config
        self.harness = require_harness()

    def question(self, part: Part) -> dict[str, Any]:
        """The inputs that determine a part's score, apart from the model; scores with equal inputs are comparable."""
        return {
            "task": part.name,
            "shots": part.shots,
            "requests": part.requests,
            "scoring": part.scoring,
            "limit": self.config.limit,
            "harness": f"lm_eval {self.harness}",
            "asking": ASKING_VERSION,
            "seed": self.config.seed,
        }

    def identity(self, part: Part, model: EvaluatedModel, backend: Backend) -> dict[str, Any]:
        """Everything that determines a part's score."""
        return {"model": model.identity(backend), **self.question(part)}

    def name(self, measure: Measure, part: Part, model: EvaluatedModel, backend: Backend) -> str:
        key = fingerprint(self.identity(part, model, backend))
        return record_name(part.name, key, measure.name if measure.group is not None else None)

    def backend(self, part: Part, model: EvaluatedModel) -> Backend:
        return model.backend(self.config.backend, generates=part.generates)


@task(task_run_name="evaluate {model.role}", cache_policy=NO_CACHE, persist_result=False)
def evaluate_model(evaluation: Evaluation, model: EvaluatedModel) -> dict[str, Any]:
    """Answer what is not answered yet, and execute what may be.

    Returns:
        `{"model", "asked", "found"}`: how many parts were asked now, and how many were there.

    Raises:
        UserError: the model cannot be loaded, or its programs cannot be isolated.
    """
    parts = [(measure, part) for measure in evaluation.measures for part in measure.parts]
    missing = [(measure, part) for measure, part in parts if _stored(evaluation, measure, part, model) is None]
    # An engine is started once: first everything that transformers runs, then everything that vLLM does.
    for backend in BACKENDS:
        mine = [(measure, part) for measure, part in missing if evaluation.backend(part, model) == backend]
        if mine:
            _ask_all(evaluation, model, backend, mine)
    for measure, part in parts:
        _execute(evaluation, measure, part, model)
        _label(evaluation, measure, part, model)
    for measure in evaluation.measures:
        if measure.group is not None:
            _write_group(evaluation, measure, model)
    done = {"model": model.role, "asked": len(missing), "found": len(parts) - len(missing)}
    logger.info("evaluate %s: %d asked now, %d known before", model.role, done["asked"], done["found"])
    return done


def _stored(evaluation: Evaluation, measure: Measure, part: Part, model: EvaluatedModel) -> dict[str, Any] | None:
    name = evaluation.name(measure, part, model, evaluation.backend(part, model))
    return evaluation.folder.find(model.role, name)


def _ask_all(
    evaluation: Evaluation, model: EvaluatedModel, backend: Backend, parts: Sequence[tuple[Measure, Part]]
) -> None:
    requests = sum(len(part.task.instances) for _, part in parts)
    seed = evaluation.config.seed
    with (
        meter(f"evaluate {model.role}", requests, "requests") as progress,
        running(model, backend, seed=seed, on_progress=progress.advance) as lm,
    ):
        for measure, part in parts:
            started = time.monotonic()
            metrics, samples = _answers(part, lm, evaluation.config)
            record = {
                **_described(evaluation, part.name, measure, model),
                "identity": evaluation.identity(part, model, backend),
                "question": fingerprint(evaluation.question(part)),
                "shots": part.shots,
                "asked": part.asked,
                "available": part.available,
                "source": part.source,
                "metrics": metrics,
                "seconds": round(time.monotonic() - started, 3),
            }
            evaluation.folder.write(model.role, evaluation.name(measure, part, model, backend), record, samples)
            if measure.group is None:
                logger.info("evaluate %s: %s %s", model.role, part.name, _readable(metrics))


def _described(evaluation: Evaluation, name: str, measure: Measure, model: EvaluatedModel) -> dict[str, Any]:
    return {
        "model": model.role,
        "task": name,
        "group": measure.name if measure.group is not None else None,
        "limit": evaluation.config.limit,
        "measured_at": round(time.time(), 3),
    }


def _answers(part: Part, lm: Any, config: EvaluationConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics, and every answer."""
    # The requests are built again, from the same random state.
    part.task.set_fewshot_seed(seed=config.seed)
    results = lm_eval.evaluate(
        lm=lm,
        task_dict={"tasks": {part.name: part.task}},
        limit=config.limit,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=True,
    )
    higher = results["higher_is_better"].get(part.name, {})
    return _metrics(results["results"][part.name], higher), _samples(part, results["samples"][part.name])


def _metrics(found: Mapping[str, Any], higher: Mapping[str, bool]) -> dict[str, Any]:
    """`{"acc,none": {"value", "stderr", "higher_is_better"}}`; a metric behind which stands how answers were read."""
    metrics = {}
    for key, value in found.items():
        name, comma, how = key.partition(",")
        if comma and not name.endswith("_stderr") and name != "bypass":
            error = found.get(f"{name}_stderr,{how}")
            better = higher.get(name, True)
            metrics[key] = {"value": _finite(value), "stderr": _finite(error), "higher_is_better": better is not False}
    return metrics


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _samples(part: Part, logged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    samples = []
    for sample in logged:
        kept = {
            "question": sample["doc_id"],
            "target": sample["target"],
            "answer": sample["filtered_resps"],
            "filter": sample["filter"],
            **{name: sample[name] for name in sample["metrics"] if name != "bypass"},
        }
        if part.name in CODE_TASKS:
            kept["program"] = stored(program_of(part.name, sample["doc"], str(sample["filtered_resps"][0])))
        samples.append(kept)
    return samples


def _execute(evaluation: Evaluation, measure: Measure, part: Part, model: EvaluatedModel) -> None:
    """Score the programs of a code task, where that is allowed and has not been done."""
    allowed = evaluation.config.allow_code
    if part.name not in CODE_TASKS or allowed == "no":
        return
    name = evaluation.name(measure, part, model, evaluation.backend(part, model))
    record, samples = evaluation.folder.find(model.role, name), evaluation.folder.samples(model.role, name)
    if record is None or samples is None or record["metrics"]:
        return
    logger.info("evaluate %s: executing %d programs of %s (%s)", model.role, len(samples), part.name, allowed)
    place = f"{uri.join(evaluation.folder.url, model.role, name)}.samples.jsonl"
    programs = [read_back(sample.get("program"), place) for sample in samples]
    metric, outcomes = executed(programs, isolated=allowed == "isolated")
    samples = [{**sample, "outcome": outcome} for sample, outcome in zip(samples, outcomes, strict=True)]
    record = {**record, "metrics": {"pass@1": metric}, "executed": allowed}
    evaluation.folder.write(model.role, name, record, samples)
    logger.info("evaluate %s: %s %s", model.role, part.name, _readable(record["metrics"]))


def _label(evaluation: Evaluation, measure: Measure, part: Part, model: EvaluatedModel) -> None:
    """Keep with the scores what they are by concept, where the questions have paths."""
    name = evaluation.name(measure, part, model, evaluation.backend(part, model))
    record = evaluation.folder.find(model.role, name) if part.paths else None
    samples = evaluation.folder.samples(model.role, name) if record is not None else None
    if record is None or samples is None:
        return
    changed = labelled(record, tallied(samples, part.paths, list(record["metrics"])))
    if changed is not None:
        evaluation.folder.write(model.role, name, changed, samples)


def _write_group(evaluation: Evaluation, measure: Measure, model: EvaluatedModel) -> None:
    """The score of a task with parts, from the parts' scores."""
    records = {part.name: _stored(evaluation, measure, part, model) for part in measure.parts}
    found = {
        name: {
            "sample_len": record["asked"],
            **{key: metric["value"] for key, metric in record["metrics"].items()},
            **{
                key.replace(",", "_stderr,"): "N/A" if metric["stderr"] is None else metric["stderr"]
                for key, metric in record["metrics"].items()
            },
        }
        for name, record in records.items()
        if record is not None
    }
    higher = {key.partition(",")[0]: True for metrics in found.values() for key in metrics}
    keys = {part.name: evaluation.name(measure, part, model, evaluation.backend(part, model)) for part in measure.parts}
    identity = {"task": measure.name, "parts": keys, "scoring": str(measure.group.aggregate_metric_list)}
    record = {
        **_described(evaluation, measure.name, measure, model),
        "identity": identity,
        "question": fingerprint({part.name: evaluation.question(part) for part in measure.parts}),
        "shots": measure.parts[0].shots,
        "asked": sum(part.asked for part in measure.parts),
        "available": sum(part.available for part in measure.parts),
        "source": measure.parts[0].source,
        "metrics": _metrics(measure.group.aggregate(found), higher),
        "parts": len(measure.parts),
    }
    name = record_name(measure.name, fingerprint(identity))
    tallies = together(one for one in records.values() if one is not None)
    stored_before = evaluation.folder.find(model.role, name)
    if stored_before is None:
        evaluation.folder.write(model.role, name, labelled(record, tallies) or record)
        logger.info("evaluate %s: %s %s", model.role, measure.name, _readable(record["metrics"]))
    elif (changed := labelled(stored_before, tallies)) is not None:
        evaluation.folder.write(model.role, name, changed)


def _readable(metrics: Mapping[str, Any]) -> str:
    shown = [
        f"{key.removesuffix(',none')} {metric['value']:.4f}"
        for key, metric in metrics.items()
        if metric["value"] is not None
    ]
    return ", ".join(shown) or "answered; programs are executed with --allow-code"
