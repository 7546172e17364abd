"""Where a run goes on from another one's checkpoint (`train.from_run`): which, and what of it is taken along.

What was found is part of the run's identity. A run that has begun takes it from there, so that it does not depend on
what becomes of the other run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddk.errors import UserError
from ddk.methods.registry import METHODS
from ddk.mixture import weighted_mixture
from ddk.values import Mixture
from storage.errors import StoreDamagedError
from storage.files.fields import Whole, first_problem
from storage.fingerprint import fingerprint
from storage.runs.branching import branch_off
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from tasks.training.rank_state import state_as_json, state_from_json
from tasks.training.run_settings import RunSettings


class Ancestry(BaseModel):
    """What a run was begun from; plain data, part of its identity."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    step: Whole
    """Of the checkpoint."""
    identity: str
    """Fingerprint of that run's own identity."""
    files: dict[str, str]
    """sha256 of the checkpoint's files, by name."""
    optimizer: bool
    """Whether the optimizer's moments are taken along."""
    history: bool
    """Whether the mixture history is: all domains are the same, with the same blocks and targets."""
    counted: tuple[str, ...]
    """Domains whose blocks are the same, so that drawing goes on where it stood."""
    tokens: Whole
    """Positions trained on that the counts of these domains leave out."""
    mixture: dict[str, float] = Field(min_length=1)
    """What the other run was last trained under."""

    def mixture_over(self, domains: list[str]) -> Mixture:
        """That mixture over other domains: one that is new has 1/N, and the others share the rest as before."""
        known = {domain: self.mixture[domain] for domain in domains if self.mixture.get(domain, 0.0) > 0.0}
        new = [domain for domain in domains if domain not in known]
        left, total = 1.0 - len(new) / len(domains), sum(known.values())
        return weighted_mixture(
            {domain: known[domain] / total * left if domain in known else 1.0 / len(domains) for domain in domains}
        )


def find_ancestry(
    settings: RunSettings, student: Mapping[str, Any], stores: Mapping[str, Mapping[str, str]], seq_len: int
) -> Ancestry | None:
    """What the run goes on from; None where it begins with the student itself.

    Args:
        student: the fields of the run's identity that say which model is trained: `student`, `attention`, `vocabulary`.
        stores: as the identity has them.

    Raises:
        UserError: there is no such run or checkpoint, or it does not fit this run.
    """
    if settings.train.from_run is None:
        return None
    name, _, at = settings.train.from_run.partition("@")
    asked = int(at) if at else None
    begun = (RunFolder(settings.root, settings.run).identity() or {}).get("from")
    if begun is not None:
        found = _ancestry(begun, RunFolder(settings.root, settings.run).url)
        if found.run == name and asked in (None, found.step):
            return found
    if name == settings.run:
        raise UserError(
            f"train.from_run is '{name}', which is this run itself; give the new run a name of its own (--run NAME)"
        )
    source = RunFolder(settings.root, name)
    identity = source.identity()
    if identity is None:
        raise UserError(f"train.from_run: there is no run '{name}' below {settings.root}; `ddk runs` lists them")
    step = _step(source, asked)
    if step >= settings.train.steps:
        raise UserError(
            f"train.steps is {settings.train.steps}, and run '{name}' is at step {step} already; steps count on from "
            f"there: raise train.steps"
        )
    _check_same_student(name, identity, student)
    _check_method(name, str(identity.get("method")), settings)
    return _described(settings, source, identity, step, stores, seq_len)


