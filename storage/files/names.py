"""Names that come from stored or foreign data, checked before they become a part of a path or a URL.

Otherwise, anybody who can write one JSON file of a root (a checkpoint's `state.json`, a manifest, a downloaded index of
weights) could choose which files are read, written or removed. Therefore a name is used only if it is the plain name of
a file directly below its folder:

    rank-00000.safetensors, math~Algebra.zarr, 0a1b2c.2     plain
    "", ".", "../x", "/etc/passwd", "a/b", "C:x", "a*"      refused
    "x::file:///etc", "a?versionId=b", "a\\n"                refused: fsspec and S3 read more than a name in these
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from storage.errors import StoreDamagedError

LONGEST = 255
"""Bytes of a name, in UTF-8: more than most file systems hold."""
_SPECIAL = frozenset('/\\:*?[]#%"<>|')


def plain_name(name: Any, place: str) -> str:
    """Return the name if it can only be the name of a file or folder directly below another folder.

    Args:
        name: as it was read, of whatever type.
        place: file (or URL) that holds it; the message begins with it.

    Raises:
        StoreDamagedError: it is something else.
    """
    if (reason := why_not_plain(name)) is not None:
        raise StoreDamagedError(f"{place} names the file {_shown(name)}, which {reason}; restore {place} or remove it")
    return str(name)


def plain_path(path: Any, place: str) -> str:
    """Likewise of a path below the folder, whose parts are plain names: `report/index.html`.

    Raises:
        StoreDamagedError: it is something else.
    """
    parts = path.split("/") if isinstance(path, str) else [path]
    for reason in map(why_not_plain, parts):
        if reason is not None:
            raise StoreDamagedError(
                f"{place} names the file {_shown(path)}, which {reason}; restore {place} or remove it"
            )
    return str(path)


def why_not_plain(name: Any) -> str | None:
    """What a name is instead of a plain one, to follow 'which'; None where it is plain."""
    if not isinstance(name, str):
        return "is no text"
    if name in ("", ".", ".."):
        return "would lead out of its folder"
    if special := sorted(_SPECIAL & set(name)):
        return "would lead out of its folder" if special[0] in "/\\" else f"holds {special[0]!r}"
    if not name.isprintable() or name != name.strip():
        return "holds a character that cannot be seen"
    if len(name.encode(errors="replace")) > LONGEST:
        return f"is longer than {LONGEST} bytes"
    return None


def _shown(name: Any) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:80]}…"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches any of the patterns: 'weekly-*'. Upper and lower case differ."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
