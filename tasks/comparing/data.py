"""The data of a comparison (`comparison.json`), and the values derived from them. Pure: no store, no clock.

A variant is one way to train, such as a method or a value of a sweep; a run is a variant with a seed. Page, plots and
CSV of a comparison are all made from one `Comparison`, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ddk.cost.shape import TRAINING
from ddk.values import has_regressed
from storage.runs.mixtures import MixtureRecord
from tasks.comparing.spreads import Difference, Spread, paired_difference, spread
from tasks.reporting.records import Row

FORMAT = 1
"""Version of comparison.json; raised when a name in it changes its meaning."""
Status = Literal["complete", "failed", "unfinished", "missing"]
MeasureName = Literal["perplexity", "ratio", "worst_ratio", "tokens", "share"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ComparedVariant(_Frozen):
    """One way to train: a row of the tables."""

    name: str
    method: str
    note: str | None = None
    """Why it is there, or what to know of it."""
    settings: dict[str, str] = {}
    """Fields, as `section.field`, in which the variants differ, and this one's values (of its first seed)."""


class ComparedRun(_Frozen):
    """One variant with one seed, as its folder holds it."""

    variant: str
    seed: int
    run: str
    """Its name below <root>/runs."""
    status: Status
    reason: str | None = None
    """Why it failed."""
    stopped_early: str | None = None
    training_seconds: float | None = None
    """Of all training steps together; the gap's evaluation, the start and the report are not in it."""
    ended: float | None = None
    """Unix time at which its last step was done; only of a comparison over time."""
    seq_len: int | None = None
    records: tuple[MixtureRecord, ...] = ()
    """Every measurement of the gap, the first before any training."""
    student_flops: int | None = None
    """Of a token's forward pass; None where it is not known."""
    teacher_flops: int | None = None
    teacher: Literal["stored", "live", "unused"] = "stored"
    """Where the loss had the teacher's predictions from."""
    validation_positions: int | None = None
    """Over all domains: what one measurement of the gap runs through the student."""
    stores: tuple[str, ...] = ()
    """Of its targets, below the root."""

    @property
    def counts(self) -> bool:
        """Whether the run is finished, so that its numbers count."""
        return self.status == "complete" and bool(self.records)

    @property
    def last(self) -> MixtureRecord:
        return self.records[-1]

    @property
    def tokens(self) -> int:
        """Trained on."""
        return self.last.tokens_seen if self.records else 0

    @property
    def training_flops(self) -> int | None:
        return None if self.student_flops is None else TRAINING * self.student_flops * self.tokens

    @property
    def evaluation_flops(self) -> int | None:
        """Of all measurements of the gap."""
        if self.student_flops is None or self.validation_positions is None:
            return None
        return self.student_flops * self.validation_positions * len(self.records)

    def teacher_forwards(self, where: Literal["stored", "live"]) -> int | None:
        """FLOPs of the teacher's passes over what was trained on: 'live' ones, or those that the cache stood for."""
        if self.teacher != where:
            return 0
        return None if self.teacher_flops is None else self.teacher_flops * self.tokens


class CapturedStore(_Frozen):
    """One domain's targets."""

    positions: int
    """Of both splits."""
    captured: bool
    """By running the teacher; else they were imported."""
    teacher_flops: int | None


class Comparison(_Frozen):
    """The content of comparison.json."""

    format: int = FORMAT
    name: str
    baseline: str
    """Name of the variant that the others are compared with."""
    seeds: tuple[int, ...]
    domains: tuple[str, ...]
    variants: tuple[ComparedVariant, ...]
    runs: tuple[ComparedRun, ...]
    stores: dict[str, CapturedStore] = {}
    """Every store of targets that a run read, or measured the teacher by; by its place below the root."""
    settings: dict[str, str] = {}
    """Fields, as `section.field`, that all runs share."""
    over_time: bool = False
    """Whether these are runs that were there, each a variant of its own, in the order in which they ended."""
    left_out: dict[str, str] = Field(default_factory=dict)
    """Methods that were not asked for by name and did not take part, and why."""

    def of(self, variant: str) -> list[ComparedRun]:
        """A variant's runs that count, by seed."""
        return self._counting.get(variant, [])

    @cached_property
    def _counting(self) -> dict[str, list[ComparedRun]]:
        found: dict[str, list[ComparedRun]] = {variant.name: [] for variant in self.variants}
        for run in sorted(self.runs, key=lambda run: run.seed):
            if run.counts:
                found[run.variant].append(run)
        return found

    @property
    def failed(self) -> list[ComparedRun]:
        return [run for run in self.runs if run.status == "failed"]


