"""The benchmarks for a run's models: names, presets and options. Nothing here needs the evaluation harness.

A benchmark is a task of lm-evaluation-harness by its name there (`arc_easy`, `mmlu`, …), `c3`, or one of

    own_questions         one's own questions, from a file of the data folder
    completion            lines of code completed, in every domain of the run (`completion:java`: in one)
    humaneval, mbpp       with the harness's prompts; what models wrote is executed in `tasks.evaluation.sandbox` alone

An @ sets the number of worked examples before each question: `gsm8k@5`. Without it, the harness's own definition sets
the number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ddk.errors import UserError
from ddk.section import Section

Role = Literal["before", "student", "teacher"]
ROLES: tuple[Role, ...] = ("before", "student", "teacher")
"""The student before distillation, the distilled student, the teacher: the order of every table."""

COMPLETION = "completion"


@dataclass(frozen=True, slots=True, order=True)
class Benchmark:
    """One line of what is asked for."""

    task: str
    shots: int | None = None
    """Worked examples before each question; None: as the task's definition says."""

    def __str__(self) -> str:
        return self.task if self.shots is None else f"{self.task}@{self.shots}"


_REASONING = (
    *("ceval-valid", "mmlu", "race", "c3", "winogrande"),
    *("gsm8k", "commonsense_qa", "arc_easy", "arc_challenge"),
)
PRESETS: Mapping[str, tuple[Benchmark, ...]] = {
    # C-Eval's test split has no published answers, so that everybody but its authors takes the validation split.
    "paper": (*(Benchmark(task, 0) for task in _REASONING), Benchmark("humaneval", 0), Benchmark("mbpp", 3)),
    "paper-5shot": tuple(Benchmark(task, 5) for task in _REASONING),
    "code": (Benchmark("humaneval", 0), Benchmark("mbpp", 3), Benchmark(COMPLETION)),
}
LOCAL_PRESET = "local"
"""Everything that the data folder holds a file for."""

HEADLINE: Mapping[str, str] = {
    "gsm8k": "exact_match,flexible-extract",
    "mgsm_direct_zh": "exact_match,flexible-extract",
    "xquad_zh": "f1,none",
}
"""The metric that stands for a task in a table, where it is not the first of `_METRICS` that the task has."""
_METRICS = ("pass@1", "edit_similarity", "acc", "exact_match", "f1")


class EvaluationConfig(Section):
    """What `ddk eval` is asked for."""

    tasks: tuple[str, ...] = ()
    """Benchmarks by name, each with @ and a number of examples behind it where wanted."""
    preset: str | None = None
    """'paper', 'paper-5shot', 'code' or 'local'; besides `tasks`. Neither: 'local' with a data folder, else 'paper'."""
    data: str | None = None
    """Folder or URL with files of questions; what it has no file for comes from the hub."""
    concept_field: str = "concept"
    """Field of a line in those files that holds the path of its question, such as `arithmetic/addition`; several,
    separated by commas, are its parts. Accuracies are shown for every part. Empty: no paths are read."""
    models: tuple[Role, ...] = ROLES
    """Models to evaluate: before, student, teacher."""
    limit: int | None = Field(default=None, ge=1, le=10**9)
    """At most so many questions of a task (of each part of it, where it has parts). For trying out only."""
    allow_code: Literal["no", "isolated", "unisolated"] = "no"
    """Whether programs that models wrote are executed: not at all, in a sandbox, or with hardly any protection."""
    backend: Literal["auto", "hf", "vllm"] = "auto"
    """What runs the models: transformers, vLLM, or each where it pays."""
    completions: int = Field(default=500, ge=1, le=10**9)
    """Lines of code that are asked for in each domain."""
    context: int | None = Field(default=None, ge=16, le=2**24)
    """Length up to which long documents are read, for the perplexity by position; passkeys are hidden besides
    (docs/context.md). Without `tasks`, `preset` and `data`, nothing else is asked. Default: not measured."""
    context_documents: int = Field(default=8, ge=1, le=10**6)
    """Sequences of that length that are read of each domain, at most."""
    passkey: tuple[Annotated[int, Field(ge=1, le=10**4)], ...] = (1, 2, 4, 8)
    """With `context`: lengths of the texts with a passkey, in multiples of the length that the student was trained
    at; empty: none are asked for."""
    passkeys: int = Field(default=20, ge=1, le=10**6)
    """Texts with a passkey of each length."""
    seed: int = Field(default=1234, ge=0, lt=2**31)
    """Of the choice of worked examples and of lines to complete, and of passkeys."""


