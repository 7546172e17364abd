"""The accuracies that a run's mixture follows: what `ddk eval` stored of an earlier run, by the paths of its questions.

They are read once, before the first step, and stand in the run's identity: no benchmark is run in training, and a run
that resumes after the earlier run was asked more refuses to go on with other numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ddk.concepts import Accuracies, shrunk_accuracies, strangers, unasked
from ddk.domain_tree import cut
from ddk.errors import UserError
from ddk.mixture import MixtureConfig
from ddk.values import Tally
from storage.runs.evaluations import EvaluationFolder, concepts_of
from tasks.reporting.scores import evaluation_rows
from tasks.showing.progress import logger

_MOST_NAMED = 8


def read_accuracies(root: str, mixture: MixtureConfig, domains: Collection[str]) -> Accuracies | None:
    """The accuracies that `mixture.follow` asks for; None where it follows the gap alone.

    Of each benchmark counts its main metric, with the most questions that were asked; questions of several benchmarks
    with one path count together.

    Args:
        domains: of the run, all leaves.

    Raises:
        UserError: that run has no such answers, or no question's path belongs to any domain.
    """
    name = mixture.accuracy_run
    if mixture.follow == "gap" or name is None:
        return None
    records = EvaluationFolder(root, name).records()
    asked = [record for record in records if record["model"] == mixture.accuracy_model]
    shown = [row for row in evaluation_rows(asked) if row["shown"] and row["headline"]]
    main = {row["question"]: row["metric"] for row in shown}
    of_role = {role: _tallies(records, role, main) for role in (mixture.accuracy_model, "teacher")}
    student, teacher = of_role[mixture.accuracy_model], of_role["teacher"]
    if not student:
        raise UserError(_missing(root, name, mixture.accuracy_model, records))
    # The teacher says how much there is to learn only where it was asked the same.
    found = Accuracies(student=student, teacher=teacher if _same_questions(student, teacher) else None)
    nodes = {cut(domain, mixture.level) if mixture.level else domain for domain in domains}
    try:
        shrunk_accuracies(found.student, nodes)
    except ValueError as error:
        raise UserError(
            f"mixture.accuracy_run '{name}': {error}; give questions and domains the same paths, or set "
            f"mixture.follow: gap"
        ) from None
    return found


def say_what_does_not_match(accuracies: Accuracies, mixture: MixtureConfig, domains: Collection[str]) -> None:
    """Warn, by name, of questions that belong to no domain, and of domains that no question belongs to."""
    nodes = {cut(domain, mixture.level) if mixture.level else domain for domain in domains}
    if left := strangers(accuracies.student, nodes):
        logger.warning(
            "mixture.accuracy_run '%s': its questions of %s belong to no domain, and count nowhere",
            *(mixture.accuracy_run, _named(left)),
        )
    if silent := unasked(accuracies.student, nodes):
        logger.warning(
            "mixture.accuracy_run '%s': it asked nothing of the domains %s; each is taken to be as weak as what lies "
            "above it",
            *(mixture.accuracy_run, _named(silent)),
        )


def as_identity(accuracies: Accuracies) -> dict[str, Any]:
    """What determines the mixture, as it is kept in the run's identity: `{model: {path: [right, asked]}}`."""
    return {
        "student": _as_lists(accuracies.student),
        **({"teacher": _as_lists(accuracies.teacher)} if accuracies.teacher is not None else {}),
    }


def _as_lists(tallies: Mapping[str, Tally]) -> dict[str, list[float]]:
    return {path: [tally.right, tally.asked] for path, tally in sorted(tallies.items())}


def _tallies(records: Collection[Mapping[str, Any]], role: str, main: Mapping[str, str]) -> dict[str, Tally]:
    """By path, over all benchmarks; of two records of the same questions the later."""
    newest: dict[str, Mapping[str, Any]] = {}
    for record in sorted(records, key=lambda record: float(record["measured_at"])):
        if record["model"] == role and record["question"] in main:
            newest[record["question"]] = record
    found: dict[str, Tally] = {}
    for question, record in sorted(newest.items()):
        for path, by_metric in concepts_of(record).items():
            if (tally := by_metric.get(main[question])) is not None:
                found[path] = found[path] + tally if path in found else tally
    return found


def _same_questions(student: Mapping[str, Tally], teacher: Mapping[str, Tally]) -> bool:
    return {path: one.asked for path, one in student.items()} == {path: one.asked for path, one in teacher.items()}


def _missing(root: str, name: str, role: str, records: Collection[Mapping[str, Any]]) -> str:
    whose = "its student" if role == "student" else "its student before distillation"
    if not records:
        what = f"has no evaluations below {root}"
    elif not any(record["model"] == role for record in records):
        what = f"has no evaluation of {whose}"
    else:
        what = f"has answers of {whose}, and none of the questions has a path"
    return (
        f"mixture.accuracy_run '{name}' {what}; run `ddk eval` on that run with --data and questions that have a field "
        f"'concept' (docs/evaluating.md), or set mixture.follow: gap"
    )


def _named(names: Collection[str]) -> str:
    ordered = list(names)
    more = f" and {len(ordered) - _MOST_NAMED} more" if len(ordered) > _MOST_NAMED else ""
    return ", ".join(f"'{name}'" for name in ordered[:_MOST_NAMED]) + more
