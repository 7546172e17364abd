"""Finds out what a run would do, and why, without doing it: the state of each stage, from the plan of its stores.

It only writes facts about the input files that the stages need anyway: their hashes (`<root>/digests.json`) and, if
records have paths, the list of these paths (`<root>/paths.json`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ddk.schedule import learning_rate
from flows.config import Config
from flows.stores.stages_shown import StagePlan, complete_run, complete_store
from storage.corpus.record_paths import store_name
from storage.errors import StoreError
from storage.files import uri
from storage.fingerprint import differences
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.stores.layout import Kind
from storage.stores.manifest import read_manifest
from storage.stores.schema import Manifest
from tasks.planning.complete_runs import remember_complete
from tasks.planning.selection_plan import SelectionPlan, plan_selections
from tasks.planning.store_plan import Plan, plan_stores
from tasks.planning.text_ends import say_ends
from tasks.showing.formats import few
from tasks.training.accuracies import read_accuracies, say_what_does_not_match
from tasks.training.run_inputs import RunInputs, check_leaves_of_mixture, check_run

_SHOWN = 3
"""Fields that differ, named in a line; the others are counted."""


def plan_stages(config: Config) -> list[StagePlan]:
    """Every stage of the run, in the order in which they would be done.

    Raises:
        UserError: a corpus or a model is not there, or they do not fit together.
    """
    plan = plan_stores(config.root, config.domains, config.packing, config.teacher, student=config.student)
    check_run(config.settings, plan)
    check_leaves_of_mixture(config.settings, plan)
    say_ends("plan", plan.ends)
    stores = [_store(config.root, plan, domain, kind) for kind in ("blocks", "targets") for domain in plan.domains]
    selections = plan_selections(config.root, plan, config.student).values()
    stores += [_selection(one) for one in selections]
    stages = [*stores, _run(config, plan, stores)]
    if all(one.state == "complete" for one in stages):
        remember_complete(config.sources, plan.urls, config.sources.digest())
    return stages


def _store(root: str, plan: Plan, domain: str, kind: Kind) -> StagePlan:
    store = plan[domain]
    url = store.blocks_url if kind == "blocks" else store.targets_url
    inputs = store.blocks_inputs if kind == "blocks" else store.targets_inputs
    stage: Literal["pack", "cache"] = "pack" if kind == "blocks" else "cache"
    manifest = read_manifest(url)
    if manifest is not None and manifest.complete:
        return complete_store(stage, domain, manifest, url)
    if manifest is not None:
        done = len([name for name in uri.list_names(uri.join(url, "commits")) if name.endswith(".json")])
        return StagePlan(stage=stage, of=domain, state="unfinished", why=f"{done:,} shards are there", url=url)
    closest = min((_differences(other.inputs, inputs) for other in _others(root, domain, kind)), key=len, default=None)
    if closest is None:
        return StagePlan(stage=stage, of=domain, state="missing", why="", url=url)
    return StagePlan(stage=stage, of=domain, state="stale", why=_named(closest), url=url)


def _selection(selection: SelectionPlan) -> StagePlan:
    url, domain = selection.selection_url, selection.domain
    manifest = read_manifest(url)
    if manifest is not None and manifest.complete:
        kept, blocks = manifest.splits["train"].blocks, manifest.facts["blocks"]
        return StagePlan(stage="select", of=domain, state="complete", why=f"{kept:,} of {blocks:,} blocks", url=url)
    begun = manifest is not None or read_manifest(selection.scores_url) is not None
    return StagePlan(stage="select", of=domain, state="unfinished" if begun else "missing", why="", url=url)


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
        said = [going_on(config, plan), _followed(config, plan)]
        return StagePlan(state="missing", why="; ".join(one for one in said if one), **common)
    waiting = [one for one in stores if one.state != "complete"]
    if waiting:
        why = "its stores must be made first; a run cannot switch stores"
        return StagePlan(state="stale", why=why, **common)
    changed = differences(found, RunInputs(config.settings, plan).identity)
    if changed:
        why = f"{_named(changed)}; give it another name (run: …), this one is kept"
        return StagePlan(state="stale", why=why, **common)
    if folder.summary() is not None:
        return complete_run(folder, config.train.steps)
    steps = CheckpointFolder(folder.url).steps()
    return StagePlan(state="unfinished", why=f"step {steps[-1] if steps else 0:,} of {config.train.steps:,}", **common)


def going_on(config: Config, plan: Plan) -> str:
    """What a run that goes on from another one would begin with; '' where it begins with the student itself."""
    inputs = RunInputs(config.settings, plan)
    ancestry, start = inputs.ancestry, inputs.schedule_start
    if ancestry is None:
        return ""
    train, step = config.train, ancestry.step
    source = RunFolder(config.root, ancestry.run)
    before = source.interval_metrics(max(first for first in source.measured_intervals() if first < step))
    warmup = start + min(train.warmup_steps, train.steps - start) - step
    how = f"warms up over {warmup:,} steps to" if warmup > 0 else "goes on at"
    rate = learning_rate(train, step + max(warmup, 0), start)
    new = [domain for domain in plan.domains if domain not in ancestry.counted]
    return (
        f"goes on from step {step:,} of run '{ancestry.run}' to step {train.steps:,}"
        f"{'' if ancestry.optimizer else ', with its weights alone'}; the learning rate was "
        f"{before[-1]['learning_rate']:.3g} there and {how} {rate:.3g}"
        f"{f'; drawn from their beginning: {few(new, _SHOWN)}' if new else ''}"
        f"{'' if ancestry.history else '; the mixture history begins anew, from the mixture that was last drawn'}"
    )


def _followed(config: Config, plan: Plan) -> str:
    """Whose accuracies the mixture would follow; '' where it follows the gap alone."""
    mixture = config.mixture
    accuracies = read_accuracies(config.root, mixture, plan.domains)
    if accuracies is None:
        return ""
    say_what_does_not_match(accuracies, mixture, plan.domains)
    count = sum(tally.asked for tally in accuracies.student.values())
    return (
        f"its mixture follows {mixture.follow}: {count:,} answers of run '{mixture.accuracy_run}' "
        f"({mixture.accuracy_model})"
    )
