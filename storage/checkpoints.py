"""Checkpoints of a run: a folder of files each, which counts once its `state.json` is there.

    <run>/checkpoints/step-00000050/rank-00000.safetensors   one a rank that trained: `ddk.saving`
                                    rank-00001.safetensors
                                    state.json             written last: sizes and digests of the others, and the
                                                           small state (sampler position, mixture versions)

A checkpoint that was being written at a kill has no `state.json` and is never looked at again; the next save of the
same step writes it anew. Files are checked against their digests before they are handed out. In format 1, of one
process only, the files are `model.safetensors` and `optimizer.safetensors`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from storage import uri
from storage.errors import FormatVersionError, StoreDamagedError

FORMAT_VERSION = 2
_COMMIT = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _FileRecord(_Frozen):
    bytes: int
    sha256: str


class _Commit(_Frozen):
    """The content of `state.json`."""

    format_version: int
    step: int
    files: dict[str, _FileRecord]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, run_url: str) -> None:
        self._url = uri.join(run_url, "checkpoints")

    def steps(self) -> list[int]:
        """Steps of the checkpoints that count, oldest first."""
        return [step for step in self._folders() if uri.exists(uri.join(self.url(step), _COMMIT))]

    def url(self, step: int) -> str:
        return uri.join(self._url, f"step-{step:08d}")

    def save(self, step: int, files: Mapping[str, Callable[[str], None]], state: Mapping[str, Any]) -> None:
        """Write a checkpoint; it counts when this returns, and not before.

        Args:
            files: for each file's name, what writes it to a given local path.
            state: plain JSON data.
        """
        self.begin(step)
        self.commit(step, {name: self.put(step, name, write) for name, write in files.items()}, state)

    # The same in three steps, for several writers: one begins, all put their files, one commits.

    def begin(self, step: int) -> None:
        """From here on the checkpoint of this step does not count: its files may change."""
        uri.remove_file(uri.join(self.url(step), _COMMIT))

    def put(self, step: int, name: str, write: Callable[[str], None]) -> dict[str, Any]:
        """Write one file, and return what `commit` is to know of it (plain JSON data)."""
        with uri.writing(uri.join(self.url(step), name)) as path:
            write(path)
            return _FileRecord(bytes=os.path.getsize(path), sha256=_sha256(path)).model_dump()

    def commit(self, step: int, records: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        """Declare the files whole; the checkpoint counts when this returns.

        Args:
            records: what `put` said, by the files' names.
            state: plain JSON data.
        """
        files = {name: _FileRecord(**record) for name, record in records.items()}
        commit = _Commit(format_version=FORMAT_VERSION, step=step, files=files, state=dict(state))
        uri.write_json(uri.join(self.url(step), _COMMIT), commit.model_dump())

    def format_version(self, step: int) -> int:
        """Of a checkpoint that counts.

        Raises:
            FormatVersionError, StoreDamagedError: it cannot be read.
        """
        return self._commit(step).format_version

    @contextmanager
    def folder(self, step: int) -> Iterator[str]:
        """A local folder with all of its files, checked, for as long as the context lasts.

        Raises:
            StoreDamagedError: one is missing, or its bytes are not those that were written.
        """
        files = self._commit(step).files
        if uri.is_local(self._url):
            for name, record in files.items():
                with self._checked(step, name, record):
                    pass
            yield uri.open_fs(self.url(step))[1]
            return
        with tempfile.TemporaryDirectory(prefix="ddk-checkpoint-") as folder:
            for name, record in files.items():
                with self._checked(step, name, record) as path:
                    shutil.move(path, os.path.join(folder, name))
            yield folder

    def state(self, step: int) -> dict[str, Any]:
        """The small state of a checkpoint that counts.

        Raises:
            FormatVersionError, StoreDamagedError: it cannot be read.
        """
        return self._commit(step).state

    @contextmanager
    def file(self, step: int, name: str) -> Iterator[str]:
        """A local path of one of its files, checked, for as long as the context lasts.

        Raises:
            StoreDamagedError: it is missing, or its bytes are not those that were written.
        """
        with self._checked(step, name, self._commit(step).files[name]) as path:
            yield path

    @contextmanager
    def _checked(self, step: int, name: str, record: _FileRecord) -> Iterator[str]:
        place = uri.join(self.url(step), name)
        with uri.local_copy(place) as path:
            if path is None or os.path.getsize(path) != record.bytes or _sha256(path) != record.sha256:
                raise StoreDamagedError(f"{place} is missing or damaged; {self._remedy(step)}")
            yield path

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints that count, and what older ones left unfinished.

        The commit goes first: a half-removed one is none.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}; the newest checkpoint always stays")
        kept = self.steps()[-keep:]
        for step in self._folders():
            if kept and step < kept[0]:
                uri.remove_file(uri.join(self.url(step), _COMMIT))
                uri.remove_tree(self.url(step))

    def _folders(self) -> list[int]:
        return sorted(int(match[1]) for name in uri.list_names(self._url) if (match := _FOLDER.fullmatch(name)))

    def _commit(self, step: int) -> _Commit:
        place = uri.join(self.url(step), _COMMIT)
        try:
            content = uri.read_json(place)
        except StoreDamagedError as error:
            raise StoreDamagedError(f"{error}; {self._remedy(step)}") from None
        if content is None:
            raise StoreDamagedError(f"there is no checkpoint at {self.url(step)}")
        version = content.get("format_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise FormatVersionError(
                f"{place} has format version {version}, and this version of ddk reads up to {FORMAT_VERSION}; "
                f"update ddk"
            )
        try:
            return _Commit.model_validate(content)
        except ValidationError as error:
            raise StoreDamagedError(
                f"{place} is not a checkpoint's state ({error.errors()[0]['msg']}); {self._remedy(step)}"
            ) from None

    def _remedy(self, step: int) -> str:
        return f"remove the folder {self.url(step)} and resume from the checkpoint before it"


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
