from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from made_laws import TWO, Truth, own, points

from ddk.errors import UserError
from ddk.laws.cross import Beginning, fit_across
from ddk.laws.points import by_domain

TURNS = [tuple(np.roll([0.05, 0.1, 0.15, 0.25, 0.45], turn)) for turn in range(5)]
TOKENS = (5e5, 1e6, 2e6, 4e6, 8e6)


def approaching(first: float, teacher: float, speed: float) -> Truth:
    """A domain whose distance from its teacher shrinks, while others' tokens make the student forget it."""

    def loss(n: float, d: float, r: float) -> float:
        forgotten = 0.3 * (1 - r) ** 2 * (1 - math.exp(-d / 1e6))
        return teacher + (first - teacher) / (1 + speed * ((r + 0.1) * d / 1e6) ** 0.6) + forgotten

    return loss


def power(first: float, teacher: float, speed: float) -> Truth:
    """A domain whose loss follows another law than the one that is fitted."""
    return lambda n, d, r: teacher + (first - teacher) * (1 + (r + 0.1) * d / 1e6) ** -speed


KNOWN = {
    "a": (5.0, 3.0, 0.30),
    "b": (4.2, 3.1, 0.45),
    "c": (6.0, 3.5, 0.20),
    "d": (5.6, 4.0, 0.5),
    "e": (4.5, 2.5, 0.25),
}
NEW = (5.5, 3.2, 0.36)


def beginning(truth: Truth, first: float, teacher: float) -> Beginning:
    return Beginning(first=first, after=truth(1e6, 5e5, 0.15), tokens=5e5, share=0.15, teacher=teacher)


@pytest.mark.parametrize(("made", "within"), [(approaching, 0.005), (power, 0.02)])
def test_a_domain_that_was_left_out_is_predicted(made: Callable[[float, float, float], Truth], within: float) -> None:
    truths = {name: made(*known) for name, known in KNOWN.items()}
    starts = {name: beginning(truths[name], first, teacher) for name, (first, teacher, _) in KNOWN.items()}
    law = fit_across(by_domain(points(truths, TURNS, tokens=TOKENS)), starts)
    truth = made(*NEW)
    known = beginning(truth, NEW[0], NEW[1])
    tokens, shares = np.array([5e5, 1e6, 4e6, 8e6]), np.array([0.15, 0.2, 0.33, 0.5])
    expected = [truth(1e6, d, r) for d, r in zip(tokens, shares, strict=True)]
    found = law.losses(tokens, shares, known)
    assert found[0] == pytest.approx(known.after, rel=1e-9), "it goes through what was measured"
    assert found == pytest.approx(expected, rel=within)


def test_a_domain_on_which_the_student_begins_below_its_teacher_is_predicted_near_what_was_measured() -> None:
    truths = {name: approaching(*known) for name, known in KNOWN.items()}
    starts = {name: beginning(truths[name], first, teacher) for name, (first, teacher, _) in KNOWN.items()}
    law = fit_across(by_domain(points(truths, TURNS, tokens=TOKENS)), starts)
    known = Beginning(first=3.0, after=3.02, tokens=5e5, share=0.15, teacher=3.2)
    assert law.losses(np.array([1e6, 8e6]), np.array([0.5, 0.5]), known) == pytest.approx(3.0, abs=0.1)


def test_too_few_domains_and_several_sizes_are_refused() -> None:
    two = by_domain(points({"a": own(1.5, 40.0, 2e5), "b": own(1.0, 30.0, 1e5)}, TWO))
    with pytest.raises(UserError, match="at least 4 domains"):
        fit_across(two, {})
    truths = dict.fromkeys("abcde", own(1.5, 40.0, 2e5))
    with pytest.raises(UserError, match="one size of student"):
        fit_across(by_domain(points(truths, TURNS, sizes=(1e6, 2e6))), {})