def wanted_benchmarks(
    config: EvaluationConfig, domains: Callable[[], Sequence[str]], local: Collection[str] = ()
) -> tuple[Benchmark, ...]:
    """The benchmarks in the order in which they are reported, `completion` spelt out by domain; none where only
    long contexts are asked for.

    Args:
        domains: of the run, those with texts; asked only where there are completions.
        local: tasks that the data folder has files for.

    Raises:
        UserError: there is no such preset or domain, a name is not one, or nothing is asked for.
    """
    preset = config.preset
    if preset is None and not config.tasks:
        if config.context is not None and config.data is None:
            return ()
        preset = LOCAL_PRESET if config.data is not None else "paper"
    asked = [*(_preset(preset, local, config.data) if preset is not None else ()), *map(parse, config.tasks)]
    found: dict[Benchmark, None] = {}
    for benchmark in asked:
        for one in _by_domain(benchmark, domains):
            found[one] = None
    return tuple(found)


def parse(text: str) -> Benchmark:
    """`'gsm8k@5'` → `Benchmark('gsm8k', 5)`.

    Raises:
        UserError: it is no name, or what is behind the @ is no number.
    """
    # A domain's name may be a path; a task's is a name alone.
    match = re.fullmatch(rf"\s*([^\s@,/]+|{COMPLETION}:[^\s@,]+)(?:@(\d{{1,3}}))?\s*", text)
    if match is None:
        raise UserError(f"--tasks takes names, each optionally followed by @ and a number of examples, not '{text}'")
    return Benchmark(match[1], int(match[2]) if match[2] else None)


def _preset(name: str, local: Collection[str], data: str | None) -> tuple[Benchmark, ...]:
    if name == LOCAL_PRESET:
        if not local:
            where = f"{data} has no file that belongs to a task" if data else "it needs a folder (--data)"
            raise UserError(f"preset '{name}' takes what the data folder holds, and {where}; see docs/evaluating.md")
        return tuple(Benchmark(task) for task in local)
    if name not in PRESETS:
        raise UserError(f"there is no preset '{name}'; there are {', '.join([*PRESETS, LOCAL_PRESET])}")
    return PRESETS[name]


def _by_domain(benchmark: Benchmark, domains: Callable[[], Sequence[str]]) -> list[Benchmark]:
    name, separator, domain = benchmark.task.partition(":")
    if name != COMPLETION:
        return [benchmark]
    if benchmark.shots:
        raise UserError(f"'{benchmark}': completion tasks take no worked examples; leave @{benchmark.shots} out")
    names = domains()
    below = [name for name in names if not separator or name == domain or name.startswith(f"{domain}/")]
    if not below:
        raise UserError(f"'{benchmark}': the run has no domain '{domain}' with texts; it has {', '.join(names)}")
    return [Benchmark(f"{COMPLETION}:{name}") for name in below]


def headline(task: str, metrics: Collection[str]) -> str | None:
    """The metric that stands for the task, of those that it has (`'acc,none'`, …); None where it has none."""
    if HEADLINE.get(task) in metrics:
        return HEADLINE[task]
    ordered = sorted(metrics)
    named = [metric for name in _METRICS for metric in ordered if metric.partition(",")[0] == name]
    return next(iter([*named, *ordered]), None)
