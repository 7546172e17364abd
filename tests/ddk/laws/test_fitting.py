from __future__ import annotations

import math

import numpy as np
import pytest
from made_laws import TWO, Truth, dcpt, own, points

from ddk.errors import UserError
from ddk.laws.fitting import Law, fit, fit_all, huber
from ddk.laws.forms import FORMS, FormName
from ddk.laws.points import Point, by_domain
from ddk.laws.quality import best_form, bias_by_size, interval, quality, resampled

SIZES = (1e6, 3e6, 1e7)
TRUTHS = {"a": dcpt(1.5, 30.0, 0.3), "b": dcpt(1.2, 20.0, 0.5)}


@pytest.fixture(scope="module")
def law() -> Law:
    return fit(by_domain(points(TRUTHS, TWO, sizes=SIZES))["a"], "dcpt")


def test_the_constants_of_a_known_law_come_back() -> None:
    truth = {"a": lambda n, d, r: 1.5 + 60.0 / n**0.34 + 25.0 / d**0.25}
    found = fit(by_domain(points({**truth, "b": truth["a"]}, TWO, sizes=SIZES))["a"], "power").constants
    assert found == pytest.approx({"E": 1.5, "B": 25.0, "beta": 0.25, "A": 60.0, "alpha": 0.34}, rel=2e-2)


def test_a_known_law_is_predicted_between_and_beyond_its_points(law: Law) -> None:
    assert law.constants["beta"] == pytest.approx(0.3, abs=0.03)
    assert law.constants["alpha"] == pytest.approx(0.3, abs=0.02)
    for size, tokens, share in ((2e6, 3e6, 0.25), (3e6, 6e6, 0.4), (1e7, 3.2e7, 0.7), (3e7, 8e6, 0.2)):
        expected = TRUTHS["a"](size, tokens, share)
        assert law.losses(size, tokens, np.array([share, 1 - share]))[0] == pytest.approx(expected, rel=3e-3)


def test_noise_is_not_fitted() -> None:
    noisy = by_domain(points(TRUTHS, TWO, sizes=SIZES, noise=0.003))["a"]
    good = quality(noisy, fit(noisy, "dcpt"))
    assert good.r2 > 0.98
    assert good.ratio is not None
    assert good.ratio.median < 0.006
    assert good.length is not None
    assert good.length.median < 0.006


def test_the_loss_falls_with_the_share_also_where_the_points_say_otherwise() -> None:
    rising = {"a": lambda n, d, r: 2.0 + 20 / d**0.3 + 0.2 * r, "b": own(1.0, 30.0, 1e5)}
    law = fit(by_domain(points(rising, TWO))["a"], "dcpt")
    for tokens in (1e6, 8e6):
        losses = law.losses(1e6, tokens, np.array([[r, 1 - r] for r in np.linspace(0.1, 0.9, 30)]))
        assert np.diff(losses).max() < 1e-3


@pytest.mark.parametrize("form", ["own_tokens", "power"])
def test_with_one_size_there_is_no_term_in_it(form: FormName) -> None:
    truths = {"a": own(1.5, 40.0, 2e5), "b": own(1.0, 30.0, 1e5)}
    law = fit(by_domain(points(truths, TWO))["a"], form)
    assert not law.sized
    assert "A" not in law.constants
    assert law.losses(1e6, 4e6, np.array([0.5, 0.5])) == pytest.approx(law.losses(9e9, 4e6, np.array([0.5, 0.5])))


def test_two_sizes_take_the_exponent_of_chinchilla() -> None:
    law = fit(by_domain(points(TRUTHS, TWO, sizes=SIZES[:2]))["a"], "dcpt")
    assert law.constants["alpha"] == 0.34


def test_the_form_that_predicts_best_is_chosen() -> None:
    truths = {"a": own(1.5, 40.0, 2e5), "b": own(1.0, 60.0, 4e5)}
    assert best_form(by_domain(points(truths, TWO[1::2])), workers=1) == "own_tokens"


def forgetting(rising: float) -> Truth:
    """A student that knew the domain: its loss rises by so much without tokens of its own, and falls again later."""
    return lambda n, d, r: (
        2.0 + 30.0 / (3e5 + r * d) ** 0.35 + rising * (1 - r) ** 2 * (1 - math.exp(-d / 1.5e6)) + 40.0 / n**0.3
    )


def test_a_loss_that_rises_first_is_predicted_by_the_form_that_knows_of_forgetting() -> None:
    truths = {"a": forgetting(0.5), "b": forgetting(0.3)}
    lengths = [n * 1e6 for n in (0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8)]
    domains = by_domain(points(truths, TWO[::2], tokens=lengths, noise=0.001))
    there = domains["a"]
    assert there.losses[2] > there.losses[0], "with a tenth of the tokens it rises"
    law, without = fit(there, "forgetting"), fit(there, "own_tokens")
    errors = [
        np.abs(one.losses(there.parameters, there.tokens, there.shares) / there.losses - 1) for one in (law, without)
    ]
    assert np.median(errors[0]) < 0.2 * np.median(errors[1])
    for tokens, share in ((1e6, 0.2), (3e6, 0.67), (8e6, 0.8)):
        expected = truths["a"](1e6, tokens, share)
        assert law.losses(1e6, tokens, np.array([share, 1 - share]))[0] == pytest.approx(expected, rel=2e-3)
    assert law.constants["tau"] == pytest.approx(1.5e6, rel=0.2)


