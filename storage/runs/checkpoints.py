"""Checkpoints of a run: each is a folder of files, which is valid once its `state.json` exists.

    <run>/checkpoints/step-00000050/rank-00000.safetensors   one a rank that trained: `ddk.saving`
                                    rank-00001.safetensors
                                    state.json             written last: sizes and digests of the others, and the
                                                           small state (sampler position, mixture versions)

If a process is killed while it writes a checkpoint, the checkpoint has no `state.json` and is never read; the next save
of the same step writes it again. `state.json` is sealed to its run and step (`storage.files.sealed`). Files are checked
against their digests before they are returned, and no name in `state.json` can point outside the checkpoint's folder.
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

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.fields import Whole, first_problem
from storage.files.names import plain_name
from storage.files.sealed import Sealed
from storage.runs.folder import run_key
from storage.runs.listing import Difference, FileRecord, difference

FORMAT_VERSION = 3
_STATE = Sealed(
    what="state of a checkpoint",
    version=FORMAT_VERSION,
    remedy="remove the folder {folder} and run the same command again, which resumes from the checkpoint before it",
)
_COMMIT = "state.json"
_FOLDER = re.compile(r"step-(\d{8,})")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Commit(_Frozen):
    """The content of `state.json`."""

    format_version: int
    step: Whole
    files: dict[str, FileRecord] = Field(min_length=1)
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, run_url: str) -> None:
        self._run_url = run_url
        self._url = uri.join(run_url, "checkpoints")

    def steps(self) -> list[int]:
        """Steps of the checkpoints that count, oldest first."""
        return [step for step in self._folders() if uri.exists(uri.join(self.url(step), _COMMIT))]

    def url(self, step: int) -> str:
        return uri.join(self._url, f"step-{step:08d}")

    # A checkpoint may have several writers: one begins, all put their files, one commits.

    def begin(self, step: int) -> None:
        """From here on the checkpoint of this step does not count: its files may change."""
        uri.remove_file(uri.join(self.url(step), _COMMIT))
        uri.remove_temporaries(self.url(step))  # of one who was killed in the middle of it

    def put(self, step: int, name: str, write: Callable[[str], Any]) -> dict[str, Any]:
        """Write one file, and return what `commit` is to know of it (plain JSON data)."""
        with uri.writing(uri.join(self.url(step), name)) as path:
            write(path)
            return FileRecord(bytes=os.path.getsize(path), sha256=_sha256(path)).model_dump()

    def commit(self, step: int, records: Mapping[str, Mapping[str, Any]], state: Mapping[str, Any]) -> None:
        """Declare the files whole; the checkpoint counts when this returns.

        Args:
            records: what `put` said, by the files' names.
            state: plain JSON data.
        """
        files = {name: FileRecord(**record) for name, record in records.items()}
        commit = _Commit(format_version=FORMAT_VERSION, step=step, files=files, state=dict(state))
        _STATE.write(uri.join(self.url(step), _COMMIT), commit.model_dump(), self._of(step))

    def differences(self, step: int, *, full: bool = True) -> Iterator[Difference]:
        """The files of a valid checkpoint that are missing or changed.

        Raises:
            FormatVersionError, StoreDamagedError: its `state.json` is not what was written.
        """
        for name, record in self._commit(step).files.items():
            url = uri.join(self.url(step), name)
            found = difference(url, record, _sha256_at if full else None)
            if found is not None:
                yield found

    def unfinished(self) -> list[str]:
        """URLs of the folders without a `state.json`: of checkpoints that were being written when something ended."""
        counting = set(self.steps())
        return [self.url(step) for step in self._folders() if step not in counting]

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
        """The small state of a valid checkpoint.

        Raises:
            FormatVersionError, StoreDamagedError: it cannot be read.
        """
        return self._commit(step).state

    def digests(self, step: int) -> dict[str, str]:
        """sha256 of each file of a valid checkpoint, by name.

        Raises:
            FormatVersionError, StoreDamagedError: as `state`.
        """
        return {name: record.sha256 for name, record in sorted(self._commit(step).files.items())}

    @contextmanager
    def _checked(self, step: int, name: str, record: FileRecord) -> Iterator[str]:
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
        content = _STATE.read(place, self._of(step))
        if content is None:
            raise StoreDamagedError(f"there is no checkpoint at {self.url(step)}")
        try:
            commit = _Commit.model_validate(content)
        except ValidationError as error:
            raise _STATE.damaged(place, first_problem(error)) from None
        if commit.step != step:
            raise _STATE.damaged(place, f"it says that it is of step {commit.step}")
        for name in commit.files:
            plain_name(name, place)
        return commit

    def _of(self, step: int) -> str:
        return f"the checkpoint of step {step} of run '{uri.name_of(self._run_url)}' ({run_key(self._run_url)})"

    def _remedy(self, step: int) -> str:
        return _STATE.remedy.replace("{folder}", self.url(step))


def _sha256_at(url: str) -> str | None:
    with uri.local_copy(url) as path:
        return None if path is None else _sha256(path)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
