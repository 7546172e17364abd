"""The data of a run's report: its input values, and the flat rows that every form of the report shows.

The page, the plots, the model card, the CSV and Prefect's tables are all made from the two values below, so that
they cannot disagree. Nothing here reads a store or a clock.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from ddk.overtraining import Alarm
from ddk.values import DomainGap, Mixture, has_regressed, worst_first
from tasks.showing.formats import csv_cell

Row = dict[str, Any]
"""A flat row: a name of a column → text, number or None (not known)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRecord:
    """The state of a run at one version t of its mixture. t = 0 is measured before any training."""

    t: int
    step: int
    """Optimizer steps done when the gap was measured."""
    tokens_seen: int
    """Tokens that the student has been trained on by then."""
    gaps: tuple[DomainGap, ...]
    mixture: Mixture
    """What the following interval draws by."""
    blocks_drawn: Mapping[str, int]
    """Blocks of each domain that the student has read up to `step`; a domain left out has none."""
    positions: Mapping[str, int] = field(default_factory=dict)
    """Validation positions that a domain's perplexities are means over; empty where that is not known."""
    kl: Mapping[str, float] = field(default_factory=dict)
    """Mean divergence from the teacher per validation token, in nats; a domain without one is left out."""
    train_blocks: Mapping[str, int] = field(default_factory=dict)
    """Different blocks of each domain; empty where that is not known."""
    alarms: tuple[Alarm, ...] = ()
    """That this measurement has raised, of domains seen too often."""
    capped: tuple[str, ...] = ()
    """Domains whose probability is limited for that."""

    def __post_init__(self) -> None:
        measured = [gap.domain for gap in self.gaps]
        if sorted(measured) != sorted(self.mixture.domains):
            raise ValueError(
                f"record t = {self.t} measures the domains {measured}, but its mixture is over "
                f"{list(self.mixture.domains)}; both must name each domain once"
            )
        for counts in ("blocks_drawn", "positions", "kl", "train_blocks"):
            object.__setattr__(self, counts, MappingProxyType(dict(getattr(self, counts))))

    def gap(self, domain: str) -> DomainGap:
        return next(gap for gap in self.gaps if gap.domain == domain)

    def epochs(self, domain: str) -> float | None:
        """How often the domain's train blocks had been read, on average; None where their number is not known."""
        blocks = self.train_blocks.get(domain)
        return self.blocks_drawn.get(domain, 0) / blocks if blocks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What identifies a run and how far it came."""

    name: str
    method: str
    """The method's name in the configuration, such as `ddk` or `kd`."""
    teacher: str
    """Hub id or path."""
    student: str
    """Hub id or path of the student before training."""
    domains: tuple[str, ...]
    tokens_seen: int
    steps: int
    seq_len: int
    """Predictions in a block."""
    settings: Mapping[str, object]
    """The resolved configuration as nested plain data; holds no secrets."""
    wall_seconds: float | None
    """Of training as a whole: loading, steps, measurements, checkpoints. None where it is not known."""
    stopped_early: str | None
    """Why the run ended before its budget was used up; None where it did not."""
    gone_on_from: str = ""
    """Which other run's checkpoint it goes on from, as part of a sentence; empty where it began with the student."""
    costs: Mapping[str, object] = field(default_factory=dict)
    """What it took, in time and bytes: `tasks.reporting.costs.costs_of`."""
    selections: tuple[Mapping[str, object], ...] = ()
    """Of the domains whose blocks were chosen: `tasks.reporting.selections.selections_of`."""
    context: Mapping[str, object] | None = None
    """Fields of `ddk.context.ContextPlan`, of a student that was prepared for longer contexts."""


def domains_of(records: Sequence[IntervalRecord]) -> tuple[str, ...]:
    """The domains, in the order of the first record's mixture.

    Raises:
        ValueError: there are no records, they are out of order, or they differ in their domains.
    """
    if not records:
        raise ValueError(
            "there is nothing to report: the mixture history is empty; run the training's first gap measurement"
        )
    domains = records[0].mixture.domains
    for previous, record in pairwise(records):
        if record.t <= previous.t or record.tokens_seen < previous.tokens_seen:
            raise ValueError(
                f"the mixture history is out of order: version {previous.t} at {previous.tokens_seen} tokens is "
                f"followed by version {record.t} at {record.tokens_seen} tokens; sort it by t"
            )
        if set(record.mixture.domains) != set(domains):
            raise ValueError(
                f"version {record.t} has the domains {sorted(record.mixture.domains)}, the first version has "
                f"{sorted(domains)}; a run keeps its domains from start to end"
            )
    return domains


def render_rows(records: Sequence[IntervalRecord]) -> list[Row]:
    """One row per version and domain, for CSV, JSON and notebooks: plain numbers, not rounded."""
    return [
        {
            "t": record.t,
            "step": record.step,
            "tokens_seen": record.tokens_seen,
            "domain": domain,
            "student_ppl": record.gap(domain).student_ppl,
            "teacher_ppl": record.gap(domain).teacher_ppl,
            "ratio": record.gap(domain).ratio,
            "probability": record.mixture.probabilities[domain],
            "blocks_drawn": record.blocks_drawn.get(domain, 0),
            "epochs": record.epochs(domain),
            "kl": record.kl.get(domain),
        }
        for domains in (domains_of(records),)
        for record in records
        for domain in domains
    ]


def gap_table(records: Sequence[IntervalRecord]) -> list[Row]:
    """One row per domain, before (first record) and after (last record); the domain that lagged most comes first.

    `token_share` is the domain's share of all tokens drawn (blocks are equally long), None before any was drawn.
    `regressed` says that the student is worse on the domain than before training, `overtrained` that the domain was
    seen too often.
    """
    domains = domains_of(records)
    first, last = records[0], records[-1]
    total = sum(last.blocks_drawn.values())
    rows = [
        {
            "domain": domain,
            "teacher_ppl": last.gap(domain).teacher_ppl,
            "student_ppl_before": first.gap(domain).student_ppl,
            "student_ppl_after": last.gap(domain).student_ppl,
            "regressed": has_regressed(first.gap(domain).student_ppl, last.gap(domain).student_ppl),
            "ratio_before": first.gap(domain).ratio,
            "ratio_after": last.gap(domain).ratio,
            "blocks_drawn": last.blocks_drawn.get(domain, 0),
            "token_share": last.blocks_drawn.get(domain, 0) / total if total else None,
            "final_probability": last.mixture.probabilities[domain],
            "epochs": last.epochs(domain),
            "overtrained": any(alarm.domain == domain for record in records for alarm in record.alarms),
        }
        for domain in domains
    ]
    return sorted(rows, key=lambda row: worst_first(row["ratio_before"]))


def regressions(rows: Sequence[Row]) -> str:
    """What to say of the domains in `gap_table` on which the student is worse than before training; '' of none.

    'Worse than before training: books (+6.2%), web (+8.7%).'
    """
    named = [
        f"{row['domain']} (+{100 * (row['student_ppl_after'] / row['student_ppl_before'] - 1):.1f}%)"
        for row in rows
        if row["regressed"]
    ]
    return f"Worse than before training: {', '.join(named)}." if named else ""


def render_csv(rows: Sequence[Row]) -> str:
    """Comma-separated, with a header line and `\\n` line ends; numbers in full precision, and no text a formula."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def plain(value: object) -> Any:
    """`value` as strict JSON can hold it: NaN and infinity become None, what has no JSON form becomes text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            return str(value)


def flat_settings(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(`train.learning_rate`, `3e-05`) … of a nested configuration, in its own order."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            shown = plain(value)
            yield f"{prefix}{key}", shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
