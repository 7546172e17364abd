"""Reads the points of a law from the runs of a root: what each measured, under which mixture, after how many tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import transformers

from ddk.cost.shape import shape_of
from ddk.errors import UserError, first_line
from ddk.laws.points import Point
from ddk.train_config import TrainConfig
from storage.files import uri
from storage.files.names import matches
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from storage.runs.overview import came_from
from tasks.planning.models import local_folder
from tasks.reporting.run_summary import effective_settings

MOST_POINTS = 16
"""Of one run; of more measurements those are taken that lie evenly on the logarithm of the tokens, which is how D-CPT
Law's authors found checkpoints to fit best."""
_MAY_DIFFER = {"steps", "warmup_steps", "keep_checkpoints", "log_every", "overtrained", "epoch_limit", "max_hours"}
"""Of the section `train`. All else that changes the loss must be the same in all runs of a law."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsPoints:
    """What a law is fitted to, and what all its runs share."""

    points: list[Point]
    teacher: Mapping[str, float]
    """The teacher's loss by domain, in nats."""
    start: Mapping[str, Mapping[float, float]]
    """The losses before any training, by domain and size of student."""
    stores: Mapping[str, Mapping[str, str]]
    """Fingerprints of blocks and targets by domain."""
    tokens_per_step: int
    notes: list[str]
    """What a reader should know of the points."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    name: str
    config: Mapping[str, Any]
    stores: Mapping[str, Mapping[str, str]]
    records: Sequence[MixtureRecord]
    complete: bool

    @property
    def decays(self) -> bool:
        """Whether the learning rate falls: then only the last measurement is that of a finished run."""
        train = self.config["train"]
        return float(train["min_learning_rate"]) < 0.999 * float(train["learning_rate"])

    def positions_per_step(self) -> int:
        return int(self.config["train"]["batch_size"] * self.config["packing"]["seq_len"])


def read_points(root: str, patterns: Sequence[str], *, all_points: bool = False) -> RunsPoints:
    """The points of all runs whose names match one of the patterns.

    Args:
        patterns: as a shell has them: 'law-*'.
        all_points: also take measurements in the middle of runs whose learning rate falls.

    Raises:
        UserError: no run matches, or the runs cannot be under one law; what differs is named.
        StoreDamagedError: a run's files are not what was written.
    """
    left_out: list[str] = []
    runs = list(_runs(root, patterns, left_out))
    if not runs:
        held = ", ".join(uri.list_names(uri.join(root, "runs"))) or "none"
        raise UserError(
            f"no run of {uri.join(root, 'runs')} that has been measured matches {', '.join(patterns)}; there are: "
            f"{held}"
        )
    for run in runs[1:]:
        _check_alike(run, runs[0])
    notes = []
    if left_out:
        notes.append(f"Left out, as they went on from other runs' checkpoints: {', '.join(left_out)}.")
    middles = all_points or not any(run.decays for run in runs)
    if not middles:
        notes.append(
            "The learning rate of these runs falls to the end, so that only the last measurement of each complete run "
            "is a point: what was measured on the way is no shorter run. With train.min_learning_rate equal to "
            "train.learning_rate, every measurement is one."
        )
    points = [point for run in runs for point in _points(run, middles=middles)]
    first = runs[0].records[0]
    return RunsPoints(
        points=points,
        teacher={gap.domain: math.log(gap.teacher_ppl) for gap in first.gaps},
        start=_starts(runs),
        stores=runs[0].stores,
        tokens_per_step=runs[0].positions_per_step(),
        notes=notes,
    )


def student_size(model: str, revision: str | None) -> float:
    """N: parameters without embeddings and without the output projection, of a model's config.

    Raises:
        UserError: the config cannot be read.
    """
    return _size(model, revision)


@cache
def _size(model: str, revision: str | None) -> float:
    try:
        shape = shape_of(transformers.AutoConfig.from_pretrained(local_folder(model, revision, "student.model")))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"the size of student '{model}' cannot be told from its config: {first_line(error)}") from None
    return float(shape.products - shape.head)


def _runs(root: str, patterns: Sequence[str], left_out: list[str]) -> Iterator[_Run]:
    """Those that have been measured.

    Args:
        left_out: takes the names of those that went on from another run: they were trained by two recipes.
    """
    for name in uri.list_names(uri.join(root, "runs")):
        if not matches(name, patterns):
            continue
        folder = RunFolder(root, name)
        config, identity, summary = folder.config(), folder.identity(), folder.summary()
        if config is None or identity is None:
            continue
        if came_from(identity) is not None:
            left_out.append(name)
            continue
        records = MixtureHistory(folder.url).whole(summary)
        if records:
            yield _Run(
                name=name,
                config=effective_settings(config),
                stores=identity["stores"],
                records=records,
                complete=summary is not None,
            )


def _check_alike(run: _Run, first: _Run) -> None:
    if set(run.stores) != set(first.stores):
        raise UserError(
            f"run '{run.name}' has the domains {', '.join(sorted(run.stores))}, run '{first.name}' "
            f"{', '.join(sorted(first.stores))}; fit one law to runs with the same domains (choose them with --runs)"
        )
    for domain, stores in run.stores.items():
        for kind, what in (("blocks", "blocks (and so other validation sets)"), ("targets", "targets")):
            if stores[kind] != first.stores[domain][kind]:
                raise UserError(
                    f"runs '{run.name}' and '{first.name}' have other {what} of '{domain}'; their losses cannot be "
                    f"under one law: choose runs on one cache with --runs"
                )
        if run.config["student"] == first.config["student"] and _chosen(run, domain) != _chosen(first, domain):
            raise UserError(
                f"runs '{run.name}' and '{first.name}' drew from other selections of '{domain}' "
                f"(domains.{domain}.select); their losses cannot be under one law: choose runs with the same selection "
                f"with --runs"
            )
    recipe = _of_training(first)
    for place, mine, theirs in (
        ("loss", run.config["loss"], first.config["loss"]),
        *((f"train.{key}", value, recipe[key]) for key, value in _of_training(run).items()),
    ):
        if mine != theirs:
            raise UserError(
                f"runs '{run.name}' and '{first.name}' differ in {place}; a law holds for one training recipe: choose "
                f"runs that share it with --runs"
            )


def _chosen(run: _Run, domain: str) -> str | None:
    """Name of the selection that it drew from. Blocks are ranked by the student's own losses, so that another student
    has another selection."""
    return run.stores[domain].get("selections")


def _of_training(run: _Run) -> dict[str, Any]:
    """With the defaults of settings that did not exist yet when the run was begun."""
    settings = TrainConfig.model_validate(run.config["train"]).model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in _MAY_DIFFER}


def _points(run: _Run, *, middles: bool) -> Iterator[Point]:
    measured = [record for record in run.records if record.tokens_seen > 0]
    if middles:
        warm = int(run.config["train"]["warmup_steps"])
        measured = _spread([record for record in measured if record.step >= warm] or measured[-1:])
    else:
        measured = measured[-1:] if run.complete else []
    student = run.config["student"]
    for record in measured:
        drawn = {domain: record.blocks_drawn.get(domain, 0) for domain in record.perplexities}
        total = sum(drawn.values())
        if total == 0:
            continue
        yield Point(
            run=run.name,
            parameters=student_size(student["model"], student["revision"]),
            tokens=float(record.tokens_seen),
            shares={domain: count / total for domain, count in drawn.items()},
            losses={gap.domain: math.log(gap.student_ppl) for gap in record.gaps},
        )


def _spread(records: Sequence[MixtureRecord]) -> list[MixtureRecord]:
    if len(records) <= MOST_POINTS:
        return list(records)
    logs = np.log([record.tokens_seen for record in records])
    wanted = np.linspace(logs[0], logs[-1], MOST_POINTS)
    return [records[at] for at in sorted({int(np.abs(logs - one).argmin()) for one in wanted})]


def _starts(runs: Sequence[_Run]) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {domain: {} for domain in runs[0].stores}
    for run in runs:
        if run.records[0].tokens_seen == 0:
            size = student_size(run.config["student"]["model"], run.config["student"]["revision"])
            for gap in run.records[0].gaps:
                found[gap.domain].setdefault(size, math.log(gap.student_ppl))
    return found
