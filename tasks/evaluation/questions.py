"""Benchmarks as tasks of lm-evaluation-harness: their questions, prompts and scoring, before any model is there.

Imports the harness; import this module within functions only, after `tasks.evaluation.models.require_harness`.

- A task whose file lies in the data folder is the harness's own definition with those rows in place of the hub's.
- Any other comes from the hub, as the harness defines it.
- `humaneval` and `mbpp` are the harness's definitions without their scoring, which would execute programs in this very
  process: here the answers are kept, and executed in `tasks.evaluation.sandbox` where that is allowed.
- `c3`, which the harness lacks, `own_questions` (questions of one's own) and `completion` are defined here.

The requests of a benchmark (prompt, continuation or stop texts, answer) are built once and hashed. The hash is
therefore known before a model is loaded, and a later version of a data set counts as another benchmark.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ddk.errors import UserError, first_line
from tasks.evaluation.completions import MAX_TOKENS, Completion, edit_similarity, exact_match
from tasks.evaluation.local_files import CONCEPT, FORMATS, OWN, DataFolder, LocalData, Row
from tasks.evaluation.names import COMPLETION, Benchmark

CODE_TASKS = ("humaneval", "mbpp")
"""Whose answers are programs."""
SCORING_VERSION = 1
"""Of what is scored here and not by the harness; raised where equal answers would get another score."""
_DEFINITIONS = os.path.dirname(lm_eval.tasks.__file__)
# The harness tells of every definition that it overrides and every default that it takes.
logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One task of the harness, with its questions."""

    name: str
    shots: int
    task: Any
    requests: str
    """sha256 of everything that a model is asked, and of the answers."""
    scoring: Mapping[str, Any]
    asked: int
    """Questions, after the limit."""
    available: int
    source: str
    """Where the questions come from, for the reader."""
    paths: Mapping[int, str]
    """Of its questions by their numbers, where they have any: `arithmetic/addition`. No model is shown them, and they
    are no part of `requests`: questions whose paths were changed need not be asked again."""

    @property
    def generates(self) -> bool:
        return str(self.task.OUTPUT_TYPE) == "generate_until"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One line of the report: a task, or a group of tasks with one score."""

    benchmark: Benchmark
    parts: tuple[Part, ...]
    group: Any = None
    """The harness's group, which says how the parts' scores make one; None of a single task."""

    @property
    def name(self) -> str:
        return self.benchmark.task


Completions = Callable[[str], Sequence[Completion]]
"""The lines that are asked for in a domain."""


def build_measures(
    benchmarks: Sequence[Benchmark],
    *,
    folder: DataFolder | None,
    completions: Completions,
    limit: int | None,
    seed: int,
) -> list[Measure]:
    """The benchmarks with their questions, in order.

    Args:
        folder: of local files; None: everything comes from the hub.
        limit: questions of each task, at most.
        seed: of the choice of worked examples.

    Raises:
        UserError: there is no such task, its questions cannot be reached, or it cannot be run here.
    """
    return [
        _measure(benchmark, tasks, group, source, limit=limit, seed=seed)
        for asked in benchmarks
        for benchmark, tasks, group, source in _tasks_of(asked, folder, completions)
    ]


Built = tuple[Benchmark, list[Any], Any, str]
"""A benchmark, its tasks, its group and where its questions come from."""


def _tasks_of(benchmark: Benchmark, folder: DataFolder | None, completions: Completions) -> Iterator[Built]:
    name = benchmark.task
    if name.startswith(f"{COMPLETION}:"):
        domain = name.partition(":")[2]
        task = _task(_completion_config(name, completions(domain)))
        yield benchmark, [task], None, f"validation documents of domain {domain}"
    elif folder is not None and (data := folder.load(name)) is not None:
        if name == "mmlu":
            group = _mmlu(data)
            yield benchmark, group.get_all_tasks(), group, data.source
        else:
            yield benchmark, [_task(_local_config(name, data))], None, data.source
    else:
        yield from _from_hub(benchmark, folder)


# ---- from local files


def _local_config(name: str, data: LocalData) -> dict[str, Any]:
    if name == "mbpp":
        shots = _mbpp_shots(data.test)
        if not shots:
            raise UserError(f"{data.source}: MBPP's worked examples, tasks 2, 3 and 4, are not in it; add them")
        return {**_definition(name), **_splits(_mbpp_test(data.test), shots)}
    return {**_definition(name), **(FORMATS[name].changes or {}), **_splits(data.test, data.shots)}


def _splits(test: list[Row], shots: list[Row]) -> dict[str, Any]:
    """What of a definition says where its rows come from. Nothing is written to any cache."""
    splits = {"test": datasets.Dataset.from_list(test)}
    if shots:
        splits["shots"] = datasets.Dataset.from_list(shots)
    return {
        "custom_dataset": lambda **_: splits,
        "dataset_path": None,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "shots" if shots else "test",
    }


def _mmlu(data: LocalData) -> Any:
    """A task for each subject, as on the hub; the group's score is the mean over all questions."""
    group = Group(name="mmlu", aggregate_metric_list=[AggMetricConfig(metric="acc", weight_by_size=True)])
    for subject in sorted({row["subject"] for row in data.test}):
        path = os.path.join(_DEFINITIONS, FORMATS["mmlu"].definition, f"mmlu_{subject}.yaml")
        if not os.path.exists(path):
            raise UserError(f"{data.source}: MMLU has no subject '{subject}'")
        test, shots = ([row for row in rows if row["subject"] == subject] for rows in (data.test, data.shots))
        group.add(_task({**load_yaml(path), **_splits(test, shots)}))
    return group


