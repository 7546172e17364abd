"""Lines to complete: which are asked for, and how a completion is judged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluation.completions import (
    MAX_PREFIX_CHARACTERS,
    Completion,
    draw_completions,
    edit_similarity,
    exact_match,
    levenshtein,
)

TEXTS = st.text(alphabet="ab(é中 ", max_size=70)


def plain_levenshtein(a: str, b: str) -> int:
    """The table of the textbook, a row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        following = [i]
        for j, y in enumerate(b, 1):
            following.append(min(row[j] + 1, following[-1] + 1, row[j - 1] + (x != y)))
        row = following
    return row[-1]


@given(TEXTS, TEXTS)
def test_the_distance_is_that_of_the_textbook(a: str, b: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == plain_levenshtein(a, b)


@pytest.mark.parametrize(
    ("generated", "target", "distance"),
    [("", "", 0), ("kitten", "sitting", 3), ("return x", "return x + 1", 4), ("a", "", 1), ("", "abc", 3)],
)
def test_known_distances(generated: str, target: str, distance: int) -> None:
    assert levenshtein(generated, target) == distance
    longer = max(len(generated), len(target))
    assert edit_similarity(generated, target) == pytest.approx(1 - distance / longer if longer else 1.0)


@given(TEXTS, TEXTS)
def test_similarity_is_a_share_and_one_only_for_equal_lines(a: str, b: str) -> None:
    assert 0.0 <= edit_similarity(a, b) <= 1.0
    assert (edit_similarity(a, b) == 1.0) == (exact_match(a, b) == 1.0) == (a.strip() == b.strip())


def test_blanks_around_a_line_do_not_count() -> None:
    assert exact_match("    return x  ", "\treturn x") == 1.0
    assert exact_match("return  x", "return x") == 0.0


DOCUMENT = "import os\n\n\ndef area(r):\n    }\n    return 3.14 * r * r\nx = 1\nprint(area(2))\n"


def test_lines_that_are_too_short_or_come_first_are_not_asked_for() -> None:
    asked = draw_completions([DOCUMENT], 99, seed=0)
    # The first line has nothing before it, a bracket says nothing, and `x = 1` is five characters long.
    assert [one.target for one in asked] == ["def area(r):", "    return 3.14 * r * r", "x = 1", "print(area(2))"]
    for one in asked:
        assert DOCUMENT.startswith(one.prefix + one.target + "\n")
        assert one.prefix.endswith("\n")


def test_the_draw_is_uniform_without_repeats_and_known_by_its_seed() -> None:
    documents = ["".join(f"value_{d}_{i} = {i}\n" for i in range(50)) for d in range(4)]
    every = draw_completions(documents, 10_000, seed=1)
    assert len(every) == 4 * 49
    drawn = draw_completions(documents, 40, seed=1)
    assert drawn == draw_completions(documents, 40, seed=1)
    assert drawn != draw_completions(documents, 40, seed=2)
    assert len({one.target for one in drawn}) == 40
    assert [one for one in every if one in drawn] == drawn, "in the documents' order"
    counts = [0] * 4
    for seed in range(50):
        for one in draw_completions(documents, 40, seed=seed):
            counts[int(one.target.split("_")[1])] += 1
    # 2,000 lines of 4 equal documents: 500 each, a standard deviation of about 19.
    assert all(400 < count < 600 for count in counts), counts


def test_a_long_prefix_keeps_its_last_whole_lines() -> None:
    lines = [f"row_{i:05} = compute({i})" for i in range(1000)]
    (asked,) = [one for one in draw_completions(["\n".join(lines)], 10_000, seed=0) if one.target == lines[-1]]
    assert MAX_PREFIX_CHARACTERS - 30 < len(asked.prefix) <= MAX_PREFIX_CHARACTERS
    assert asked.prefix == "\n".join(lines[:-1])[-len(asked.prefix) + 1 :] + "\n"
    assert asked.prefix.startswith("row_")


def test_a_line_longer_than_the_prefix_may_be_is_cut() -> None:
    text = "x" * (3 * MAX_PREFIX_CHARACTERS) + "\nreturn value\n"
    assert draw_completions([text], 9, seed=0) == [Completion("x" * (MAX_PREFIX_CHARACTERS - 1) + "\n", "return value")]


def test_only_a_line_feed_ends_a_line() -> None:
    text = "first line\nnext\u2028of it \x0c here\r\nlast line\n"
    assert [one.target for one in draw_completions([text], 9, seed=0)] == ["next\u2028of it \x0c here", "last line"]
