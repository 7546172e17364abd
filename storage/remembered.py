"""Small facts that save work, kept in one JSON file: what is lost or damaged is found out again.

    {"facts": {key: fact, ...}, "sha256": of the facts and of the file's name}

So a flipped digit is never taken for a fact, and neither is a file that belongs elsewhere. Two processes that write at
once may lose each other's facts; that costs time only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from storage import uri


def recall(url: str) -> dict[str, Any]:
    """The facts; none where there is no such file, or it is not as it was written."""
    try:
        content = uri.read_json(url)
    except ValueError:
        return {}
    if not isinstance(content, dict) or not isinstance(facts := content.get("facts"), dict):
        return {}
    return facts if content.get("sha256") == _sha256(url, facts) else {}


def remember(url: str, facts: Mapping[str, Any]) -> None:
    """Add facts, or replace those of the same keys."""
    known = uri.as_json({**recall(url), **facts})
    uri.write_json(url, {"facts": known, "sha256": _sha256(url, known)})


def _sha256(url: str, facts: Mapping[str, Any]) -> str:
    name = url.rstrip("/").rpartition("/")[2]
    return hashlib.sha256(f"{name}\0{json.dumps(facts, sort_keys=True)}".encode(errors="replace")).hexdigest()
