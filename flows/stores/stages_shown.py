"""The stages of a run and their states, as `ddk plan` prints them.

Stores are content-addressed, so the inputs of a stage tell where its output must be. A stage is

    complete      there is nothing to do
    unfinished    it was begun, and would be resumed
    stale         there is no output for these inputs, but one for others; the fields that differ are named
    missing       there is no output at all

A run that is known to be complete is recognised here, without importing a model library; for all other runs,
`flows.stores.stage_states` finds out the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddk.values import SPLITS
from flows.config import Config
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.stores.schema import Manifest
from tasks.planning.complete_runs import find_complete

Stage = Literal["pack", "cache", "select", "train"]
State = Literal["complete", "unfinished", "stale", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of one domain, or of the run."""

    stage: Stage
    of: str
    """The domain, or the run's name."""
    state: State
    why: str
    url: str


def complete_stages(config: Config) -> list[StagePlan] | None:
    """Every stage, where the run is known to be complete; None where that has to be found out."""
    found = find_complete(config.sources)
    if found is None:
        return None
    return [
        *(complete_store("pack", domain, manifest, url) for domain, (url, manifest) in found.blocks.items()),
        *(complete_store("cache", domain, manifest, url) for domain, (url, manifest) in found.targets.items()),
        complete_run(found.folder, config.train.steps),
    ]


def complete_store(stage: Stage, domain: str, manifest: Manifest, url: str) -> StagePlan:
    """A store that is complete, and how much it holds."""
    blocks = " + ".join(f"{manifest.splits[split].blocks:,} {split}" for split in SPLITS)
    return StagePlan(stage=stage, of=domain, state="complete", why=f"{blocks} blocks", url=url)


def complete_run(folder: RunFolder, steps: int) -> StagePlan:
    """A run that is complete.

    Args:
        steps: as configured; where checkpoints are kept, the last one's is shown.
    """
    done = CheckpointFolder(folder.url).steps()
    why = f"{done[-1] if done else steps:,} steps"
    return StagePlan(stage="train", of=folder.name, state="complete", why=why, url=folder.url)


def render(stages: list[StagePlan]) -> Iterator[str]:
    """A line a stage, and what follows from them all."""
    widths = [max(len(getattr(one, field)) for one in stages) for field in ("stage", "of", "state")]
    for one in stages:
        cells = (one.stage, one.of, one.state)
        yield "  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [one.why]).rstrip()
    left = [one for one in stages if one.state != "complete"]
    yield "" if left else "nothing to do"
    if left:
        by_stage = {
            stage: [one.of for one in left if one.stage == stage] for stage in ("pack", "cache", "select", "train")
        }
        yield "to do: " + "; ".join(f"{stage} {', '.join(names)}" for stage, names in by_stage.items() if names)