def _definition(name: str) -> dict[str, Any]:
    """The harness's definition of one of our tasks, or our own."""
    if name in (own := {"c3": _C3, OWN: _OWN}):
        return dict(own[name])
    # Resolving what stands in code would import, for these two, a module that executes a program at once.
    path = os.path.join(_DEFINITIONS, FORMATS[name].definition)
    definition = load_yaml(path, resolve_func=name not in CODE_TASKS)
    return {**definition, **(_GENERATED_ONLY if name in CODE_TASKS else {})}


_GENERATED_ONLY: Mapping[str, Any] = {
    "unsafe_code": False,
    "filter_list": None,
    "metric_list": [{"metric": "bypass", "aggregation": "bypass", "higher_is_better": True}],
}
"""Of a definition whose answers are programs: they are kept, and nothing is scored."""

_C3: Mapping[str, Any] = {
    "task": "c3",
    "dataset_path": "clue/clue",
    "dataset_name": "c3",
    "training_split": "train",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "文章：{{context | join('\n')}}\n问题：{{question}}\n答案：",
    "doc_to_target": "{{choice.index(answer)}}",
    "doc_to_choice": "choice",
    "target_delimiter": "",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.0},
}

_OWN: Mapping[str, Any] = {
    "task": OWN,
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "target_delimiter": " ",
    "num_fewshot": 0,
    "metric_list": _C3["metric_list"],
    "metadata": {"version": 1.0},
}


def _mbpp_test(rows: Sequence[Row]) -> list[Row]:
    """Tasks 11 to 510 are the test split."""
    return [row for row in rows if 11 <= row["task_id"] <= 510]


def _mbpp_shots(rows: Sequence[Row]) -> list[Row]:
    """Tasks 2, 3 and 4 are the examples of the paper's prompt, which the harness has a copy of in code."""
    examples = sorted((row for row in rows if row["task_id"] in (2, 3, 4)), key=lambda row: row["task_id"])
    return [{**row, "is_fewshot": True} for row in examples]


# ---- completions of code


def _completion_config(name: str, lines: Sequence[Completion]) -> dict[str, Any]:
    if not lines:
        raise UserError(f"'{name}': the domain's validation documents hold no line to complete; leave it out")
    metrics = ("exact_match", "edit_similarity")
    return {
        "task": name,
        **_splits([{"prefix": line.prefix, "target": line.target} for line in lines], []),
        "output_type": "generate_until",
        "doc_to_text": "prefix",
        "doc_to_target": "target",
        "target_delimiter": "",
        "num_fewshot": 0,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": MAX_TOKENS, "do_sample": False},
        "process_results": _score_completion,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": SCORING_VERSION},
    }


def _score_completion(row: Row, generated: Sequence[str]) -> dict[str, float]:
    return {
        "exact_match": exact_match(generated[0], row["target"]),
        "edit_similarity": edit_similarity(generated[0], row["target"]),
    }


# ---- from the hub


def _from_hub(benchmark: Benchmark, folder: DataFolder | None) -> Iterator[Built]:
    name = benchmark.task
    if name == OWN:
        where = f"{folder.url} has none" if folder is not None else "--data names the folder that has one"
        raise UserError(f"task '{OWN}' takes its questions from a file {OWN}.jsonl, and {where}; add it, or name it")
    if name in FORMATS and name != "mmlu":
        definition = _definition(name)
        if name == "mbpp":
            shots = {"split": "prompt", "sampler": "first_n", "process_docs": _mbpp_shots}
            definition = {**definition, "fewshot_config": shots}
        with _reaching_hub(name, str(definition["dataset_path"]), folder):
            task = _task(definition)
        yield benchmark, [task], None, str(definition["dataset_path"])
        return
    _refuse_unknown(name)
    _refuse_unsafe(name)
    paths = sorted({str(entry["dataset_path"]) for entry in _leaf_definitions(name) if entry.get("dataset_path")})
    source = ", ".join(paths[:2]) + (", …" if len(paths) > 2 else "")
    with _reaching_hub(name, source, folder):
        loaded = _manager().load([name])
    group = loaded.get("groups", {}).get(name)
    if group is not None and group.has_aggregation:
        yield benchmark, list(loaded["tasks"].values()), group, source
        return
    for part, task in loaded["tasks"].items():
        yield Benchmark(part, benchmark.shots), [task], None, source


