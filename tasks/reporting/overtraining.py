"""The domains that a run has seen too often (`ddk.overtraining`): found in its stored measurements, and how they are
shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ddk.overtraining import Alarm, Measurement, alarms
from ddk.train_config import EPOCH_LIMIT
from storage.runs.mixtures import MixtureRecord
from tasks.reporting.records import IntervalRecord
from tasks.showing.formats import UNKNOWN, escape, number_or_unknown


def alarms_of(records: Sequence[MixtureRecord], epoch_limit: float | None) -> tuple[Alarm, ...]:
    """Every alarm of a run's history; none where it does not say how many blocks there are, as older ones do not."""
    history: dict[str, list[Measurement]] = {}
    for record in records:
        drawn = sum(record.blocks_drawn.values())
        for gap in record.gaps:
            history.setdefault(gap.domain, []).append(
                Measurement(
                    step=record.step,
                    ce=math.log(gap.student_ppl),
                    kl=(record.kl or {}).get(gap.domain),
                    blocks_drawn=record.blocks_drawn.get(gap.domain, 0),
                    all_drawn=drawn,
                    train_blocks=(record.train_blocks or {}).get(gap.domain),
                )
            )
    return alarms(history, epoch_limit)


def epoch_limit_of(config: Mapping[str, Any] | None) -> float | None:
    """`train.epoch_limit` of a run's stored configuration; the default where an older version has stored it."""
    found: float | None = (config or {}).get("train", {}).get("epoch_limit", EPOCH_LIMIT)
    return found


def said(alarm: Alarm) -> str:
    """'step 60, math: its 20 train blocks were read 4.8 times, the limit is 4'."""
    return f"step {alarm.step:,}, {alarm.domain}: {alarm.sentence}"


def all_alarms(records: Sequence[IntervalRecord]) -> list[Alarm]:
    """In the order in which they were raised."""
    return [alarm for record in records for alarm in record.alarms]


def too_often(records: Sequence[IntervalRecord]) -> str:
    """What to say of the domains that have an alarm; '' where there are none.

    'Seen too often: math (since step 60), web (since step 90).'
    """
    since: dict[str, int] = {}
    for alarm in all_alarms(records):
        since.setdefault(alarm.domain, alarm.step)
    named = ", ".join(f"{domain} (since step {step:,})" for domain, step in since.items())
    return f"Seen too often: {named}." if named else ""


def overtraining_rows(records: Sequence[IntervalRecord]) -> list[dict[str, str]]:
    """The newest measurement for a table, a row a domain: that with most epochs first."""
    now, found = records[-1], all_alarms(records)
    domains = sorted(now.mixture.domains, key=lambda domain: (-(now.epochs(domain) or 0.0), domain))
    return [
        {
            "domain": escape(domain),
            "epochs": number_or_unknown(now.epochs(domain), 2),
            "held-out cross-entropy": number_or_unknown(math.log(now.gap(domain).student_ppl), 4),
            "held-out KL": number_or_unknown(now.kl.get(domain), 4),
            "seen too often": "; ".join(
                escape(f"step {alarm.step:,}: {alarm.sentence}") for alarm in found if alarm.domain == domain
            )
            or UNKNOWN,
            "share": "capped" if domain in now.capped else "free",
        }
        for domain in domains
    ]
