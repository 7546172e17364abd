"""Sealed JSON changed by somebody who makes its digest anew: then only the schema and the place can tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.files import uri
from storage.files.sealed import _BLANK, _SEAL, _with_digest


def resealed(url: str, change: Callable[[dict[str, Any]], None] = lambda content: None, **fields: Any) -> None:
    """Replace fields of a sealed file, or change its content in place, and seal it again to what it was of."""
    content = json.loads(uri.read_bytes(url) or b"")
    content |= fields
    change(content)
    content[_SEAL] = {"of": content[_SEAL]["of"], "sha256": _BLANK}
    uri.write_bytes(url, _with_digest(content))


def content_of(path: Path) -> dict[str, Any]:
    """What a sealed file says, without its digest and without which file it is."""
    content: dict[str, Any] = json.loads(path.read_bytes())
    del content[_SEAL]
    return content