@cache
def _manager() -> Any:
    """Reads all definitions that the harness has (some seconds)."""
    return TaskManager()


def _leaf_definitions(name: str) -> Iterator[dict[str, Any]]:
    """The definitions of a task, of a group's or a tag's tasks; code in them stays text."""
    entry = _manager().task_index[name]
    if entry.cfg is None:
        children = sorted(entry.tags)
    elif "group" in entry.cfg:
        asked = entry.cfg.get("task") or []
        yield from (child for child in asked if isinstance(child, dict))
        children = [child if isinstance(child, str) else child.get("group") or child.get("task") for child in asked]
    else:
        yield entry.cfg
        return
    for child in children:
        if child in _manager().task_index:
            yield from _leaf_definitions(child)


def _refuse_unknown(name: str) -> None:
    names = _manager().all_tasks
    if name not in names:
        close = difflib.get_close_matches(name, [*names, *FORMATS, COMPLETION], n=3)
        raise UserError(
            f"lm-evaluation-harness has no task '{name}'" + (f"; did you mean {' or '.join(close)}?" if close else "")
        )


def _refuse_unsafe(name: str) -> None:
    if any(definition.get("unsafe_code") for definition in _leaf_definitions(name)):
        raise UserError(
            f"task '{name}' executes what the model wrote within the harness's own process, so it is not run; "
            f"{' and '.join(CODE_TASKS)} are executed in a sandbox (--allow-code)"
        )


@contextmanager
def _reaching_hub(name: str, data_set: str, folder: DataFolder | None) -> Iterator[None]:
    """Where questions cannot be fetched, one line says which task and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = "HF_HUB_OFFLINE is set, and the cache has none" if _offline() else first_line(error)
        remedy = "fetch it where there is a network"
        if name in FORMATS:
            where = f"into {folder.url}" if folder is not None else "into a folder"
            remedy = f"put {name}.jsonl {where} (--data FOLDER; docs/evaluating.md says what is in it)"
        raise UserError(
            f"task '{name}' takes its questions from the hub ({data_set}), which cannot be reached: {cause}; {remedy}, "
            f"or leave the task out"
        ) from error


def _offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


# ---- questions


def _task(config: Mapping[str, Any]) -> Any:
    wanted = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list", "include")}
    # The harness changes what it is given.
    return ConfigurableTask(config=copy.deepcopy(wanted))


def _measure(
    benchmark: Benchmark, tasks: Sequence[Any], group: Any, source: str, *, limit: int | None, seed: int
) -> Measure:
    return Measure(
        benchmark=benchmark,
        parts=tuple(_part(task, benchmark, source, limit=limit, seed=seed) for task in tasks),
        group=group,
    )


def _part(task: Any, benchmark: Benchmark, source: str, *, limit: int | None, seed: int) -> Part:
    if benchmark.shots is not None:
        task.set_config("num_fewshot", benchmark.shots)
    shots = int(task.get_config("num_fewshot") or 0)
    _keep_apart(task, shots)
    task.set_fewshot_seed(seed=seed)
    try:
        task.build_all_requests(limit=limit)
    except (AssertionError, ValueError) as error:
        raise UserError(f"task '{benchmark}': its questions cannot be assembled ({first_line(error)})") from error
    instances = task.instances
    return Part(
        name=str(task.task_name),
        shots=shots,
        task=task,
        requests=_digest(task, instances),
        scoring=_scoring(task),
        asked=len({instance.doc_id for instance in instances}),
        available=len(task.eval_docs),
        source=source,
        paths={instance.doc_id: instance.doc[CONCEPT] for instance in instances if CONCEPT in instance.doc},
    )


def _keep_apart(task: Any, shots: int) -> None:
    """That no question is its own worked example, where they are drawn from the questions.

    The harness leaves the question out only where its definition names the split.
    """
    others = task.config.training_split or task.config.validation_split
    fewshot = getattr(task, "fewshot_cfg", None)
    if shots and fewshot is not None and fewshot.split is None and fewshot.samples is None and not others:
        fewshot.split = task.config.test_split


def _digest(task: Any, instances: Sequence[Any]) -> str:
    sha256 = hashlib.sha256()
    for instance in instances:
        doc = {name: value for name, value in instance.doc.items() if name != CONCEPT}
        asked = [instance.request_type, instance.args, instance.idx, doc, task.doc_to_target(instance.doc)]
        sha256.update(json.dumps(asked, ensure_ascii=False, sort_keys=True, default=str).encode())
    return sha256.hexdigest()


def _scoring(task: Any) -> dict[str, Any]:
    config = task.config
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "output": task.OUTPUT_TYPE,
                "metrics": config.metric_list,
                "filters": config.filter_list,
                "process": config.process_results,
                "version": task.VERSION,
                "ours": SCORING_VERSION,
            },
            default=lambda value: getattr(value, "__qualname__", type(value).__name__),
        )
    )
    return plain
