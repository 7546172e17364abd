"""A folder of files for use by others too (a model, a report), and a sealed list of the files that were written there.

The list is stored beside the folder, so that the folder stays an ordinary one. Additional files in the folder are
ignored; a listed file that is missing or changed is reported.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.digests import DigestCache
from storage.files.fields import Digest, first_problem
from storage.files.names import plain_path
from storage.files.sealed import Sealed

_LISTING = Sealed(
    what="list of files", version=1, remedy="remove it and run the stage that wrote the folder again, which makes both"
)


class FileRecord(BaseModel):
    """One file, as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Annotated[int, Field(ge=0, strict=True)]
    sha256: Digest


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    files: dict[Annotated[str, StringConstraints(min_length=1)], FileRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One file that is not what was written."""

    url: str
    what: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The list of one folder.

    Args:
        folder: URL of the folder.
        url: of the list.
        of: what it belongs to.
    """

    folder: str
    url: str
    of: str

    def write(self, files: Mapping[str, FileRecord]) -> None:
        """Say what the folder holds; to be called once its files are there.

        Args:
            files: by their names, which may hold slashes.
        """
        content = {"files": {name: record.model_dump() for name, record in files.items()}}
        _LISTING.write(self.url, content, self.of)

    def add(self, files: Mapping[str, FileRecord]) -> None:
        """Add some files to the list, with their sizes and digests; a damaged list is started again."""
        try:
            known = self.read() or {}
        except StoreDamagedError:
            known = {}
        self.write({**known, **files})

    def read(self) -> dict[str, FileRecord] | None:
        """The files by name; None where nothing was listed.

        Raises:
            StoreDamagedError, FormatVersionError: the list is not what was written.
        """
        content = _LISTING.read(self.url, self.of)
        if content is None:
            return None
        try:
            files = _Content.model_validate(content).files
        except ValidationError as error:
            raise _LISTING.damaged(self.url, first_problem(error)) from None
        return {plain_path(name, self.url): record for name, record in files.items()}

    def differences(self, digests: DigestCache | None = None, *, full: bool = True) -> Iterator[Difference]:
        """The files that are missing or changed.

        Args:
            digests: remembers what has been read before; without one every byte is read now.
            full: compare the content, not the size alone.

        Raises:
            StoreDamagedError, FormatVersionError: the list is not what was written.
        """
        for name, record in sorted((self.read() or {}).items()):
            url = uri.join(self.folder, name)
            found = difference(url, record, (digests or DigestCache(None)).get if full else None)
            if found is not None:
                yield found


def difference(url: str, record: FileRecord, sha256_of: Callable[[str], str | None] | None) -> Difference | None:
    """The fault of one file; None if there is none.

    Args:
        sha256_of: gives the digest of the file's content; None compares the size alone.
    """
    size = uri.size_of(url)
    if size is None:
        return Difference(url=url, what="missing")
    if size != record.bytes:
        return Difference(url=url, what=f"{size:,} bytes instead of {record.bytes:,}")
    if sha256_of is not None and sha256_of(url) != record.sha256:
        return Difference(url=url, what="its bytes are not those that were written (sha256 differs)")
    return None


def records_of(folder: str) -> dict[str, FileRecord]:
    """Every file of a local folder and of those below it, by its path there."""
    found = {}
    for below, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(below, name)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[os.path.relpath(path, folder)] = FileRecord(bytes=os.path.getsize(path), sha256=digest)
    return found


def records_of_contents(contents: Mapping[str, bytes]) -> dict[str, FileRecord]:
    """The same of files whose content is at hand."""
    return {
        name: FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
