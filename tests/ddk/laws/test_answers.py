"""Answers against a search of every mixture and every length."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from made_laws import THREE, TWO, dcpt, own, points

from ddk.errors import UserError
from ddk.laws.answers import Objective, best_mixture, outcome, sizes_at, tokens_until
from ddk.laws.fitting import Law, fit_all
from ddk.laws.points import by_domain

TRUTHS = {"a": own(1.5, 200.0, 2e5), "b": own(1.0, 260.0, 4e5), "c": own(2.0, 120.0, 1e5)}
TEACHER = {"a": 1.6, "b": 1.5, "c": 2.1}
TOKENS = 6e6
DOMAINS = ("a", "b", "c")


@pytest.fixture(scope="module")
def laws() -> dict[str, Law]:
    return fit_all(by_domain(points(TRUTHS, THREE)), "own_tokens")


def grid(laws: dict[str, Law]) -> list[dict[str, float]]:
    """Every mixture of 1/60 within the laws' ranges."""
    low, high = laws["a"].span.share
    shares = [k / 60 for k in range(61)]
    return [
        {"a": a, "b": b, "c": 1 - a - b}
        for a, b in itertools.product(shares, shares)
        if all(low - 1e-9 <= one <= high + 1e-9 for one in (a, b, 1 - a - b))
    ]


@pytest.mark.parametrize("kind", ["worst", "mean"])
def test_the_best_mixture_is_that_of_a_search(laws: dict[str, Law], kind: str) -> None:
    def value(mixture: dict[str, float]) -> float:
        found = outcome(laws, TEACHER, 1e6, TOKENS, mixture)
        return math.log(found.worst) if kind == "worst" else found.mean

    found = best_mixture(laws, TEACHER, 1e6, TOKENS, Objective(kind=kind))
    assert sum(found.values()) == pytest.approx(1.0)
    assert value(found) <= min(map(value, grid(laws))) + 1e-6


def test_one_domain_is_served_while_the_others_keep_to_their_limits(laws: dict[str, Law]) -> None:
    equal = dict(outcome(laws, TEACHER, 1e6, TOKENS, dict.fromkeys(DOMAINS, 1 / 3)).losses)
    goal = Objective.parse("b", DOMAINS, 0.02)
    found = best_mixture(laws, TEACHER, 1e6, TOKENS, goal, start=equal)
    there = outcome(laws, TEACHER, 1e6, TOKENS, found).losses
    allowed = [
        one
        for one in grid(laws)
        if all(outcome(laws, TEACHER, 1e6, TOKENS, one).losses[d] <= 1.02 * equal[d] for d in ("a", "c"))
    ]
    best = min(outcome(laws, TEACHER, 1e6, TOKENS, one).losses["b"] for one in allowed)
    assert there["b"] <= best + 1e-6
    assert there["b"] < equal["b"]
    assert all(there[domain] <= 1.0201 * equal[domain] for domain in ("a", "c"))


def test_what_cannot_be_kept_is_refused(laws: dict[str, Law]) -> None:
    low = dict.fromkeys(DOMAINS, 0.5)
    with pytest.raises(UserError, match="within 1% of their start"):
        best_mixture(laws, TEACHER, 1e6, TOKENS, Objective.parse("b", DOMAINS, 0.01), start=low)
    with pytest.raises(UserError, match="allow more epochs"):
        best_mixture(laws, TEACHER, 1e6, TOKENS, Objective(kind="mean"), most=dict.fromkeys(DOMAINS, 0.1 * TOKENS))


def test_a_domain_is_not_drawn_beyond_its_blocks(laws: dict[str, Law]) -> None:
    free = best_mixture(laws, TEACHER, 1e6, TOKENS, Objective(kind="worst"))
    most = max(free, key=lambda domain: free[domain])
    bound = best_mixture(laws, TEACHER, 1e6, TOKENS, Objective(kind="worst"), most={most: 0.2 * TOKENS})
    assert bound[most] == pytest.approx(0.2, abs=1e-6)
    assert free[most] > 0.3


def test_tokens_until_a_ratio(laws: dict[str, Law]) -> None:
    equal = dict.fromkeys(DOMAINS, 1 / 3)
    found = tokens_until(laws, TEACHER, 1e6, 1.6, lambda tokens: equal)
    assert found is not None
    assert outcome(laws, TEACHER, 1e6, found, equal).worst == pytest.approx(1.6, abs=2e-3)
    assert outcome(laws, TEACHER, 1e6, found * 0.98, equal).worst > 1.6
    assert tokens_until(laws, TEACHER, 1e6, 0.5, lambda tokens: equal) is None


def test_the_size_at_fixed_operations_is_that_of_the_truth() -> None:
    truths = {"a": dcpt(1.5, 30.0, 0.3), "b": dcpt(1.2, 20.0, 0.5)}
    laws = fit_all(by_domain(points(truths, TWO, sizes=(1e5, 1e6, 1e7))), "dcpt")
    flops = 6.0 * 1e6 * 4e6
    along = sizes_at(laws, {"a": 1.0, "b": 1.0}, flops, Objective(kind="mean"), {"a": 0.5, "b": 0.5}, places=200)
    size = min(along, key=lambda place: place[2])[0]
    sizes = np.geomspace(5e4, 2e7, 2000)
    truth = sizes[int(np.argmin([sum(one(n, flops / 6 / n, 0.5) for one in truths.values()) for n in sizes]))]
    assert size == pytest.approx(truth, rel=0.15)
    assert all(6 * n * d == pytest.approx(flops) for n, d, _ in along)


def test_one_size_says_nothing_of_sizes(laws: dict[str, Law]) -> None:
    with pytest.raises(UserError, match="knows one size"):
        sizes_at(laws, TEACHER, 1e15, Objective(kind="mean"), dict.fromkeys(DOMAINS, 1 / 3))


@pytest.mark.parametrize(("text", "tolerance"), [("wurst", None), ("worst", 0.1), ("mean", 0.1)])
def test_objectives_that_are_none(text: str, tolerance: float | None) -> None:
    with pytest.raises(UserError, match=r"--objective|--tolerance"):
        Objective.parse(text, DOMAINS, tolerance)
