from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.files.ranges import cut, runs_of


@given(st.lists(st.tuples(st.integers(-60, 60), st.integers(0, 20)), max_size=12))
def test_the_runs_hold_every_range_and_never_touch(ranges: list[tuple[int, int]]) -> None:
    content = bytes(range(50))
    runs, place = runs_of(ranges)
    read = [content[start : start + length] if start >= 0 else content[start:] for start, length in runs]
    for start, length in ranges:
        if length:
            expected = content[start : start + length] if start >= 0 else content[start:][:length]
            run = place[start, length]
            assert cut(read[run], runs[run], (start, length)) == expected
    from_the_start = [run for run in runs if run[0] >= 0]
    assert all(sum(first) < second[0] for first, second in itertools.pairwise(from_the_start))
    wanted = {byte for start, length in ranges if start >= 0 for byte in range(start, start + length)}
    assert sum(length for _, length in from_the_start) == len(wanted), "no byte is read that nobody wants"


def test_a_worked_example() -> None:
    assert runs_of([(0, 10), (50, 5), (10, 20), (-8, 8)])[0] == [(-8, 8), (0, 30), (50, 5)]
    with pytest.raises(ValueError, match="a range cannot have -1 bytes"):
        runs_of([(0, -1)])
