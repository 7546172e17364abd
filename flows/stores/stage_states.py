"""What a run would do, and why, without doing it: `ddk plan CONFIG`.

A stage's output is looked up where its inputs say that it lies (stores are content-addressed), so a stage is

    complete      it would do nothing
    unfinished    it was begun, and would go on there
    stale         there is none for these inputs, but one for others; the fields that differ are named
    missing       there is none at all

Nothing is written but what the stages need anyway of the input files: their hashes (`<root>/digests.json`), and where
records have paths, which there are (`<root>/paths.json`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ddk.values import SPLITS
from flows.config import Config
from storage.corpus.record_paths import store_name
from storage.errors import StoreError
from storage.files import uri
from storage.fingerprint import differences
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.stores.layout import Kind
from storage.stores.manifest import read_manifest
from storage.stores.schema import Manifest
from tasks.planning.store_plan import Plan, plan_stores
from tasks.training.session import StudentSession, check_run

State = Literal["complete", "unfinished", "stale", "missing"]
_SHOWN = 3
"""Fields that differ, named in a line; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of one domain, or of the run."""

    stage: Literal["pack", "cache", "train"]
    of: str
    """The domain, or the run's name."""
    state: State
    why: str
    url: str


def plan_stages(config: Config) -> list[StagePlan]:
    """Every stage of the run, in the order in which they would be done.

    Raises:
        UserError: a corpus or a model is not there, or they do not fit together.
    """
    plan = plan_stores(config.root, config.domains, config.packing, config.teacher, student=config.student)
    check_run(config.settings, plan)
    stores = [_store(config.root, plan, domain, kind) for kind in ("blocks", "targets") for domain in plan.domains]
    return [*stores, _run(config, plan, stores)]


def render(stages: list[StagePlan]) -> Iterator[str]:
    """A line a stage, and what follows from them all."""
    widths = [max(len(getattr(one, field)) for one in stages) for field in ("stage", "of", "state")]
    for one in stages:
        cells = (one.stage, one.of, one.state)
        yield "  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [one.why]).rstrip()
    left = [one for one in stages if one.state != "complete"]
    yield "" if left else "nothing to do"
    if left:
        by_stage = {stage: [one.of for one in left if one.stage == stage] for stage in ("pack", "cache", "train")}
        yield "to do: " + "; ".join(f"{stage} {', '.join(names)}" for stage, names in by_stage.items() if names)


def _store(root: str, plan: Plan, domain: str, kind: Kind) -> StagePlan:
    store = plan[domain]
    url = store.blocks_url if kind == "blocks" else store.targets_url
    inputs = store.blocks_inputs if kind == "blocks" else store.targets_inputs
    stage: Literal["pack", "cache"] = "pack" if kind == "blocks" else "cache"
    manifest = read_manifest(url)
    if manifest is not None and manifest.complete:
        blocks = " + ".join(f"{manifest.splits[split].blocks:,} {split}" for split in SPLITS)
        return StagePlan(stage=stage, of=domain, state="complete", why=f"{blocks} blocks", url=url)
    if manifest is not None:
        done = len([name for name in uri.list_names(uri.join(url, "commits")) if name.endswith(".json")])
        return StagePlan(stage=stage, of=domain, state="unfinished", why=f"{done:,} shards are there", url=url)
    closest = min((_differences(other.inputs, inputs) for other in _others(root, domain, kind)), key=len, default=None)
    if closest is None:
        return StagePlan(stage=stage, of=domain, state="missing", why="", url=url)
    return StagePlan(stage=stage, of=domain, state="stale", why=_named(closest), url=url)


def _others(root: str, domain: str, kind: Kind) -> Iterator[Manifest]:
    """Stores of the same domain, for other inputs."""
    folder = uri.join(root, kind)
    for name in uri.list_names(folder):
        try:
            manifest = read_manifest(uri.join(folder, name, store_name(domain)))
        except StoreError:  # damaged, or of another version: not the one that is asked for
            continue
        if manifest is not None:
            yield manifest


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """As JSON has them, where a tuple is a list."""
    found = differences(uri.as_json(old), uri.as_json(new))
    # Lists of files are long: which file it is matters, and not the whole list twice.
    lines = [_file_changes(line.partition(":")[0], old, new) or line for line in found]
    return ["its blocks are others" if line.startswith("blocks: ") else line for line in lines]


def _file_changes(field: str, old: Any, new: Any) -> str | None:
    """For a field that lists files as [name, size, hash]: what became of them."""
    for part in field.split("."):
        old, new = (side.get(part) if isinstance(side, Mapping) else None for side in (old, new))
    if not (_lists_files(old) and _lists_files(new)):
        return None
    before, after = ({row[0]: tuple(row[1:]) for row in side} for side in (old, new))
    changes = [f"{name} changed" for name in sorted(before.keys() & after.keys()) if before[name] != after[name]]
    changes += [f"{name} is new" for name in sorted(after.keys() - before.keys())]
    changes += [f"{name} is gone" for name in sorted(before.keys() - after.keys())]
    return f"{field}: " + ", ".join(changes or ["the order of the files"])


def _lists_files(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list | tuple) and len(row) == 3 for row in value)


def _named(fields: list[str]) -> str:
    more = f", and {len(fields) - _SHOWN} more" if len(fields) > _SHOWN else ""
    return "; ".join(fields[:_SHOWN]) + more


def _run(config: Config, plan: Plan, stores: list[StagePlan]) -> StagePlan:
    folder = RunFolder(config.root, config.run)
    found = folder.identity()
    common: dict[str, Any] = {"stage": "train", "of": config.run, "url": folder.url}
    if found is None:
        return StagePlan(state="missing", why="", **common)
    waiting = [one for one in stores if one.state != "complete"]
    if waiting:
        why = "its stores must be made first; a run cannot switch stores"
        return StagePlan(state="stale", why=why, **common)
    with StudentSession(config.settings, plan) as session:
        changed = differences(found, session.identity)
    if changed:
        why = f"{_named(changed)}; give it another name (run: …), this one is kept"
        return StagePlan(state="stale", why=why, **common)
    steps = CheckpointFolder(folder.url).steps()
    if folder.summary() is not None:
        return StagePlan(state="complete", why=f"{steps[-1] if steps else config.train.steps:,} steps", **common)
    return StagePlan(state="unfinished", why=f"step {steps[-1] if steps else 0:,} of {config.train.steps:,}", **common)
