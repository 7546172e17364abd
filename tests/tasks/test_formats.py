from __future__ import annotations

import math

import pytest

from tasks.formats import change, duration, markdown_table, percent, ppl


@pytest.mark.parametrize(
    ("seconds", "said"), [(9.5, "9.5 s"), (59.97, "1 min 00 s"), (65, "1 min 05 s"), (3725, "1 h 02 min")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_large_perplexities_stay_short():
    assert [ppl(value) for value in (1.0, 12345.678, 1.5e9)] == ["1.00", "12,345.68", "1.50e+09"]


def test_a_change_has_its_sign():
    assert [change(value) for value in (0.01234, -0.5, 0.0)] == ["+0.0123", "−0.5000", "+0.0000"]
    assert change(-1.0, 1) == "−1.0"
    assert [change(value) for value in (None, math.nan, math.inf)] == ["–"] * 3


def test_percent():
    assert [percent(0.99987), percent(0.99987, 2), percent(None)] == ["100.0\xa0%", "99.99\xa0%", "–"]


def test_a_table_aligns_numbers_to_the_right():
    assert markdown_table(("domain", "ppl"), [("web", "8.00")]) == "| domain | ppl |\n| :--- | ---: |\n| web | 8.00 |"
