"""Small facts that save work, kept in one sealed JSON file; lost or damaged facts are computed again.

Because of the seal, neither a flipped digit nor a file that belongs elsewhere is ever taken for a fact. Two processes
that write at the same time may lose each other's facts, which only costs time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.errors import StoreError
from storage.files import uri
from storage.files.sealed import Sealed

_MEMORY = Sealed(
    what="memory of a root", version=1, remedy="nothing need be done: its content is computed again when it is needed"
)


def recall(url: str) -> dict[str, Any]:
    """The facts, by key; none where there is no such file, or it is not as it was written."""
    try:
        return facts_of(url)
    except StoreError:
        return {}


def facts_of(url: str) -> dict[str, Any]:
    """`recall`, with an error where the file is not as it was written.

    Raises:
        StoreDamagedError, FormatVersionError: it is not.
    """
    content = _MEMORY.read(url, _name(url))
    facts = content.get("facts") if content is not None else {}
    if not isinstance(facts, dict):
        raise _MEMORY.damaged(url, "it holds no facts")
    return facts


def remember(url: str, facts: Mapping[str, Any]) -> None:
    """Add facts, or replace those of the same keys."""
    _MEMORY.write(url, {"facts": {**recall(url), **facts}}, _name(url))


def _name(url: str) -> str:
    return f"the memory {uri.name_of(url)}"
