"""The parts of a root that can be removed, each with its size, its age and the reason; pure.

A part is removed only where it is old enough and nobody who lives works in its store or run. As long as a stage works
on a store of the root, no whole store is removed: the next stage of the same pipeline may read one that no run names
yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from storage.cleaning.inventory import Inventory
from storage.cleaning.needs import Decision, StoreKey, generations_meant
from storage.files.below import StoredFile, bytes_of
from storage.files.claims import Life

PartKind = Literal["store", "run", "checkpoint", "remains", "claims", "temporary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One thing to remove."""

    kind: PartKind
    path: str
    """Below the root: of its folder, or of its only file."""
    owner: str | None
    """Store or run that must not be at work: its folder below the root."""
    bytes: int
    modified: float
    """Unix time at which the newest of its files was written."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What is to be removed, and what is left for now."""

    removable: tuple[Part, ...]
    young: tuple[Part, ...]
    """Not needed either, but written too recently."""
    at_work: tuple[Part, ...]
    """Likewise, but somebody may be at work there."""


def parts_of(inventory: Inventory, decision: Decision, lives: Mapping[str, Life], before: float) -> Parts:
    """Everything that is not needed.

    Args:
        lives: of stores and runs with claims, by their folder below the root.
        before: Unix time; what was written later is young.
    """
    found = [*_stores(inventory, decision), *_runs(inventory, decision), *_remains(inventory, decision)]
    found += [*_claims(inventory, lives, found), *_temporaries(inventory, found)]
    busy = {place for place, life in lives.items() if life != "dead"}
    stage = any(not place.startswith("runs/") for place in busy)

    def held(part: Part) -> bool:
        return part.owner in busy or (part.kind == "store" and stage)

    return Parts(
        removable=tuple(part for part in found if part.modified < before and not held(part)),
        young=tuple(part for part in found if part.modified >= before and not held(part)),
        at_work=tuple(part for part in found if held(part)),
    )


def _part(kind: PartKind, path: str, owner: str | None, files: Sequence[StoredFile], why: str) -> Part:
    newest = max(file.modified for file in files)
    return Part(kind=kind, path=path, owner=owner, bytes=bytes_of(files), modified=newest, why=why)


def _stores(inventory: Inventory, decision: Decision) -> Iterator[Part]:
    for key in sorted(decision.stores):
        if key in inventory.stores:
            yield _part("store", key.path, key.path, inventory.stores[key], _why(inventory, key))


def _why(inventory: Inventory, key: StoreKey) -> str:
    facts = inventory.contents.stores
    newest = generations_meant(key.first, facts)[-1:]
    if newest and newest[0].number > key.number:
        return f"{newest[0].folder} took its place, and no run was trained on it"
    reader = "run" if key.kind == "selections" else "run, selection" if key.kind == "scores" else "run, store"
    unfinished = "" if facts[key].complete else "not finished, and "
    return f"{unfinished}no {reader} or configuration needs it"


def _runs(inventory: Inventory, decision: Decision) -> Iterator[Part]:
    for name in sorted(decision.runs):
        path = f"runs/{name}"
        yield _part("run", path, path, inventory.runs[name], "asked for by --remove-runs, and nothing needs it")
    for name, steps in sorted(decision.checkpoints.items()):
        for step in steps:
            path = f"runs/{name}/checkpoints/step-{step:08d}"
            files = [file for file in inventory.runs[name] if file.path.startswith(f"{path}/")]
            if files:
                yield _part("checkpoint", path, f"runs/{name}", files, "its run is finished, and has a later one")


def _remains(inventory: Inventory, decision: Decision) -> Iterator[Part]:
    for key, files in sorted(inventory.without_manifest.items()):
        yield _part("remains", key.path, key.path, files, "remains of a store without a manifest, which nothing reads")
    for folder, files in sorted(inventory.unfinished_checkpoints.items()):
        run = "/".join(folder.split("/")[:2])
        if run.removeprefix("runs/") not in decision.runs:
            yield _part("remains", folder, run, files, "a checkpoint that was never finished")
    for key, files in sorted(inventory.committed_twice.items()):
        if key not in decision.stores:
            why = "commit records of a complete store, whose manifest holds them"
            yield _part("remains", f"{key.path}/commits", key.path, files, why)


def _claims(inventory: Inventory, lives: Mapping[str, Life], found: Iterable[Part]) -> Iterator[Part]:
    going = {part.path for part in found}
    owned: dict[str, Sequence[StoredFile]] = {key.path: files for key, files in inventory.stores.items()}
    owned |= {f"runs/{name}": files for name, files in inventory.runs.items()}
    for place, files in sorted(owned.items()):
        claims = [file for file in files if file.path.startswith(f"{place}/claims/")]
        if claims and place not in going and lives.get(place, "dead") == "dead":
            yield _part("claims", f"{place}/claims", place, claims, "claims of processes that are gone")


def _temporaries(inventory: Inventory, found: Iterable[Part]) -> Iterator[Part]:
    going = tuple(f"{part.path}/" for part in found)
    for file in inventory.temporary:
        if file.path.startswith(going):
            continue
        parts = file.path.split("/")
        owner = "/".join(parts[: 2 if parts[0] == "runs" else 3]) if len(parts) > 2 else None
        yield _part("temporary", file.path, owner, [file], "left by a write that was interrupted")
