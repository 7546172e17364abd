"""JSON files that affect results, sealed with a digest of their content and the name of what they belong to.

    {
     "format_version": 3,
     "seal": {"of": "mixture 3 of run 'a' (5f0c…)", "sha256": "…"},
     "version": 3,
     …
    }

`of` says in words which file this is, so that an intact file in the place of another is detected. The digest covers all
bytes of the file, with question marks in place of the digest itself, so that a changed digit is detected before the
number is used.

A digest is not a signature. It detects accidents (a flipped bit, a truncated file, an exchange, a manual edit), but not
somebody who recomputes the digest; the schemas of the readers limit what such a change can do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import FormatVersionError, StoreDamagedError
from storage.files import uri

_SEAL = "seal"
_VERSION = "format_version"
_BLANK = "?" * 64
"""In the digest's place while it is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """One kind of file: its format's version, and what to do where one cannot be used."""

    what: str
    """As a message calls it: 'manifest', 'mixture record'."""
    version: int
    remedy: str
    """The end of every message; `{url}` stands for the file's URL, `{folder}` for that of its folder."""

    def write(self, url: str, content: Mapping[str, Any], of: str) -> None:
        """Write the file, in one atomic step.

        Args:
            content: plain JSON data with text for keys.
            of: which file this is, so that no other can stand in its place.
        """
        uri.write_bytes(url, self._sealed(content, of))

    def create(self, url: str, content: Mapping[str, Any], of: str) -> bool:
        """`write` where there is no such file yet; see `storage.files.uri.create_bytes`."""
        return uri.create_bytes(url, self._sealed(content, of))

    def read(self, url: str, of: str | None = None) -> dict[str, Any] | None:
        """What was written, without the seal; None where there is no such file.

        Args:
            of: which file it must be; None where any will do.

        Raises:
            StoreDamagedError: it is not what was written, or another file's content.
            FormatVersionError: another version of the project wrote it.
        """
        return self.opened(url, uri.read_bytes(url), of)

    def read_many(self, urls: Sequence[str], of: Sequence[str]) -> list[dict[str, Any] | None]:
        """`read` of many files of one place; from an object store many at a time."""
        contents = uri.read_whole_many(urls)
        return [self.opened(url, content, one) for url, content, one in zip(urls, contents, of, strict=True)]

    def opened(self, url: str, raw: bytes | None, of: str | None = None) -> dict[str, Any] | None:
        """`read` of bytes that are at hand already."""
        if raw is None:
            return None
        try:
            content = uri.parsed(url, raw)
        except StoreDamagedError as error:
            raise StoreDamagedError(f"{error}; {self._remedy(url)}") from None
        if not isinstance(content, dict):
            raise self.damaged(url, f"it is no {self.what}")
        if (version := content.get(_VERSION)) != self.version and type(version) is int:
            raise self._other_version(url, version)
        if (why := _fault(content.get(_SEAL), raw, of)) is not None:
            raise self.damaged(url, why)
        return {name: value for name, value in content.items() if name != _SEAL}

    def damaged(self, url: str, why: str) -> StoreDamagedError:
        """The error for a file that cannot be used, to be raised by who finds more wrong with it."""
        return StoreDamagedError(f"{url} is no sound {self.what} ({why}); {self._remedy(url)}")

    def _sealed(self, content: Mapping[str, Any], of: str) -> bytes:
        return _with_digest({**content, _VERSION: self.version, _SEAL: {"of": of, "sha256": _BLANK}})

    def _remedy(self, url: str) -> str:
        return self.remedy.replace("{url}", url).replace("{folder}", url.rsplit("/", 1)[0])

    def _other_version(self, url: str, version: int) -> FormatVersionError:
        if version > self.version:
            return FormatVersionError(
                f"{url} has format version {version}, and this version of ddk reads version {self.version}; update ddk"
            )
        return FormatVersionError(
            f"{url} has format version {version}, of an older version of ddk, and this one reads version "
            f"{self.version}; {self._remedy(url)}"
        )


def _with_digest(content: Any) -> bytes:
    raw = uri.canonical(content)
    if raw.count(_BLANK.encode()) != 1:
        raise ValueError("the content holds what marks the place of its digest")
    return raw.replace(_BLANK.encode(), hashlib.sha256(raw).hexdigest().encode())


def _fault(seal: Any, raw: bytes, of: str | None) -> str | None:
    """What is wrong with a file's seal; None where nothing is."""
    if not isinstance(seal, dict) or not all(isinstance(seal.get(name), str) for name in ("of", "sha256")):
        return "it carries no digest of its content"
    digest = seal["sha256"].encode(errors="replace")
    sound = re.fullmatch(rb"[0-9a-f]{64}", digest) and raw.count(digest) == 1
    if not sound or hashlib.sha256(raw.replace(digest, _BLANK.encode())).hexdigest().encode() != digest:
        return "its content is not what was written: the digest in it does not match"
    if of is not None and seal["of"] != of:
        return f"it is that of {seal['of']}, and this is the place of {of}: files were exchanged or moved"
    return None


def sealed_rows(rows: Sequence[Mapping[str, Any]], of: str) -> bytes:
    """Rows of a table with a seal as the last one, so that the file stays a plain list for readers."""
    return _with_digest([*map(dict, rows), {_SEAL: {"of": of, "sha256": _BLANK}}])


def unsealed_rows(url: str, raw: bytes, of: str, remedy: str) -> list[dict[str, Any]]:
    """The rows again.

    Raises:
        StoreDamagedError: they are not what was written.
    """
    try:
        content = uri.parsed(url, raw)
    except StoreDamagedError as error:
        raise StoreDamagedError(f"{error}; {remedy}") from None
    rows = content if isinstance(content, list) and all(isinstance(row, dict) for row in content) else []
    why = _fault(rows[-1].get(_SEAL) if rows else None, raw, of)
    if why is not None:
        raise StoreDamagedError(f"{url} is no sound table ({why}); {remedy}")
    return rows[:-1]
