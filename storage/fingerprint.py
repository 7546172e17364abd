"""The address of a store: a hash of everything that determines its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """16 hexadecimal digits; equal for equal inputs, whatever the order of the keys.

    `inputs` is plain JSON data (no URLs, no times: the same corpus on another disk has the same fingerprint).
    """
    canonical = json.dumps(inputs, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


_ABSENT = object()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Which fields differ between two descriptions, as `field: old → new`, nested fields with dots."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {_shown(before)} → {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else repr(value)
