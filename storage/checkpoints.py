"""Checkpoints of a run: a folder of files each, which counts once its `state.json` is there.

    <run>/checkpoints/step-00000050/model.safetensors
                                    optimizer.safetensors
                                    state.json             written last: sizes and digests of the others, and the
                                                           small state (sampler position, mixture versions)

A checkpoint that was being written at a kill has no `state.json` and is never looked at again; the next save of the
same step writes it anew. Files are checked against their digests before they are handed out.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from storage import uri
from storage.errors import FormatVersionError, StoreDamagedError

FORMAT_VERSION = 1
_COMMIT = "state.json"


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, run_url: str) -> None:
        self._url = uri.join(run_url, "checkpoints")

    def steps(self) -> list[int]:
        """Steps of the checkpoints that count, oldest first."""
        names = [name for name in uri.list_names(self._url) if name.startswith("step-")]
        return [int(name[5:]) for name in names if uri.exists(uri.join(self._url, name, _COMMIT))]

    def url(self, step: int) -> str:
        return uri.join(self._url, f"step-{step:08d}")

    def save(self, step: int, files: Mapping[str, Callable[[str], None]], state: Mapping[str, Any]) -> None:
        """Write a checkpoint; it counts when this returns, and not before.

        Args:
            files: for each file's name, what writes it to a given local path.
            state: plain JSON data.
        """
        records: dict[str, dict[str, Any]] = {}
        for name, write in files.items():
            with tempfile.TemporaryDirectory(prefix="ddk-checkpoint-") as folder:
                path = os.path.join(folder, name)
                write(path)
                records[name] = {"bytes": os.path.getsize(path), "sha256": _sha256(path)}
                uri.put_file(path, uri.join(self.url(step), name))
        commit = {"format_version": FORMAT_VERSION, "step": step, "files": records, "state": dict(state)}
        uri.write_json(uri.join(self.url(step), _COMMIT), commit)

    def state(self, step: int) -> dict[str, Any]:
        """The small state of a checkpoint that counts.

        Raises:
            FormatVersionError, StoreDamagedError: it cannot be read.
        """
        return dict(self._commit(step)["state"])

    @contextmanager
    def file(self, step: int, name: str) -> Iterator[str]:
        """A local path of one of its files, checked, for as long as the context lasts.

        Raises:
            StoreDamagedError: it is missing, or its bytes are not those that were written.
        """
        record = self._commit(step)["files"][name]
        place = uri.join(self.url(step), name)
        with uri.local_copy(place) as path:
            if path is None or os.path.getsize(path) != record["bytes"] or _sha256(path) != record["sha256"]:
                raise StoreDamagedError(
                    f"{place} is missing or damaged; remove the folder {self.url(step)} and resume from the "
                    f"checkpoint before it"
                )
            yield path

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints that count, the commit first: a half-removed one is none."""
        for step in self.steps()[:-keep]:
            uri.remove_file(uri.join(self.url(step), _COMMIT))
            uri.remove_tree(self.url(step))

    def _commit(self, step: int) -> dict[str, Any]:
        place = uri.join(self.url(step), _COMMIT)
        try:
            commit = uri.read_json(place)
        except ValueError as error:
            raise StoreDamagedError(f"{error}; remove the folder {self.url(step)}") from None
        if not isinstance(commit, dict):
            raise StoreDamagedError(f"there is no checkpoint at {self.url(step)}")
        if commit["format_version"] > FORMAT_VERSION:
            raise FormatVersionError(
                f"{place} has format version {commit['format_version']}, and this version of ddk reads up to "
                f"{FORMAT_VERSION}; update ddk"
            )
        return commit


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
