"""A fitted law as it is stored and read back, in `<root>/laws/<name>/law.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddk.errors import UserError
from ddk.laws.answers import Outcome, outcome
from ddk.laws.fitting import Law, Span
from ddk.laws.forms import FormName, Shape
from ddk.laws.points import DomainPoints, Point, by_domain
from ddk.laws.quality import Errors, Quality, interval
from storage.files.fields import first_problem
from storage.files.names import plain_name
from storage.runs.reports import LawFolder

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pair = tuple[Positive, Positive]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredErrors(_Part):
    points: int = Field(ge=1)
    median: Finite
    largest: Finite


class StoredLaw(_Part):
    """Of one domain."""

    theta: tuple[Finite, ...]
    """See `ddk.laws.fitting.Law`."""
    units: Pair
    parameters: Pair
    """Smallest and largest that it was fitted to; likewise the next two."""
    tokens: Pair
    share: tuple[Annotated[float, Field(ge=0.0, le=1.0)], Annotated[float, Field(ge=0.0, le=1.0)]]
    constants: dict[str, Finite]
    resampled: tuple[tuple[Finite, ...], ...]
    """θ of the bootstrap over runs."""
    r2: Finite
    huber: Finite
    ratio: StoredErrors | None
    length: StoredErrors | None
    size: StoredErrors | None
    teacher: Finite
    """The teacher's loss, in nats per token."""
    start: dict[str, Finite]
    """The student's before any training, by its size N as text."""


class StoredPoint(_Part):
    run: str
    parameters: Positive
    tokens: Positive
    shares: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]]
    losses: dict[str, Positive]


class LawRecord(_Part):
    """The laws of all domains of one set of runs."""

    name: str
    form: FormName
    sized: bool
    domains: tuple[str, ...]
    laws: dict[str, StoredLaw]
    points: tuple[StoredPoint, ...]
    stores: dict[str, dict[str, str]]
    tokens_per_step: int = Field(ge=1)
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _fits_together(self) -> LawRecord:
        wanted = len(Shape(self.form, len(self.domains), self.sized).bounds)
        if set(self.laws) != set(self.domains):
            raise ValueError("its laws are of other domains than it says")
        for domain, law in self.laws.items():
            if any(len(theta) != wanted for theta in (law.theta, *law.resampled)):
                raise ValueError(f"the law of '{domain}' does not have {wanted} constants")
        return self

    def law(self, domain: str, theta: Sequence[float] | None = None) -> Law:
        """The law of a domain; with `theta`, one of its resamplings."""
        stored = self.laws[domain]
        return Law(
            domain=domain,
            domains=self.domains,
            form=self.form,
            sized=self.sized,
            theta=tuple(stored.theta if theta is None else theta),
            units=stored.units,
            span=Span(parameters=stored.parameters, tokens=stored.tokens, share=stored.share),
        )

    @cached_property
    def fitted(self) -> dict[str, Law]:
        return {domain: self.law(domain) for domain in self.domains}

    @cached_property
    def teacher(self) -> dict[str, float]:
        return {domain: law.teacher for domain, law in self.laws.items()}

    @property
    def sizes(self) -> tuple[float, ...]:
        return tuple(sorted({point.parameters for point in self.points}))

    def start(self, parameters: float) -> dict[str, float]:
        """The student's losses before any training.

        Raises:
            UserError: no run of this size was measured before training.
        """
        found = {domain: law.start.get(repr(parameters)) for domain, law in self.laws.items()}
        if any(loss is None for loss in found.values()):
            raise UserError(
                f"law '{self.name}' has no run of a student with {parameters:.4g} parameters that was measured before "
                f"training"
            )
        return {domain: float(loss) for domain, loss in found.items() if loss is not None}

    @cached_property
    def resamplings(self) -> list[dict[str, Law]]:
        """The laws of each resampling of the runs, all domains of one together."""
        times = min(len(law.resampled) for law in self.laws.values())
        return [
            {domain: self.law(domain, self.laws[domain].resampled[at]) for domain in self.domains}
            for at in range(times)
        ]

    def outcome(self, parameters: float, tokens: float, mixture: Mapping[str, float]) -> Predicted:
        """What a run is predicted to end with, with 95% intervals where the runs can be resampled."""
        middle = outcome(self.fitted, self.teacher, parameters, tokens, mixture)
        others = [outcome(laws, self.teacher, parameters, tokens, mixture) for laws in self.resamplings]
        return Predicted(
            outcome=middle,
            worst=_interval([one.worst for one in others]),
            mean=_interval([math.exp(one.mean) for one in others]),
            ratios={domain: _interval([one.ratios[domain] for one in others]) for domain in self.domains},
            outside=self.outside(parameters, tokens, mixture),
        )

    def outside(self, parameters: float, tokens: float, mixture: Mapping[str, float]) -> list[str]:
        """In words, where a run lies outside what the law was fitted to."""
        said = [
            f"{domain}: {part}"
            for domain, law in self.fitted.items()
            for part in law.outside(parameters, tokens, mixture[domain])
        ]
        # Size and tokens are the same for all domains: said once.
        return list(dict.fromkeys(part.partition(": ")[2] if ": share" not in part else part for part in said))

    def domain_points(self) -> dict[str, DomainPoints]:
        return by_domain([Point(**point.model_dump()) for point in self.points])


class Predicted(BaseModel):
    """An outcome with its intervals; None where there is nothing to resample."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    outcome: Outcome
    worst: tuple[float, float] | None
    """Of the largest ratio."""
    mean: tuple[float, float] | None
    """Of the geometric mean of the perplexities."""
    ratios: dict[str, tuple[float, float] | None]
    outside: list[str]


def stored_law(
    law: Law, quality: Quality, resampled: Sequence[Law], teacher: float, start: Mapping[float, float]
) -> StoredLaw:
    return StoredLaw(
        theta=law.theta,
        units=law.units,
        parameters=law.span.parameters,
        tokens=law.span.tokens,
        share=law.span.share,
        constants=law.constants,
        resampled=tuple(one.theta for one in resampled),
        r2=quality.r2,
        huber=quality.huber,
        ratio=_errors(quality.ratio),
        length=_errors(quality.length),
        size=_errors(quality.size),
        teacher=teacher,
        start={repr(size): loss for size, loss in start.items()},
    )


def read_law(root: str, name: str) -> LawRecord:
    """A law as it was last written.

    Raises:
        UserError: there is none.
        StoreDamagedError, FormatVersionError: it cannot be read.
    """
    folder = LawFolder(root, plain_name(name, "--name"))
    content = folder.data()
    if content is None:
        raise UserError(f"there is no {folder.data_url}; fit one with `ddk law CONFIG --runs 'PATTERN'`")
    try:
        return LawRecord.model_validate(content)
    except ValidationError as error:
        raise folder.damaged(first_problem(error)) from None


def _errors(errors: Errors | None) -> StoredErrors | None:
    if errors is None:
        return None
    return StoredErrors(points=errors.points, median=errors.median, largest=errors.largest)


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    return interval(np.array(values)) if len(values) > 1 else None
