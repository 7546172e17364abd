"""Every file below a folder, with its size and when it was last written; on S3 one request for each 1,000 objects.

Temporary files of interrupted writes are among them, which `storage.files.uri.list_names` leaves out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.files.uri import open_fs, reaching


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file."""

    path: str
    """Below the folder that was listed, with slashes."""
    bytes: int
    modified: float
    """Unix time, by the clock of the disk or the service. Where that is not known: now, so that it counts as new."""


def files_below(url: str) -> list[StoredFile]:
    """Every file below a folder, in the order of their paths; none where there is no such folder.

    Symbolic links are not followed: what lies behind one is not below the folder.
    """
    fs, path = open_fs(url)
    fs.invalidate_cache()
    if isinstance(fs, LocalFileSystem):
        return sorted(_on_disk(path), key=lambda one: one.path)
    with reaching(url):
        return sorted(_remote(fs, path.rstrip("/")), key=lambda one: one.path)


def bytes_of(files: Iterable[StoredFile]) -> int:
    """Of all together."""
    return sum(one.bytes for one in files)


def _on_disk(path: str) -> Iterator[StoredFile]:
    for folder, _, names in os.walk(path):
        for name in names:
            place = os.path.join(folder, name)
            try:
                stat = os.lstat(place)
            except FileNotFoundError:  # removed meanwhile, by who writes there
                continue
            yield StoredFile(os.path.relpath(place, path).replace(os.sep, "/"), stat.st_size, stat.st_mtime)


def _remote(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[StoredFile]:
    entries: list[dict[str, Any]] = (
        fs.entries_below(path) if "s3" in fs.protocol else list(fs.find(path, detail=True).values())
    )
    for entry in entries:
        below = str(entry["name"]).removeprefix(f"{path}/")
        if entry.get("type") == "file" and below != str(entry["name"]):
            modified = next((entry[name] for name in ("LastModified", "mtime", "created") if entry.get(name)), None)
            yield StoredFile(below, int(entry["size"] or 0), _unix(modified))


def _unix(modified: Any) -> float:
    if isinstance(modified, datetime):
        return modified.timestamp()
    return float(modified) if isinstance(modified, int | float) else time.time()
