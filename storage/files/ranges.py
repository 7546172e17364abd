"""Byte ranges of a file: which of them are read together."""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]
"""First byte and number of bytes. A first byte below 0 counts from the end: (-100, 100) are the last 100."""


def runs_of(ranges: Iterable[Range]) -> tuple[list[Range], dict[Range, int]]:
    """The ranges with those that touch or overlap made one, and for each range the number of its run.

    Example: (0, 10), (50, 5), (10, 20) → runs (0, 30), (50, 5). Ranges from the end stay as they are, since nobody
    knows yet where they begin; empty ones are in no run.

    Raises:
        ValueError: a length below 0.
    """
    runs: list[Range] = []
    place: dict[Range, int] = {}
    for start, length in sorted(set(ranges)):
        if length < 0:
            raise ValueError(f"a range cannot have {length} bytes")
        if not length:
            continue
        if runs and runs[-1][0] >= 0 and start <= sum(runs[-1]):
            first = runs[-1][0]
            runs[-1] = (first, max(sum(runs[-1]), start + length) - first)
        else:
            runs.append((start, length))
        place[start, length] = len(runs) - 1
    return runs, place


def cut(content: bytes, run: Range, wanted: Range) -> bytes:
    """The bytes of a range, of the content of its run; fewer where the file ended before.

    The content of a run from the end may go on to the end.
    """
    start = wanted[0] - run[0]
    return content[start : start + wanted[1]]
