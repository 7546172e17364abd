from __future__ import annotations

import numpy as np
import pytest
from made_laws import TWO, Truth, own, points

from ddk.errors import UserError
from ddk.laws.cross import beginning, fit_across, unit_of
from ddk.laws.points import by_domain

UNIT = 2e6


def shared(first: float, fall: float) -> Truth:
    """A domain under one law across domains, by its learnability."""
    learnability = 0.5 / first + 0.5 * fall
    return lambda n, d, r: 0.8 + 0.6 * r**0.4 / (d / UNIT) ** 0.2 + 0.2 / (r + 0.1) ** 0.5 + 0.9 / learnability**0.5


KNOWN = {"a": (5.0, 0.30), "b": (4.2, 0.45), "c": (6.0, 0.20), "d": (5.6, 0.5), "e": (4.5, 0.25), "new": (5.5, 0.36)}
TURNS = [tuple(np.roll([0.05, 0.1, 0.15, 0.25, 0.45], turn)) for turn in range(5)]


def test_a_domain_that_was_left_out_is_predicted() -> None:
    truths = {name: shared(*known) for name, known in KNOWN.items() if name != "new"}
    domains = by_domain(points(truths, TURNS))
    starts = {
        name: beginning(first, first - fall * np.log1p(1.0), unit_of(domains), unit_of(domains))
        for name, (first, fall) in KNOWN.items()
    }
    assert starts["a"].fall == pytest.approx(0.30)
    law = fit_across(domains, starts)
    tokens, shares = np.array([1e6, 4e6, 8e6]), np.array([0.2, 0.33, 0.5])
    expected = [shared(*KNOWN["new"])(1e6, d, r) for d, r in zip(tokens, shares, strict=True)]
    assert law.losses(tokens, shares, starts["new"]) == pytest.approx(expected, rel=0.03)


def test_too_few_domains_and_several_sizes_are_refused() -> None:
    two = by_domain(points({"a": own(1.5, 40.0, 2e5), "b": own(1.0, 30.0, 1e5)}, TWO))
    with pytest.raises(UserError, match="at least 4 domains"):
        fit_across(two, {})
    truths = dict.fromkeys("abcde", own(1.5, 40.0, 2e5))
    with pytest.raises(UserError, match="one size of student"):
        fit_across(by_domain(points(truths, TURNS, sizes=(1e6, 2e6))), {})
