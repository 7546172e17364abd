"""The paths of domains: as a record's field gives them, and as they appear in the names of store folders.

    field   " /Algebra/Linear algebra/ "        path   Algebra/Linear algebra
    domain  math/Algebra/Linear algebra         store  math~Algebra~Linear=20algebra.zarr

A domain without a path has the name that it always had. A part may hold whatever is printable, since fields do ("C++",
"Number Theory"); of a store's name only letters, digits, '.', '_' and '-' of ASCII stand for themselves, '/' is '~',
and every other byte of UTF-8 is '=' and two hexadecimal digits. Two domains never share a name.
"""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import unquote

LONGEST_NAME = 200
"""Of a store, before its suffix: most file systems hold 255 bytes."""


@lru_cache(maxsize=4096)
def record_path(value: str) -> str:
    """A path as a field holds it, with the space around its parts taken off, and a slash at either end.

    Raises:
        ValueError: a part is empty or cannot be printed; the message says which.
    """
    parts = [part.strip() for part in value.strip().strip("/").split("/")]
    if not all(parts):
        raise ValueError("a part of it is empty" if any(parts) else "it is empty")
    if unprintable := [part for part in parts if not part.isprintable()]:
        raise ValueError(f"its part {unprintable[0]!r} cannot be printed")
    return "/".join(parts)


def cut_path(path: str, depth: int | None) -> str:
    """The first `depth` parts of a path; all of them where it has no more, or with None."""
    return path if depth is None else "/".join(path.split("/")[:depth])


def store_name(domain: str) -> str:
    """Name of the folder of a domain's store, below the folder of its fingerprint."""
    return "~".join(map(_spelt, domain.split("/"))) + ".zarr"


def domain_of(name: str) -> str:
    """The domain whose store is named so; `store_name` backwards."""
    parts = name.removesuffix(".zarr").split("~")
    return "/".join(unquote(part.replace("=", "%")) for part in parts)


def _spelt(part: str) -> str:
    return re.sub(
        r"[^A-Za-z0-9._-]", lambda found: "".join(f"={byte:02X}" for byte in found[0].encode()), part, flags=re.ASCII
    )
