"""The mixture history of a run, append-only: each measured gap, and the mixture that results from it.

    <run>/mixtures/00000.json    version 0: the gap before any training, and the first interval's mixture
    <run>/mixtures/00001.json    version 1: the gap after the first interval, and the second's mixture
    …

A record is written once, in one atomic step, and never changed. Training and evaluation communicate only through these
files: training reads the newest record, and evaluation appends one. Each record is sealed to its run and version
(`storage.files.sealed`), and its values are checked before a mixture is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddk.values import DomainGap, Mixture
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.fields import Whole, first_problem
from storage.files.sealed import Sealed
from storage.runs.folder import run_key

FORMAT_VERSION = 2
_REMEDY = "restore it, or remove it and the versions after it: the gap is then measured again"
_RECORD = Sealed(what="mixture record", version=FORMAT_VERSION, remedy=_REMEDY)

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Perplexity = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Perplexities(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    student: _Perplexity
    teacher: _Perplexity


class MixtureRecord(BaseModel):
    """One version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    version: Whole
    """t, from 0."""
    step: Whole
    """Optimizer steps that the measured student had done."""
    tokens_seen: Whole
    """Positions it had been trained on."""
    perplexities: dict[str, _Perplexities]
    """Of student and teacher, by domain."""
    probabilities: dict[str, float]
    """The mixture to train on from here."""
    blocks_drawn: dict[str, Whole]
    """Blocks that the student had read, by domain."""
    positions: dict[str, Whole] | None = None
    """Validation positions that the perplexities are means over, by domain: what rolls them up along the domains'
    paths. None where there is nothing to roll up."""
    kl: dict[str, _Number] | None = None
    """Mean divergence of the student from the teacher per validation token, in nats, by domain; one that was no finite
    number is left out. None where no targets are read, and in records of older versions."""
    train_blocks: dict[str, Annotated[int, Field(ge=1, strict=True)]] | None = None
    """Different blocks that there are to draw, by domain; None in records of older versions."""
    capped: tuple[str, ...] | None = None
    """Domains whose probability was limited because they had been seen too often; None where there are none."""

    @model_validator(mode="after")
    def _one_set_of_domains(self) -> MixtureRecord:
        domains = set(self.perplexities)
        if set(self.probabilities) != domains:
            raise ValueError("its perplexities and probabilities are of different domains")
        further = (self.positions, self.kl, self.train_blocks)
        if not {*self.blocks_drawn, *(self.capped or ())}.union(*(one or {} for one in further)) <= domains:
            raise ValueError("its blocks or positions are of other domains")
        Mixture(probabilities=self.probabilities)  # that they are probabilities
        return self

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
    kl: Mapping[str, float] | None = None,
    train_blocks: Mapping[str, int] | None = None,
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
        kl=None if kl is None else dict(sorted(kl.items())),
        train_blocks=None if train_blocks is None else dict(sorted(train_blocks.items())),
    )


class MixtureHistory:
    """The records of one run, read afresh at every call."""

    def __init__(self, run_url: str) -> None:
        self._run_url = run_url
        self._url = uri.join(run_url, "mixtures")

    def records(self) -> list[MixtureRecord]:
        """All versions, oldest first.

        Raises:
            StoreDamagedError: a record is missing or cannot be read.
            FormatVersionError: written by a newer version.
        """
        names = [name for name in uri.list_names(self._url) if name.endswith(".json")]
        if not names:
            return []
        expected = [f"{version:05d}.json" for version in range(len(names))]
        if names != expected:
            raise StoreDamagedError(f"{self._url} lacks a version: it holds {', '.join(names)}; {_REMEDY}")
        key = run_key(self._run_url)
        places = [uri.join(self._url, name) for name in names]
        contents = _RECORD.read_many(places, [self._of(version, key) for version in range(len(names))])
        return [
            self._parsed(place, version, content)
            for version, (place, content) in enumerate(zip(places, contents, strict=True))
        ]

    def _of(self, version: int, key: str) -> str:
        return f"mixture {version} of run '{uri.name_of(self._run_url)}' ({key})"

    @staticmethod
    def _parsed(place: str, version: int, content: dict[str, Any] | None) -> MixtureRecord:
        if content is None:
            raise StoreDamagedError(f"{place} has gone while it was read; {_REMEDY}")
        try:
            record = MixtureRecord.model_validate(content)
        except ValidationError as error:
            raise _RECORD.damaged(place, first_problem(error)) from None
        if record.version != version:
            raise _RECORD.damaged(place, f"it says that it is version {record.version}")
        return record

    def whole(self, summary: Mapping[str, Any] | None) -> list[MixtureRecord]:
        """All versions of a run, of which the last must be there where the run is complete.

        Args:
            summary: the run's (`RunFolder.summary`).

        Raises:
            StoreDamagedError: as `records`; or the last one is missing.
        """
        records = self.records()
        if summary is not None and "steps" in summary and (not records or records[-1].step != summary["steps"]):
            place = uri.join(self._url, f"{len(records):05d}.json")
            raise StoreDamagedError(f"{place} is missing: it held the measurement of the final student; {_REMEDY}")
        return records

    def at_step(self, step: int) -> MixtureRecord | None:
        """The newest record of the student at this step; None if it has not been measured."""
        return next((record for record in reversed(self.records()) if record.step == step), None)

    def append(self, record: MixtureRecord) -> None:
        """Add the next version.

        Raises:
            ValueError: it is not the next one; another evaluator was quicker, or it is a second measurement of the
                same student. Nothing has been changed then.
        """
        expected = len(self.records())
        place = uri.join(self._url, f"{record.version:05d}.json")
        of = self._of(record.version, run_key(self._run_url))
        if record.version == expected and not _RECORD.create(place, record.model_dump(exclude_none=True), of):
            expected += 1  # since then another was written
        if record.version != expected:
            raise ValueError(f"{self._url} expects version {expected}; this record is version {record.version}")
