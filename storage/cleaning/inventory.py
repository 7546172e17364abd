"""Reads a root: what is in it, how large and how old each part is, and what its small files say it needs.

One listing of all files, then the manifests of stores and the identities of runs. Folders and files that this project
does not write are not looked at, and never become a part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage.cleaning.needs import Contents, RunFacts, StoreFacts, StoreKey
from storage.corpus.record_paths import store_name
from storage.errors import StoreError
from storage.files import uri
from storage.files.below import StoredFile, files_below
from storage.files.names import why_not_plain
from storage.fingerprint import fingerprint
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.overview import came_from
from storage.runs.reports import ComparisonFolder, LawFolder, ReportFolder
from storage.stores.layout import KINDS, Kind
from storage.stores.manifest import COPY, MANIFEST, read_manifest
from storage.stores.schema import Manifest

_STORE = re.compile(r"(blocks|targets|scores|selections)/([0-9a-f]{16}(?:\.\d+)?)/([^/]+\.zarr)/(.+)")
_PART = re.compile(r"(blocks|targets|scores|selections|runs|comparisons|laws)/.+")
_TEMPORARY = re.compile(r"(.*/)?[0-9a-f]{32}\.tmp(\.parts/.*)?")
_NEEDS: Mapping[Kind, tuple[tuple[str, Kind], ...]] = {
    "blocks": (),
    "targets": (("blocks", "blocks"),),
    "scores": (("blocks", "blocks"),),
    "selections": (("scores", "scores"), ("targets", "targets")),
}
"""Field of the inputs, and the kind of store that it names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """A root as it was when it was listed."""

    root: str
    contents: Contents
    stores: Mapping[StoreKey, Sequence[StoredFile]]
    """Files of each store; their paths are below the root, as all of these."""
    runs: Mapping[str, Sequence[StoredFile]]
    temporary: Sequence[StoredFile] = ()
    """What interrupted writes have left."""
    without_manifest: Mapping[StoreKey, Sequence[StoredFile]] = field(default_factory=dict)
    """What is left of stores that were being made or removed: nothing reads it."""
    unfinished_checkpoints: Mapping[str, Sequence[StoredFile]] = field(default_factory=dict)
    """Of checkpoints without a state, by the folder."""
    committed_twice: Mapping[StoreKey, Sequence[StoredFile]] = field(default_factory=dict)
    """Commit records of complete stores, which are in the manifest by then."""


def take_inventory(root: str) -> Inventory:
    """List the root, and read what its manifests and identities say.

    Raises:
        OSError: the storage does not answer.
    """
    stores: dict[StoreKey, list[StoredFile]] = {}
    runs: dict[str, list[StoredFile]] = {}
    temporary: list[StoredFile] = []
    for file in files_below(root):
        if _TEMPORARY.fullmatch(file.path) and ("/" not in file.path or _PART.fullmatch(file.path)):
            temporary.append(file)
        elif (match := _STORE.fullmatch(file.path)) is not None:
            kind = next(kind for kind in KINDS if kind == match[1])
            stores.setdefault(StoreKey(kind, match[2], match[3]), []).append(file)
        elif file.path.startswith("runs/") and file.path.count("/") > 1:
            name = file.path.split("/")[1]
            if why_not_plain(name) is None:
                runs.setdefault(name, []).append(file)
    names = {key: {file.path.removeprefix(f"{key.path}/") for file in files} for key, files in stores.items()}
    headless = {key: files for key, files in stores.items() if not names[key] & {MANIFEST, COPY}}
    with_head = {key: files for key, files in stores.items() if key not in headless}
    facts = {key: _store_facts(root, key) for key in with_head}
    run_facts = {name: _run_facts(root, name) for name in runs}
    reports, unreadable = _reports(root)
    return Inventory(
        root=root,
        contents=Contents(stores=facts, runs=run_facts, reports=reports, unreadable=tuple(unreadable)),
        stores=with_head,
        runs=runs,
        temporary=temporary,
        without_manifest=headless,
        unfinished_checkpoints={
            folder: found for name, files in runs.items() for folder, found in _unfinished(name, files).items()
        },
        committed_twice={
            key: records
            for key, files in with_head.items()
            if facts[key].complete
            and facts[key].unreadable is None
            and (records := [file for file in files if file.path.startswith(f"{key.path}/commits/")])
        },
    )