def test_a_student_that_its_size_does_not_explain_is_seen(law: Law) -> None:
    alike = by_domain(points(TRUTHS, TWO, sizes=SIZES))["a"]
    assert all(abs(bias) < 1e-3 for bias in bias_by_size(alike, law).values())
    behind = {"a": lambda n, d, r: TRUTHS["a"](n, d, r) * (1.1 if n == 1e7 else 1.0), "b": TRUTHS["b"]}
    domains = by_domain(points(behind, TWO, sizes=SIZES))
    assert max(abs(bias) for bias in bias_by_size(domains["a"], fit(domains["a"], "dcpt")).values()) > 0.01


def test_outliers_weigh_as_far_as_the_hubers_bend() -> None:
    assert huber(np.array([0.005])) == pytest.approx(0.5 * 0.005**2)
    assert huber(np.array([0.05])) == pytest.approx(0.01 * (0.05 - 0.005))
    assert huber(np.array([0.0, 0.05]), np.array([3.0, 1.0])) == pytest.approx(0.01 * 0.045 / 4)


def test_resampling_draws_runs_and_keeps_the_truth_inside() -> None:
    noisy = by_domain(points({"a": own(1.5, 40.0, 2e5), "b": own(1.0, 30.0, 1e5)}, TWO, noise=0.004))["a"]
    law = fit(noisy, "own_tokens")
    again = resampled(noisy, law, times=60)
    ends = np.array([one.losses(1e6, 8e6, np.array([0.4, 0.6]))[0] for one in again])
    low, high = interval(ends)
    assert len(again) == 60
    assert ends.std() > 1e-5
    assert low < own(1.5, 40.0, 2e5)(1e6, 8e6, 0.4) < high
    assert [one.theta for one in resampled(noisy, law, times=3)] == [one.theta for one in again[:3]]


def test_all_domains_side_by_side_are_as_one_by_one() -> None:
    domains = by_domain(points({"a": own(1.5, 40.0, 2e5), "b": own(1.0, 30.0, 1e5)}, TWO))
    assert fit_all(domains, "power", workers=2) == {name: fit(one, "power") for name, one in domains.items()}


def test_a_place_outside_is_named(law: Law) -> None:
    assert law.outside(2e6, 2e6, 0.5) == []
    said = law.outside(2e9, 2e6, 0.95)
    assert len(said) == 2
    assert said[0].startswith("parameters 2e+09")
    assert said[1].startswith("share 0.95")


def points_of_one(**changed: object) -> list[Point]:
    fields: dict[str, object] = {
        "run": "a",
        "parameters": 1e6,
        "tokens": 1e6,
        "shares": {"a": 0.5, "b": 0.5},
        "losses": {"a": 3.0, "b": 2.0},
    }
    return [Point(**{**fields, **changed})]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "no measurement"),
        (points_of_one(losses={"a": float("nan"), "b": 2.0}), "run 'a' has the loss nan on 'a'"),
        (points_of_one(losses={"a": 3.0, "b": float("inf")}), "the loss inf on 'b'"),
        (points_of_one(shares={"a": 0.9, "b": 0.9}), "are no parts of 1"),
        (points_of_one(tokens=0.0), "has 0.0 tokens"),
        (
            [*points_of_one(), *points_of_one(run="b", losses={"a": 1.0}, shares={"a": 1.0})],
            "run 'b' has the domains a,",
        ),
    ],
)
def test_points_that_are_none_are_refused_by_name(found: list[Point], said: str) -> None:
    with pytest.raises(UserError, match=r"\w") as refused:
        by_domain(found)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("mixtures", "tokens", "said"),
    [
        (TWO[:1], (1e6, 2e6), "has 2 measurements in 1 runs"),
        ([(0.5, 0.5)] * 3, (1e6, 2e6, 4e6), "has the share 0.50 in every run"),
        (TWO, (1e6, 2e6), "after 2 different numbers of tokens"),
    ],
)
def test_points_that_determine_no_law_are_refused(
    mixtures: list[tuple[float, float]], tokens: tuple[float, ...], said: str
) -> None:
    domains = by_domain(points({"a": own(1.5, 40.0, 2e5), "b": own(1.0, 30.0, 1e5)}, mixtures, tokens=tokens))
    for form in FORMS:
        with pytest.raises(UserError, match="ddk law design") as refused:
            fit(domains["a"], form)
        assert said in str(refused.value)
