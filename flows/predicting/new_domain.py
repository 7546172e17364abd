"""Predicts a domain that a law has not seen, from the beginning of one run that has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ddk.errors import UserError
from ddk.laws.cross import Beginning, CrossLaw, fit_across
from ddk.laws.points import DomainPoints
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from tasks.predicting.record import LawRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDomain:
    """What is predicted of it."""

    domain: str
    start: float
    """Its loss before any training."""
    teacher: float
    tokens: float
    """That it was measured after: the part of a run that the prediction costs."""
    places: list[tuple[float, float, float]]
    """(tokens, share, predicted loss)"""


def predict_new(root: str, record: LawRecord, domain: str, run: str, tokens: float) -> NewDomain:
    """The losses of a new domain, at several shares of a run of so many tokens.

    Args:
        run: that has the domain, and was measured before training and at least once after it began.

    Raises:
        UserError: there is no such run, it lacks the domain or the measurements, or the law knows too few domains.
    """
    if domain in record.domains:
        raise UserError(f"law '{record.name}' knows '{domain}'; --new-domain is for one that its runs did not have")
    folder = RunFolder(root, run)
    records = MixtureHistory(folder.url).records()
    if not records or domain not in records[0].perplexities:
        held = ", ".join(records[0].perplexities) if records else "nothing"
        raise UserError(f"run '{run}' in {folder.url} has measured {held}, and not '{domain}'; name one with --run")
    after = next((one for one in records if one.tokens_seen > 0), None)
    if after is None or records[0].tokens_seen > 0:
        raise UserError(
            f"run '{run}' was not measured both before training and after its first interval; train it for an interval"
        )
    points = record.domain_points()
    law = fit_across(points, known_beginnings(record, points))
    gap = next(gap for gap in records[0].gaps if gap.domain == domain)
    known = Beginning(
        first=math.log(gap.student_ppl),
        after=_loss(after, domain),
        tokens=float(after.tokens_seen),
        share=after.blocks_drawn.get(domain, 0) / max(1, sum(after.blocks_drawn.values())),
        teacher=math.log(gap.teacher_ppl),
    )
    return NewDomain(
        domain=domain,
        start=known.first,
        teacher=known.teacher,
        tokens=known.tokens,
        places=_places(law, known, record, tokens),
    )


def known_beginnings(record: LawRecord, points: Mapping[str, DomainPoints]) -> dict[str, Beginning]:
    """Of the law's own domains: from their losses before training, and the earliest point of the run that drew them
    most evenly."""
    found = {}
    for domain, one in points.items():
        first = one.tokens == one.tokens.min()
        even = int(np.argmin(np.where(first, np.abs(one.own - 1 / len(points)), np.inf)))
        found[domain] = Beginning(
            first=record.start(float(one.parameters[0]))[domain],
            after=float(one.losses[even]),
            tokens=float(one.tokens[even]),
            share=float(one.own[even]),
            teacher=record.teacher[domain],
        )
    return found


def _places(law: CrossLaw, known: Beginning, record: LawRecord, tokens: float) -> list[tuple[float, float, float]]:
    low = min(one.span.share[0] for one in record.fitted.values())
    high = max(one.span.share[1] for one in record.fitted.values())
    shares = np.linspace(low, high, 7)
    losses = law.losses(np.full(len(shares), tokens), shares, known)
    return [(tokens, share, loss) for share, loss in zip(shares.tolist(), losses.tolist(), strict=True)]


def _loss(record: MixtureRecord, domain: str) -> float:
    return math.log(next(gap for gap in record.gaps if gap.domain == domain).student_ppl)