def branch(settings: RunSettings, ancestry: Ancestry, domains: Iterable[str]) -> None:
    """Copy what is taken along into the run's folder, which is claimed already.

    Args:
        domains: of the run.

    Raises:
        UserError: the other run has gone meanwhile, or is not what it was.
    """
    source, into = RunFolder(settings.root, ancestry.run), RunFolder(settings.root, settings.run)
    checkpoints = CheckpointFolder(source.url)
    if ancestry.step not in checkpoints.steps() or checkpoints.digests(ancestry.step) != ancestry.files:
        raise UserError(
            f"run '{settings.run}' was to go on from step {ancestry.step} of run '{ancestry.run}', whose checkpoint is "
            f"not there any more, or is another; restore it, or begin a run of another name"
        )
    stored = state_from_json(checkpoints.state(ancestry.step), checkpoints.url(ancestry.step))
    drawn = {domain: stored.sampler.drawn[domain] if domain in ancestry.counted else 0 for domain in domains}
    state = state_as_json(stored) | {"drawn": drawn}
    if not ancestry.history:
        state["mixture_versions"] = []
    if not ancestry.optimizer:
        state["optimizer_start"] = ancestry.step
    records = _records_before(source, ancestry.step) if ancestry.history else []
    branch_off(source, into, ancestry.step, records, state)


def _step(source: RunFolder, asked: int | None) -> int:
    steps = CheckpointFolder(source.url).steps()
    if not steps or (asked is not None and asked not in steps):
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"train.from_run: run '{source.name}' has no checkpoint{'' if asked is None else f' of step {asked}'}; its "
            f"checkpoints are of the steps: {there} (train.keep_checkpoints says how many are kept)"
        )
    return steps[-1] if asked is None else asked


def _check_same_student(name: str, identity: Mapping[str, Any], student: Mapping[str, Any]) -> None:
    for field, own in student.items():
        if identity.get(field) != own:
            raise UserError(
                f"train.from_run: run '{name}' began with another {field} than this configuration names; set "
                f"student.model and teacher.model to those of that run"
            )


def _check_method(name: str, theirs: str, settings: RunSettings) -> None:
    with_teacher = {method for method, known in METHODS.items() if known.needs_teacher}
    if theirs != settings.method and {theirs, settings.method} & with_teacher:
        raise UserError(
            f"train.from_run: run '{name}' is of method {theirs} and this one of {settings.method}; method ted trains "
            f"filters beside the student, which no other method has: choose the same method"
        )


def _described(
    settings: RunSettings,
    source: RunFolder,
    identity: Mapping[str, Any],
    step: int,
    stores: Mapping[str, Mapping[str, str]],
    seq_len: int,
) -> Ancestry:
    checkpoints = CheckpointFolder(source.url)
    theirs: Mapping[str, Mapping[str, str]] = identity["stores"]
    drawn = state_from_json(checkpoints.state(step), checkpoints.url(step)).sampler.drawn
    # How far a domain's blocks were drawn means something for these very blocks, chosen in the same way.
    drawing = ("blocks", "selections")
    counted = tuple(
        domain
        for domain, of in sorted(stores.items())
        if domain in theirs and all(theirs[domain].get(kind) == of.get(kind) for kind in drawing)
    )
    trained = _records_before(source, step)
    record = trained[-1]
    earlier = identity.get("from")
    positions = sum(drawn.values()) * _seq_len_of(source, seq_len)
    positions += _ancestry(earlier, source.url).tokens if earlier is not None else 0
    return Ancestry(
        run=source.name,
        step=step,
        identity=fingerprint(identity),
        files=checkpoints.digests(step),
        optimizer=settings.train.from_optimizer,
        history=dict(theirs) == {domain: dict(of) for domain, of in stores.items()},
        counted=counted,
        tokens=positions - sum(drawn[domain] for domain in counted) * seq_len,
        mixture=dict(record.probabilities),
    )


def _seq_len_of(source: RunFolder, seq_len: int) -> int:
    config = source.config() or {}
    return int(config.get("packing", {}).get("seq_len", seq_len))


def _records_before(source: RunFolder, step: int) -> list[MixtureRecord]:
    records = [record for record in MixtureHistory(source.url).records() if record.step < step]
    if not records:
        raise UserError(f"train.from_run: run '{source.name}' has no mixture history before step {step}")
    return records


def _ancestry(stored: Any, url: str) -> Ancestry:
    try:
        return Ancestry.model_validate(stored)
    except ValidationError as error:
        raise StoreDamagedError(f"{url}/identity.json: what the run goes on from {first_problem(error)}") from None
