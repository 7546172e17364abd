"""Tells within a second whether a run is complete, without reading a model or loading a tokenizer.

A plan depends on files and versions. When a run is completed, a digest of all of them is stored in
`<root>/complete.json`, together with the fingerprints of the run's stores. As long as the digest is the same, planning
would give the same stores, so only these and the run itself are checked. If anything differs, or the file is lost, the
whole plan is made. No stage is ever run, and no number used, because of this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError
from ddk.train_config import StudentConfig
from storage.corpus.domain import DomainConfig, selects_blocks
from storage.corpus.files import resolve_files
from storage.corpus.record_paths import store_name
from storage.errors import StoreError
from storage.exchange.foreign import compression_url
from storage.files import uri
from storage.files.digests import DigestCache
from storage.files.remembered import recall, remember
from storage.fingerprint import fingerprint
from storage.runs.folder import RunFolder
from storage.stores.generations import first_fingerprint, newest_complete
from storage.stores.manifest import read_manifest
from storage.stores.schema import Manifest
from tasks.planning.models import local_folder
from tasks.planning.tokenizer_files import tokenizer_files
from tasks.teachers.config import TeacherConfig, engine_version

MEMORY = "complete.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic")
_TEMPLATES = "additional_chat_templates"
_PACKAGES = ("ddk", "storage", "tasks", "flows")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteRun:
    """What a complete run was made of."""

    folder: RunFolder
    blocks: Mapping[str, tuple[str, Manifest]]
    """URL and manifest of each domain's store."""
    targets: Mapping[str, tuple[str, Manifest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSources:
    """What the configuration names that lies outside of it."""

    root: str
    run: str
    domains: Mapping[str, DomainConfig]
    teacher: TeacherConfig
    student: StudentConfig
    sections: Mapping[str, Any]
    """The whole configuration as plain data."""

    def digest(self) -> str | None:
        """Digest of everything that a plan depends on; None if files alone do not determine it: a teacher behind a
        server, a model on the hub that is not pinned to a commit, a run that another one's result goes into, files
        that are not there.
        """
        mixture = self.sections["mixture"]
        if self.teacher.source == "server" or (mixture["reference_run"] or mixture["accuracy_run"]) is not None:
            return None
        if selects_blocks(self.domains):  # a run's checkpoints, say
            return None
        try:
            return self._digest()
        except (UserError, StoreError, OSError):  # who makes the plan says what is wrong
            return None

    def _digest(self) -> str | None:
        folders = [
            _pinned(self.teacher.model, self.teacher.revision),
            _pinned(self.student.model, self.student.revision),
        ]
        digests = DigestCache(uri.join(self.root, "digests.json"))
        models = []
        for folder in folders:
            if folder is None:
                return None
            paths = [os.path.join(os.path.abspath(folder), name) for name in _files_of_model(folder)]
            models.append([[os.path.basename(path), sha] for path, sha in digests.get_all(paths).items()])
        corpora = {name: _corpus(name, corpus, digests) for name, corpus in self.domains.items()}
        # Stores are found by what they hold, wherever the root has moved to.
        sections = {name: section for name, section in self.sections.items() if name != "root"}
        return fingerprint(
            {"sections": sections, "models": models, "corpora": corpora, "code": _code(), "versions": _versions()}
        )


def find_complete(sources: RunSources) -> CompleteRun | None:
    """The run, if it is complete and none of its inputs has changed; otherwise None."""
    if not uri.exists(uri.join(sources.root, MEMORY)):
        return None
    try:
        known = recall(uri.join(sources.root, MEMORY)).get(sources.run)
        if not isinstance(known, dict) or not isinstance(stores := known.get("stores"), dict):
            return None
        folder = RunFolder(sources.root, sources.run)
        if folder.summary() is None or folder.config() is None:
            return None
        if known.get("inputs") is None or known["inputs"] != sources.digest():
            return None
        found = _stores(sources.root, stores, folder.identity() or {})
        return CompleteRun(folder=folder, **found) if found and _is_whole(folder) else None
    except (UserError, StoreError, OSError):  # who makes the plan says what is wrong
        return None


def remember_complete(sources: RunSources, stores: Mapping[str, tuple[str, str]], digest: str | None) -> None:
    """Remember a run that is complete now.

    Args:
        stores: URLs of blocks and targets, by domain.
        digest: of the sources that were planned; None: files alone do not determine it, and nothing is remembered.
    """
    if digest is None:
        return
    with contextlib.suppress(StoreError, OSError):  # it only saves time
        firsts = {
            domain: {"blocks": first_fingerprint(blocks), "targets": first_fingerprint(targets)}
            for domain, (blocks, targets) in stores.items()
        }
        place, entry = uri.join(sources.root, MEMORY), {"inputs": digest, "stores": firsts}
        if recall(place).get(sources.run) != entry:
            remember(place, {sources.run: entry})


def _stores(
    root: str, stores: Mapping[str, Any], identity: Mapping[str, Any]
) -> dict[str, dict[str, tuple[str, Manifest]]] | None:
    """Every store, where all are complete and are those that the run was trained on."""
    trained = identity.get("stores")
    if not isinstance(trained, dict) or trained.keys() != stores.keys():
        return None
    if not all(isinstance(one, dict) for one in (*trained.values(), *stores.values())):
        return None
    found: dict[str, dict[str, tuple[str, Manifest]]] = {"blocks": {}, "targets": {}}
    for domain, firsts in stores.items():
        for kind, of_kind in found.items():
            if not re.fullmatch(r"[0-9a-f]+", first := str(firsts.get(kind))):
                return None
            url = newest_complete(uri.join(root, kind, first, store_name(domain)))
            manifest = read_manifest(url)
            if manifest is None or not manifest.complete or url.split("/")[-2] != trained[domain].get(kind):
                return None
            of_kind[domain] = (url, manifest)
    return found


def _is_whole(folder: RunFolder) -> bool:
    report = folder.report_listing
    return bool(report.read()) and not any(report.differences(full=False)) and not folder.student_faults()


def _pinned(model: str, revision: str | None) -> str | None:
    """A model's folder, where what it holds cannot change without its files changing here."""
    if os.path.isdir(model) or re.fullmatch(r"[0-9a-f]{40}", revision or "") or os.environ.get("HF_HUB_OFFLINE") == "1":
        return local_folder(model, revision, "model")
    return None


def _files_of_model(folder: str) -> list[str]:
    """All that is read of a model: weights, JSON, code, tokenizer, chat templates. Not the same weights in other
    formats."""
    names = [name for name in os.listdir(folder) if name.endswith((".json", ".safetensors", ".py", ".jinja"))]
    further = os.path.join(folder, _TEMPLATES)
    if os.path.isdir(further):
        names += [os.path.join(_TEMPLATES, name) for name in os.listdir(further) if name.endswith(".jinja")]
    return sorted({*names, *tokenizer_files(folder)})


def _corpus(domain: str, corpus: DomainConfig, digests: DigestCache) -> list[list[str]]:
    """Name and content of every file, those that describe a compression among them."""
    files = [
        file
        for patterns in (corpus.train, corpus.validation)
        if patterns
        for file in resolve_files(patterns, domain, corpus.fields)
    ]
    described = {compression_url(file, corpus.compression_config) for file in files if corpus.targets == "distillkit"}
    urls = [file.url for file in files] + [url for url in sorted(described) if uri.exists(url)]
    found = digests.get_all(urls)
    return [[url, found[url]] for url in urls]


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {**versions, "vllm": engine_version(), "python": sys.version}


def _code() -> str:
    """Of our own code, by its files' sizes and times: a changed line may come to another plan."""
    top = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sha256 = hashlib.sha256()
    for package in _PACKAGES:
        for folder, below, names in os.walk(os.path.join(top, package)):
            below.sort()
            for name in sorted(names):
                if name.endswith(".py"):
                    stat = os.stat(os.path.join(folder, name))
                    sha256.update(f"{os.path.relpath(folder, top)}/{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return sha256.hexdigest()
