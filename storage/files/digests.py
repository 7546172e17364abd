"""Content hashes of a corpus's files, which are part of a store's fingerprint and are remembered across runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence

from ddk.errors import UserError
from storage.files import uri
from storage.files.remembered import recall, remember

_CHUNK = 1 << 20


def digest(url: str) -> str:
    """sha256 of the content, in hexadecimal.

    Raises:
        UserError: there is no such file.
    """
    fs, path = uri.open_fs(url)
    sha256 = hashlib.sha256()
    try:
        with fs.open(path, "rb", block_size=8 * _CHUNK) as file:
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
    except FileNotFoundError:
        raise UserError(f"{url} is no longer there; restore it, or run again to list the corpus anew") from None
    return sha256.hexdigest()


class DigestCache:
    """Digests remembered across runs in one JSON file, so that an unchanged corpus is not read again.

    A remembered digest counts while the file's stamp is the same: size, modification and change time on a local disk,
    size and ETag elsewhere. A file without a stamp is hashed each time, and so is one that was modified less than two
    seconds before: a second change within the clock's tick would not show. The JSON file may be lost, damaged (its seal
    tells) or written by two processes at once; that costs time only.

    Args:
        url: of the JSON file; None remembers nothing.
    """

    def __init__(self, url: str | None, clock: Callable[[], float] = time.time) -> None:
        self._url, self._clock = url, clock

    def get(self, file_url: str) -> str:
        """sha256 of the file's content, in hexadecimal. Raises UserError as `get_all` does."""
        return self.get_all([file_url])[file_url]

    def get_all(self, file_urls: Sequence[str]) -> dict[str, str]:
        """The same for many files, with the JSON file written once.

        Raises:
            UserError: a file is not there, or changes while it is read.
        """
        known = recall(self._url) if self._url is not None else {}
        new: dict[str, dict[str, str]] = {}
        digests: dict[str, str] = {}
        try:
            for file_url in file_urls:
                stamp, settled = self._stamp(file_url)
                entry = known.get(file_url)
                if stamp is not None and isinstance(entry, dict) and entry.get("stamp") == stamp and "sha256" in entry:
                    digests[file_url] = str(entry["sha256"])
                    continue
                digests[file_url] = digest(file_url)
                if self._stamp(file_url)[0] != stamp:
                    raise UserError(f"{file_url} changed while it was read; run again once nothing writes to it")
                if settled and stamp is not None:
                    new[file_url] = {"stamp": stamp, "sha256": digests[file_url]}
        finally:
            if new and self._url is not None:
                remember(self._url, new)
        return digests

    def _stamp(self, url: str) -> tuple[str | None, bool]:
        """What tells one content from another, if anything does; and whether it can be relied on later."""
        fs, path = uri.open_fs(url)
        try:
            if uri.is_local(url):
                stat = os.stat(path)
                newest = max(stat.st_mtime, stat.st_ctime)
                return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}", self._clock() - newest > 2
            fs.invalidate_cache()
            info = fs.info(path)
        except FileNotFoundError:
            raise UserError(f"{url} is no longer there; restore it, or run again to list the corpus anew") from None
        stamp = f"{info.get('size')} {info['ETag']}" if info.get("ETag") else None
        return stamp, stamp is not None