class Measure(_Frozen):
    """A quantity of a finished run, and over which domain it is taken (None: over all of them)."""

    name: MeasureName
    domain: str | None = None

    def of(self, run: ComparedRun) -> float | None:
        """The run's value at its end; None where it has no such domain.

        Over all domains, perplexity is their geometric mean and ratio their arithmetic mean, so that each counts the
        same; worst_ratio is the largest of the ratios.
        """
        return self.at(run.last, run.seq_len or 0)

    def at(self, record: MixtureRecord, seq_len: int) -> float | None:
        """The same at one measurement."""
        if self.domain is not None and self.domain not in record.perplexities:
            return None
        return _OVER_ONE[self.name](record, self.domain, seq_len) if self.domain else _OVER_ALL[self.name](record)


def ratios(record: MixtureRecord) -> dict[str, float]:
    """ℓ_S/ℓ_T by domain."""
    return {domain: both.student / both.teacher for domain, both in record.perplexities.items()}


def _share(record: MixtureRecord, domain: str) -> float:
    total = sum(record.blocks_drawn.values())
    return record.blocks_drawn.get(domain, 0) / total if total else math.nan


def geometric_mean(values: Mapping[Any, float]) -> float:
    """Of perplexities by domain: exp of the mean of their logarithms."""
    return math.exp(math.fsum(math.log(value) for value in values.values()) / len(values))


_OVER_ONE: Mapping[str, Callable[[MixtureRecord, str, int], float]] = {
    "perplexity": lambda record, domain, _: record.perplexities[domain].student,
    "ratio": lambda record, domain, _: ratios(record)[domain],
    "worst_ratio": lambda record, domain, _: ratios(record)[domain],
    "tokens": lambda record, domain, seq_len: float(record.blocks_drawn.get(domain, 0) * seq_len),
    "share": lambda record, domain, _: _share(record, domain),
}
_OVER_ALL: Mapping[str, Callable[[MixtureRecord], float]] = {
    "perplexity": lambda record: geometric_mean({d: both.student for d, both in record.perplexities.items()}),
    "ratio": lambda record: math.fsum(ratios(record).values()) / len(record.perplexities),
    "worst_ratio": lambda record: max(ratios(record).values()),
    "tokens": lambda record: float(record.tokens_seen),
    "share": lambda record: 1.0,
}

COMPARED: tuple[MeasureName, ...] = ("perplexity", "ratio", "worst_ratio")
"""Of which differences from the baseline are taken; of each, less is better."""
BY_DOMAIN: tuple[MeasureName, ...] = ("perplexity", "ratio", "tokens", "share")


def by_seed(comparison: Comparison, variant: str, measure: Measure) -> dict[int, float]:
    """The measure of each of a variant's finished runs."""
    values = {run.seed: measure.of(run) for run in comparison.of(variant)}
    return {seed: value for seed, value in values.items() if value is not None}


def spread_of(comparison: Comparison, variant: str, measure: Measure) -> Spread | None:
    """Over the seeds; None where no run of the variant is finished."""
    values = list(by_seed(comparison, variant, measure).values())
    return spread(values) if values else None


def difference_of(comparison: Comparison, variant: str, measure: Measure) -> Difference | None:
    """From the baseline, paired by seed; None for the baseline itself, and without a common seed."""
    if variant == comparison.baseline:
        return None
    return paired_difference(by_seed(comparison, variant, measure), by_seed(comparison, comparison.baseline, measure))


def regressed_domains(comparison: Comparison, variant: str) -> dict[str, float]:
    """The domains on which the student ends worse than it began, in the mean over the seeds, with the factor of each.

    Example: {'books': 1.062} where the perplexity on books rises by 6.2%.
    """
    runs = comparison.of(variant)
    found = {}
    for domain in comparison.domains:
        both = [
            (run.records[0].perplexities[domain].student, run.last.perplexities[domain].student)
            for run in runs
            if domain in run.last.perplexities
        ]
        if not both:
            continue
        before, after = (geometric_mean(dict(enumerate(values))) for values in zip(*both, strict=True))
        if has_regressed(before, after):
            found[domain] = after / before
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One variant between the two aims of a mixture: a small largest gap, and small perplexities everywhere."""

    variant: str
    perplexity: float
    """Geometric mean over the domains, mean over the seeds."""
    worst_ratio: float
    """The largest ratio of the domains, mean over the seeds."""
    perplexity_interval: tuple[float, float] | None
    """Of the paired difference from the baseline, at the baseline's place; None without one."""
    worst_ratio_interval: tuple[float, float] | None
    regressed: tuple[str, ...]
    """Domains on which the student ends worse than it began."""


