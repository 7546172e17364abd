"""The mixture history of a run: what was measured, and the mixture that follows from it. Append-only.

    <run>/mixtures/00000.json    version 0: the gap before any training, and the first interval's mixture
    <run>/mixtures/00001.json    version 1: the gap after the first interval, and the second's mixture
    …

A record is written once, in one atomic step, and never changed. The loop between training and evaluation closes
through these files alone: whoever trains reads the newest, whoever evaluates appends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ddk.types import DomainGap, Mixture
from storage import uri
from storage.errors import FormatVersionError, StoreDamagedError

FORMAT_VERSION = 1
_REMEDY = "restore it, or remove it and the versions after it: the gap is then measured again"


class _Perplexities(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    student: float
    teacher: float


class MixtureRecord(BaseModel):
    """One version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    version: int
    """t, from 0."""
    step: int
    """Optimizer steps that the measured student had done."""
    tokens_seen: int
    """Positions it had been trained on."""
    perplexities: dict[str, _Perplexities]
    """Of student and teacher, by domain."""
    probabilities: dict[str, float]
    """The mixture to train on from here."""
    blocks_drawn: dict[str, int]
    """Blocks that the student had read, by domain."""
    positions: dict[str, int] | None = None
    """Validation positions that the perplexities are means over, by domain: what rolls them up along the domains'
    paths. None where there is nothing to roll up."""

    @property
    def gaps(self) -> tuple[DomainGap, ...]:
        return tuple(
            DomainGap(domain=domain, student_ppl=both.student, teacher_ppl=both.teacher)
            for domain, both in self.perplexities.items()
        )

    @property
    def mixture(self) -> Mixture:
        return Mixture(probabilities=self.probabilities)


def make_record(
    *,
    version: int,
    step: int,
    tokens_seen: int,
    gaps: Sequence[DomainGap],
    mixture: Mixture,
    blocks_drawn: Mapping[str, int],
    positions: Mapping[str, int] | None = None,
) -> MixtureRecord:
    """A record of domains in alphabetical order, in which it is stored and comes back."""
    return MixtureRecord(
        version=version,
        step=step,
        tokens_seen=tokens_seen,
        perplexities={
            gap.domain: _Perplexities(student=gap.student_ppl, teacher=gap.teacher_ppl)
            for gap in sorted(gaps, key=lambda gap: gap.domain)
        },
        probabilities=dict(sorted(mixture.probabilities.items())),
        blocks_drawn=dict(sorted(blocks_drawn.items())),
        positions=None if positions is None else dict(sorted(positions.items())),
    )


class MixtureHistory:
    """The records of one run, read afresh at every call."""

    def __init__(self, run_url: str) -> None:
        self._url = uri.join(run_url, "mixtures")

    def records(self) -> list[MixtureRecord]:
        """All versions, oldest first.

        Raises:
            StoreDamagedError: a record is missing or cannot be read.
            FormatVersionError: written by a newer version.
        """
        names = [name for name in uri.list_names(self._url) if name.endswith(".json")]
        places = [uri.join(self._url, name) for name in names]
        try:
            contents = uri.read_jsons(places)
        except StoreDamagedError as error:
            raise StoreDamagedError(f"{error}; {_REMEDY}") from None
        records = [_parse(place, content) for place, content in zip(places, contents, strict=True)]
        if [record.version for record in records] != list(range(len(records))):
            raise StoreDamagedError(f"{self._url} lacks a version: it holds {', '.join(names)}; {_REMEDY}")
        return records

    def at_step(self, step: int) -> MixtureRecord | None:
        """The newest record of a student with so many steps; None where it has not been measured."""
        return next((record for record in reversed(self.records()) if record.step == step), None)

    def append(self, record: MixtureRecord) -> None:
        """Add the next version.

        Raises:
            ValueError: it is not the next one; another evaluator was quicker, or it is a second measurement of the
                same student. Nothing has been changed then.
        """
        expected = len(self.records())
        place = uri.join(self._url, f"{record.version:05d}.json")
        if record.version == expected and not uri.create_json(place, record.model_dump(exclude_none=True)):
            expected += 1  # since then another was written
        if record.version != expected:
            raise ValueError(f"{self._url} expects version {expected}; this record is version {record.version}")


def _parse(place: str, content: Any) -> MixtureRecord:
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{place} has format version {version}, and this version of ddk reads up to {FORMAT_VERSION}; update ddk"
        )
    try:
        return MixtureRecord.model_validate(content)
    except ValidationError as error:
        raise StoreDamagedError(f"{place} is not a mixture record ({error.errors()[0]['msg']}); {_REMEDY}") from None
