"""Accuracies by the path of a question: tallies of stored answers, kept in the record of their task.

They are made from the answers, so that questions whose paths were added or changed are not asked again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ddk.values import Tally
from storage.runs.evaluations import concepts_of, stored_concepts

PASSED = "pass@1"


def tallied(
    samples: Iterable[Mapping[str, Any]], paths: Mapping[int, str], metrics: Collection[str]
) -> dict[str, dict[str, Tally]]:
    """By path and metric: how many questions were asked, and the sum of their scores.

    Args:
        samples: stored answers: `question`, `filter`, a score by the name of each metric; `outcome` of a program.
        paths: by question.
        metrics: of the record, as `acc,none`. One whose scores are not all in [0, 1] is no accuracy, and left out.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        path = paths.get(sample["question"])
        if path is None:
            continue
        for metric in metrics:
            name, _, how = metric.partition(",")
            value = float(sample["outcome"] == "passed") if metric == PASSED and "outcome" in sample else None
            if how and how == sample.get("filter"):
                value = _score(sample.get(name))
            if value is not None:
                scores.setdefault(metric, {}).setdefault(path, []).append(value)
    found: dict[str, dict[str, Tally]] = {}
    for metric, by_path in scores.items():
        if all(0.0 <= value <= 1.0 for values in by_path.values() for value in values):
            for path, values in by_path.items():
                found.setdefault(path, {})[metric] = Tally(right=math.fsum(values), asked=len(values))
    return found


def _score(value: Any) -> float | None:
    """A score as a number; one that is none, such as the pair behind a perplexity, lies outside of [0, 1]."""
    if value is None:
        return None
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else math.inf


def together(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Tally]]:
    """The tallies of a task from those of its parts. Raises as `concepts_of`."""
    found: dict[str, dict[str, Tally]] = {}
    for record in records:
        for path, by_metric in concepts_of(record).items():
            mine = found.setdefault(path, {})
            for metric, tally in by_metric.items():
                mine[metric] = mine[metric] + tally if metric in mine else tally
    return found


def labelled(record: Mapping[str, Any], tallies: Mapping[str, Mapping[str, Tally]]) -> dict[str, Any] | None:
    """The record with these tallies; None where it has them already, or there are none."""
    stored = stored_concepts(tallies)
    return {**record, "concepts": stored} if stored and record.get("concepts") != stored else None
