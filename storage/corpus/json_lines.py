"""Reads JSON from other tools, with numbers of any length and with duplicate names."""

from __future__ import annotations

import json
from typing import Any

_LONGEST = 400
"""Digits of a number that is read: Python refuses thousands of them, and no record's meaning hangs on these."""
BEYOND = 10**_LONGEST
"""What stands for a longer one."""


def _integer(digits: str) -> int:
    return int(digits) if len(digits) <= _LONGEST else BEYOND


_PATIENT = json.JSONDecoder(parse_int=_integer)
_PAIRS = json.JSONDecoder(parse_int=_integer, object_pairs_hook=list)


def parsed(line: str | bytes) -> Any:
    """The value of one line.

    Raises:
        ValueError: it is no JSON, or nested more deeply than any record is.
    """
    try:
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of thousands of digits
            return _PATIENT.decode(_text(line))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def comes_twice(line: str | bytes, name: str) -> bool:
    """Whether the object that a line holds has a name more than once; JSON takes the last value, without a word."""
    quoted = json.dumps(name, ensure_ascii=False)
    if (line.count(quoted) if isinstance(line, str) else line.count(quoted.encode())) < 2:
        return False
    return [key for key, _ in _PAIRS.decode(_text(line))].count(name) > 1


def _text(line: str | bytes) -> str:
    return line if isinstance(line, str) else line.decode()
