"""Which of several teachers is the best for this student: a sample of blocks captured with each, and a short run each.

Every teacher has its own cache, and every run the same student, domains, steps and mixture. They are ranked by what the
student can do after it, not by the gap, which is small beside a weak teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError
from flows.comparing.compare import refusals_before_capture
from flows.comparing.variants import Request, Variant, planned_runs
from flows.config import Config, changed
from flows.costing.estimate import estimate
from flows.costing.run_size import Assumptions
from tasks.comparing.data import Comparison, Measure, difference_of, spread_of
from tasks.predicting.points import student_size

SAMPLE_BLOCKS, SHORT_STEPS = 256, 200
_GAP_LAW = 2.5
"""T* = 2.5 × S of the Law of Capacity Gap (arXiv 2311.07052)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedTeacher:
    """One teacher, as its student came out."""

    model: str
    perplexity: float
    """Of the student after the short run: geometric mean over domains, mean over seeds."""
    difference: str
    """From the best's, paired by seed, in words."""
    capture_hours: float
    """GPU hours of the full capture with it, estimated."""
    times: float
    """Its parameters ÷ the student's, both without embeddings."""


def teachers_request(
    config: Config, folder: str, *, name: str, teachers: Sequence[str], seeds: Sequence[int], blocks: int, steps: int
) -> Request:
    """A variant for each teacher, as a request of `ddk compare`.

    Raises:
        UserError: fewer than two teachers, or one twice.
    """
    if len(teachers) < 2 or len(set(teachers)) < len(teachers):
        raise UserError("--teachers takes at least two different models, separated by commas")
    fields: dict[str, Any] = {
        "domains": {
            name: {**domain.model_dump(mode="json"), "max_train_blocks": min(blocks, domain.max_train_blocks or blocks)}
            for name, domain in config.domains.items()
        },
        "train.steps": steps,
        "train.warmup_steps": min(config.train.warmup_steps, steps // 10),
        "mixture.interval": steps,
        "mixture.weights": "equal",
    }
    variants = [
        Variant(name=_label(teacher, teachers), method="ddk_equal", fields={**fields, "teacher.model": teacher})
        for teacher in teachers
    ]
    return Request(name=name, variants=tuple(variants), seeds=tuple(seeds), baseline=variants[0].name, folder=folder)


def rank(config: Config, request: Request, comparison: Comparison, assumed: Assumptions) -> list[RankedTeacher]:
    """The teachers, best first. One whose runs have all failed is left out; the comparison says why."""
    measure = Measure(name="perplexity")
    found = {
        variant.name: spread.mean
        for variant in comparison.variants
        if (spread := spread_of(comparison, variant.name, measure)) is not None
    }
    if not found:
        raise UserError("no run has finished, so that there is nothing to rank; see the failures above")
    best = min(found, key=lambda name: found[name])
    against = comparison.model_copy(update={"baseline": best})
    student = student_size(config.student.model, config.student.revision)
    models = {variant.name: str(variant.fields["teacher.model"]) for variant in request.variants}
    ranked = []
    for name in sorted(found, key=lambda name: found[name]):
        difference = difference_of(against, name, measure)
        full = changed(config, {"teacher.model": models[name]}, request.folder, "--teachers")
        ranked.append(
            RankedTeacher(
                model=models[name],
                perplexity=found[name],
                difference="best" if name == best or difference is None else difference.verdict,
                capture_hours=estimate(full, assumed).value("GPU time", "capture"),
                times=student_size(full.teacher.model, full.teacher.revision) / student,
            )
        )
    return ranked


def hint(ranked: Sequence[RankedTeacher]) -> str:
    """What the Law of Capacity Gap would say, and why it is no more than a hint."""
    near = min(ranked, key=lambda one: abs(math.log(one.times / _GAP_LAW)))
    return (
        f"Hint: the Law of Capacity Gap (arXiv 2311.07052) takes the teacher of {_GAP_LAW} times the student's size, "
        f"here {near.model} ({near.times:.1f} times). It does not hold everywhere: DDK's own table has a 1.8B student "
        f"better under a 14B teacher (7.8 times) than under a 7B one (3.9 times)."
    )


def refused(config: Config, request: Request) -> dict[str, str]:
    """Why the configuration cannot run with a teacher, by the teacher's label; known before anything is captured."""
    failures = refusals_before_capture(config, request)
    return {run.variant.name: failures[run.run] for run in planned_runs(config, request) if run.run in failures}


def _label(teacher: str, teachers: Sequence[str]) -> str:
    """The last part of its name, or its number where two end alike."""
    last = [one.rstrip("/").rpartition("/")[2] for one in teachers]
    at = teachers.index(teacher)
    return last[at] if last.count(last[at]) == 1 else f"{last[at]} {at + 1}"