def _store_facts(root: str, key: StoreKey) -> StoreFacts:
    url = uri.join(root, key.path)
    try:
        manifest = read_manifest(url)
    except StoreError as error:
        return StoreFacts(complete=False, unreadable=str(error))
    if manifest is None:  # gone since it was listed
        return StoreFacts(complete=False, unreadable=f"{url} has changed while it was looked at; run the command again")
    return StoreFacts(complete=manifest.complete, needs=tuple(_needs(manifest, key)), scored_by=_scored_by(manifest))


def _needs(manifest: Manifest, key: StoreKey) -> list[StoreKey]:
    return [
        StoreKey(kind, str(manifest.inputs[field]), key.name)
        for field, kind in _NEEDS[manifest.kind]
        if isinstance(manifest.inputs.get(field), str)
    ]


def _scored_by(manifest: Manifest) -> str | None:
    models = manifest.inputs.get("models") if manifest.kind == "scores" else None
    run = models.get("run") if isinstance(models, Mapping) else None
    return run if isinstance(run, str) else None


def _run_facts(root: str, name: str) -> RunFacts:
    folder = RunFolder(root, name)
    try:
        identity, config, summary = folder.identity(), folder.config(), folder.summary()
    except StoreError as error:
        return RunFacts(unreadable=str(error))
    if identity is None:
        # Nothing of it can be read by anyone; but it may have been trained on what is here.
        return RunFacts(
            finished=False, unreadable=f"{folder.url} has no identity.json; restore it or remove the folder"
        )
    return RunFacts(
        finished=summary is not None,
        identity=fingerprint(identity),
        stores=tuple(_stores_of(identity)),
        runs=tuple(_named_runs(config or {})),
        began_from=came_from(identity),
        checkpoints=tuple(CheckpointFolder(folder.url).steps()),
    )


def _stores_of(identity: Mapping[str, Any]) -> list[StoreKey]:
    stores = identity.get("stores")
    return [
        StoreKey(kind, str(of[kind]), store_name(domain))
        for domain, of in (stores if isinstance(stores, Mapping) else {}).items()
        for kind in KINDS
        if isinstance(of, Mapping) and kind in of
    ]


def _named_runs(config: Mapping[str, Any]) -> list[str]:
    """Other runs that a resolved configuration names."""
    mixture, domains = config.get("mixture"), config.get("domains")
    named = [mixture.get(field) for field in ("reference_run", "accuracy_run")] if isinstance(mixture, Mapping) else []
    for domain in (domains if isinstance(domains, Mapping) else {}).values():
        select = domain.get("select") if isinstance(domain, Mapping) else None
        named.append(select.get("run") if isinstance(select, Mapping) else None)
    return [name for name in named if isinstance(name, str)]


def named_runs(config: Mapping[str, Any]) -> frozenset[str]:
    """The run of a configuration as plain data, and the other runs that it names."""
    return frozenset([str(config["run"]), *_named_runs(config)])


def _reports(root: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    found: dict[str, tuple[str, ...]] = {}
    unreadable = []
    folders: list[tuple[type[ReportFolder], str]] = [(ComparisonFolder, "runs"), (LawFolder, "points")]
    for kind, field_of_runs in folders:
        for name in uri.list_names(uri.join(root, kind.folder)):
            report = kind(root, name)
            try:
                rows = (report.data() or {}).get(field_of_runs)
            except StoreError as error:
                unreadable.append(str(error))
                continue
            runs = [row.get("run") for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
            found[f"{kind.folder}/{name}"] = tuple(run for run in runs if isinstance(run, str))
    return found, unreadable


def _unfinished(name: str, files: Sequence[StoredFile]) -> dict[str, list[StoredFile]]:
    """Checkpoints of a run that have no state, by their folder."""
    by_step: dict[str, list[StoredFile]] = {}
    for file in files:
        if match := re.match(rf"runs/{re.escape(name)}/checkpoints/step-\d{{8,}}/", file.path):
            by_step.setdefault(match[0].rstrip("/"), []).append(file)
    return {folder: of for folder, of in by_step.items() if f"{folder}/state.json" not in {file.path for file in of}}