def frontier(comparison: Comparison) -> list[FrontierPoint]:
    """A point for each variant with a finished run."""
    base = {measure.name: spread_of(comparison, comparison.baseline, measure) for measure in _AIMS}

    def interval(variant: str, measure: Measure) -> tuple[float, float] | None:
        difference, at = difference_of(comparison, variant, measure), base[measure.name]
        if difference is None or difference.low is None or difference.high is None or at is None:
            return None
        return at.mean + difference.low, at.mean + difference.high

    points = []
    for variant in comparison.variants:
        perplexity, worst = (spread_of(comparison, variant.name, measure) for measure in _AIMS)
        if perplexity is None or worst is None:
            continue
        points.append(
            FrontierPoint(
                variant=variant.name,
                perplexity=perplexity.mean,
                worst_ratio=worst.mean,
                perplexity_interval=interval(variant.name, _AIMS[0]),
                worst_ratio_interval=interval(variant.name, _AIMS[1]),
                regressed=tuple(regressed_domains(comparison, variant.name)),
            )
        )
    return points


_AIMS = (Measure(name="perplexity"), Measure(name="worst_ratio"))


def saved_flops(comparison: Comparison) -> dict[str, int | None]:
    """What the cache saved: `{"replaced", "captured", "saved"}`.

    `replaced` is what the finished runs would have spent on live forward passes of the teacher, `captured` what one
    capture of every store cost, `saved` their difference. None where a model's cost is not known.
    """
    replaced = [run.teacher_forwards("stored") for run in comparison.runs if run.counts]
    captured = [
        None if store.teacher_flops is None else store.positions * store.teacher_flops
        for store in comparison.stores.values()
        if store.captured
    ]
    known = None not in replaced and None not in captured
    spent = {name: sum(filter(None, values)) for name, values in (("replaced", replaced), ("captured", captured))}
    if not known:
        return {"replaced": None, "captured": None, "saved": None}
    return {**spent, "saved": spent["replaced"] - spent["captured"]}


def run_rows(comparison: Comparison) -> Iterator[Row]:
    """runs.csv: a row for every run and domain, and one over all domains (domain empty)."""
    for run in comparison.runs:
        common: Row = {"variant": run.variant, "seed": run.seed, "run": run.run, "status": run.status}
        domains = [*comparison.domains, None] if run.records else [None]
        for domain in domains:
            yield {**common, "domain": domain or "", **_values(run, domain), "reason": run.reason or ""}


def _values(run: ComparedRun, domain: str | None) -> Row:
    names = ("student_ppl_before", "student_ppl", "teacher_ppl", "ratio_before", "ratio", "worst_ratio", "tokens")
    costs = ("training_seconds", "training_flops", "evaluation_flops", "teacher_flops_live", "teacher_flops_stored")
    row: Row = dict.fromkeys(("step", *names, *costs))
    if run.records:
        first = run.records[0]

        def value(name: Any, record: MixtureRecord) -> float | None:
            return Measure(name=name, domain=domain).at(record, run.seq_len or 0)

        row |= {
            "step": run.last.step,
            "student_ppl_before": value("perplexity", first),
            "student_ppl": value("perplexity", run.last),
            "teacher_ppl": teacher_ppl(run.last, domain),
            "ratio_before": value("ratio", first),
            "ratio": value("ratio", run.last),
            "tokens": value("tokens", run.last),
        }
    if domain is None and run.records:
        row |= {
            "worst_ratio": Measure(name="worst_ratio").of(run),
            "training_seconds": run.training_seconds,
            "training_flops": run.training_flops,
            "evaluation_flops": run.evaluation_flops,
            "teacher_flops_live": run.teacher_forwards("live"),
            "teacher_flops_stored": run.teacher_forwards("stored"),
        }
    return row


def teacher_ppl(record: MixtureRecord, domain: str | None) -> float | None:
    """ℓ_T of a domain, or the geometric mean over all."""
    if domain is None:
        return geometric_mean({name: both.teacher for name, both in record.perplexities.items()})
    both = record.perplexities.get(domain)
    return None if both is None else both.teacher


def summary_rows(comparison: Comparison) -> Iterator[Row]:
    """summary.csv: a row for every variant, measure and domain (empty: over all domains)."""
    measures = [Measure(name=name) for name in COMPARED]
    measures += [Measure(name=name, domain=domain) for domain in comparison.domains for name in BY_DOMAIN]
    for variant in comparison.variants:
        for measure in measures:
            found = spread_of(comparison, variant.name, measure)
            if found is None:
                continue
            compared = measure.name in COMPARED
            difference = difference_of(comparison, variant.name, measure) if compared else None
            yield {
                "variant": variant.name,
                "method": variant.method,
                "measure": measure.name,
                "domain": measure.domain or "",
                "n": found.n,
                "mean": found.mean,
                "sd": found.sd,
                "difference": difference.mean if difference else None,
                "low": difference.low if difference else None,
                "high": difference.high if difference else None,
                "verdict": difference.verdict if difference else "",
            }
