from __future__ import annotations

import itertools
import math
import random
from decimal import Decimal, localcontext

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ddk.mixture import (
    MixtureConfig,
    caught_up,
    equal_mixture,
    fixed_mixture,
    initial_mixture,
    one_domain_alone,
    proportional_mixture,
    update_mixture,
)
from ddk.values import DomainGap, Mixture

TOLERANCE = 1e-12
calm = settings(deadline=None, max_examples=60)


def eq1(student: dict[str, float], teacher: dict[str, float]) -> dict[str, Decimal]:
    """Eq. 1 as it is written, in 60 digits: Decimal does not overflow at exp(800)."""
    with localcontext(prec=60):
        weights = {d: (Decimal(student[d]) / Decimal(teacher[d])).exp() for d in student}
        total = sum(weights.values())
        return {d: weight / total for d, weight in weights.items()}


def eq2(r: dict[str, float], student: dict[str, float], teacher: dict[str, float], alpha: float) -> dict[str, Decimal]:
    with localcontext(prec=60):
        psi = {d: Decimal(r[d]) * (Decimal(student[d]) / Decimal(teacher[d])).exp() for d in student}
        total = sum(psi.values())
        return {d: Decimal(alpha) * psi[d] / total + (1 - Decimal(alpha)) / len(psi) for d in psi}


def assert_close(mixture: Mixture, expected: dict[str, Decimal]) -> None:
    assert mixture.probabilities.keys() == expected.keys()
    for domain, probability in mixture.probabilities.items():
        assert probability == pytest.approx(float(expected[domain]), rel=1e-11, abs=1e-15), domain


perplexities = st.floats(1.0, 5000.0)


@st.composite
def measured(draw, min_size: int = 1):
    """Old mixture, student's and teacher's perplexities of the same domains."""
    names = draw(st.lists(st.text(min_size=1, max_size=4), min_size=min_size, max_size=8, unique=True))
    weights = [draw(st.floats(0.01, 1.0)) for _ in names]
    return (
        {name: weight / math.fsum(weights) for name, weight in zip(names, weights, strict=True)},
        {name: draw(perplexities) for name in names},
        {name: draw(perplexities) for name in names},
    )


def test_eq1_by_hand() -> None:
    # Ratios 2 and 1: e²/(e² + e) = 1/(1 + e⁻¹).
    mixture = initial_mixture({"code": 8.0, "web": 30.0}, {"code": 4.0, "web": 30.0})
    assert mixture.probabilities["code"] == pytest.approx(1 / (1 + math.exp(-1)), abs=TOLERANCE)


def test_eq2_by_hand() -> None:
    # ψ = [¼·e², ¾·e] ∝ [e, 3].
    mixture = update_mixture({"code": 0.25, "web": 0.75}, {"code": 8.0, "web": 30.0}, {"code": 4.0, "web": 30.0}, 0.4)
    assert mixture.probabilities["code"] == pytest.approx(0.4 * math.e / (math.e + 3) + 0.3, abs=TOLERANCE)


@calm
@given(values=measured())
def test_eq1_against_60_digits(values) -> None:
    _, student, teacher = values
    assert_close(initial_mixture(student, teacher), eq1(student, teacher))


@calm
@given(values=measured(), alpha=st.floats(0.0, 1.0))
def test_eq2_against_60_digits(values, alpha) -> None:
    old, student, teacher = values
    assert_close(update_mixture(old, student, teacher, alpha), eq2(old, student, teacher, alpha))


@calm
@given(values=measured(), alpha=st.floats(0.0, 1.0))
def test_gaps_in_nats_against_60_digits(values, alpha) -> None:
    """exp(ln ℓ_S − ln ℓ_T) is ℓ_S/ℓ_T: no exponential is left in either equation."""
    old, student, teacher = values
    with localcontext(prec=60):
        ratios = {d: Decimal(student[d]) / Decimal(teacher[d]) for d in student}
        psi = {d: Decimal(old[d]) * ratios[d] for d in student}
        first = {d: ratios[d] / sum(ratios.values()) for d in student}
        floor = (1 - Decimal(alpha)) / len(psi)
        second = {d: Decimal(alpha) * psi[d] / sum(psi.values()) + floor for d in psi}
    assert_close(initial_mixture(student, teacher, "log"), first)
    assert_close(update_mixture(old, student, teacher, alpha, "log"), second)


def test_near_a_ratio_of_one_both_gaps_give_one_mixture() -> None:
    teacher = {"code": 20.0, "web": 40.0}
    student = {"code": 20.0 * 1.01, "web": 40.0 * 1.002}
    ratio, nats = initial_mixture(student, teacher), initial_mixture(student, teacher, "log")
    assert nats.probabilities["code"] == pytest.approx(ratio.probabilities["code"], abs=2e-5)


def test_only_nats_leave_every_domain_its_part_where_the_ratios_are_huge() -> None:
    """A student that was cut out of its teacher and has not been trained yet."""
    teacher, student = {"a": 10.0, "b": 10.0}, {"a": 3.11e6, "b": 1e5}
    assert initial_mixture(student, teacher).probabilities["b"] == 0.0
    assert initial_mixture(student, teacher, "log").probabilities["b"] == pytest.approx(1e5 / 3.21e6)


@calm
@given(values=measured(), alpha=st.floats(0.0, 1.0))
def test_sums_to_one_and_every_domain_keeps_its_floor(values, alpha) -> None:
    old, student, teacher = values
    first, second = initial_mixture(student, teacher), update_mixture(old, student, teacher, alpha)
    for mixture in (first, second):
        assert math.fsum(mixture.probabilities.values()) == pytest.approx(1.0, abs=TOLERANCE)
    floor = (1.0 - alpha) / len(student)
    assert all(probability >= floor * (1 - TOLERANCE) for probability in second.probabilities.values())


@calm
@given(values=measured(), alpha=st.floats(0.0, 1.0), seed=st.integers(0, 999))
def test_the_order_of_the_domains_is_irrelevant_to_the_last_bit(values, alpha, seed) -> None:
    old, student, teacher = values
    names = list(student)
    random.Random(seed).shuffle(names)
    shuffled = [{name: mapping[name] for name in names} for mapping in (old, student)]
    assert initial_mixture(student, teacher) == initial_mixture(shuffled[1], teacher)
    assert update_mixture(old, student, teacher, alpha) == update_mixture(*shuffled, teacher, alpha)


@calm
@given(values=measured(min_size=2))
def test_a_larger_ratio_never_gets_less_from_eq1(values) -> None:
    _, student, teacher = values
    mixture = initial_mixture(student, teacher).probabilities
    ratios = {domain: student[domain] / teacher[domain] for domain in student}
    largest = max(ratios.values())
    for (a, ratio_a), (b, ratio_b) in itertools.permutations(ratios.items(), 2):
        if ratio_a > ratio_b:
            assert mixture[a] >= mixture[b]
        if ratio_a > max(ratio_b + 1e-6, largest - 700):  # below that, exp gives 0 to both
            assert mixture[a] > mixture[b]


@calm
@given(values=measured(min_size=2), alpha=st.floats(0.01, 1.0), more=st.floats(1.01, 3.0))
def test_a_domain_that_lags_more_gets_more_from_eq2(values, alpha, more) -> None:
    old, student, teacher = values
    domain = next(iter(student))
    assume(student[domain] / teacher[domain] < 300)
    lagging = {**student, domain: student[domain] * more}
    before = update_mixture(old, student, teacher, alpha).probabilities[domain]
    assert update_mixture(old, lagging, teacher, alpha).probabilities[domain] >= before * (1 - TOLERANCE)


@calm
@given(values=measured())
def test_alpha_0_is_equal_and_alpha_1_is_psi(values) -> None:
    old, student, teacher = values
    equal = update_mixture(old, student, teacher, 0.0)
    assert list(equal.probabilities.values()) == pytest.approx([1 / len(student)] * len(student), abs=TOLERANCE)
    assert_close(update_mixture(old, student, teacher, 1.0), eq2(old, student, teacher, 1.0))


def test_alpha_1_from_the_equal_mixture_is_eq1() -> None:
    student, teacher = {"a": 9.0, "b": 5.0, "c": 4.0}, {"a": 3.0, "b": 4.0, "c": 4.0}
    updated = update_mixture(equal_mixture("abc"), student, teacher, 1.0)
    assert updated.probabilities == pytest.approx(initial_mixture(student, teacher).probabilities, abs=TOLERANCE)


@pytest.mark.parametrize("ratio", [800.0, 1e6, 1e300])
def test_a_huge_ratio_does_not_overflow(ratio: float) -> None:
    student, teacher = {"a": ratio, "b": 1.0, "c": 2.0}, dict.fromkeys("abc", 1.0)
    assert initial_mixture(student, teacher).probabilities == {"a": 1.0, "b": 0.0, "c": 0.0}
    updated = update_mixture(equal_mixture("abc"), student, teacher, 0.5).probabilities
    assert updated == pytest.approx({"a": 0.5 + 0.5 / 3, "b": 0.5 / 3, "c": 0.5 / 3}, abs=TOLERANCE)
    both = initial_mixture({"a": ratio, "b": ratio}, {"a": 1.0, "b": 1.0})
    assert both.probabilities == {"a": 0.5, "b": 0.5}


def test_a_domain_that_was_lost_comes_back_through_the_floor_only() -> None:
    updated = update_mixture({"a": 0.0, "b": 1.0}, {"a": 90.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, 0.5)
    assert updated.probabilities == pytest.approx({"a": 0.25, "b": 0.75}, abs=TOLERANCE)


def test_one_domain_has_it_all() -> None:
    assert initial_mixture({"a": 7.0}, {"a": 3.0}).probabilities == {"a": 1.0}
    assert update_mixture({"a": 1.0}, {"a": 7.0}, {"a": 3.0}, 0.3).probabilities == {"a": 1.0}


def test_a_mixture_and_its_mapping_are_the_same_input() -> None:
    old, student, teacher = {"a": 0.3, "b": 0.7}, {"a": 5.0, "b": 9.0}, {"a": 4.0, "b": 8.0}
    from_dict = update_mixture(old, student, teacher, 0.5)
    assert from_dict == update_mixture(Mixture(probabilities=old), student, teacher, 0.5)
    assert old == {"a": 0.3, "b": 0.7}
    chained = update_mixture(from_dict, student, teacher, 0.5)
    assert chained == update_mixture(dict(from_dict.probabilities), student, teacher, 0.5)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"a": 1.0}, {"b": 1.0}, r"the same domains, at least one; the student has \['a'\], the teacher has \['b'\]"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, r"the student has \['a', 'b'\], the teacher has \['a'\]"),
        ({}, {}, r"at least one; the student has \[\], the teacher has \[\]"),
        ({"a": math.nan}, {"a": 1.0}, "the student's perplexity on 'a' is nan; it must be positive and finite"),
        ({"a": math.inf}, {"a": 1.0}, "the student's perplexity on 'a' is inf"),
        ({"a": 0.0}, {"a": 1.0}, "the student's perplexity on 'a' is 0.0"),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 0.0}, "the teacher's perplexity on 'b' is 0.0"),
        ({"a": 1.0}, {"a": -3.0}, "the teacher's perplexity on 'a' is -3.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(student, teacher, message) -> None:
    with pytest.raises(ValueError, match=message):
        initial_mixture(student, teacher)
    with pytest.raises(ValueError, match=message):
        update_mixture({"a": 1.0}, student, teacher, 0.5)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_lies_in_the_unit_interval(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alpha is {alpha}; it must lie in \[0, 1\]"):
        update_mixture({"a": 1.0}, {"a": 1.0}, {"a": 1.0}, alpha)


def test_another_runs_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the mixture has domains \['a', 'b'\], the perplexities \['a'\]"):
        update_mixture({"a": 0.5, "b": 0.5}, {"a": 1.0}, {"a": 1.0}, 0.5)
    with pytest.raises(ValueError, match="must sum to 1"):
        update_mixture({"a": 0.5}, {"a": 1.0}, {"a": 1.0}, 0.5)


def test_equal_and_proportional() -> None:
    assert equal_mixture(["x", "y", "z", "w"]).probabilities == dict.fromkeys("xyzw", 0.25)
    assert proportional_mixture({"x": 30, "y": 10}).probabilities == {"x": 0.75, "y": 0.25}
    with pytest.raises(ValueError, match="at least one domain"):
        equal_mixture([])


def test_fixed_mixtures() -> None:
    sizes = {"x": 30, "y": 10}
    assert fixed_mixture("equal", sizes) == equal_mixture("xy")
    assert fixed_mixture("proportional", sizes) == proportional_mixture(sizes)
    assert fixed_mixture({"y": 3, "x": 1}, sizes).probabilities == {"x": 0.25, "y": 0.75}
    with pytest.raises(ValueError, match="domain 'y' has no weight; give one to each of x, y"):
        fixed_mixture({"x": 1.0}, sizes)
    with pytest.raises(ValueError, match="there is no domain 'z'; the domains are x, y"):
        fixed_mixture({"x": 1.0, "y": 1.0, "z": 1.0}, sizes)


def test_caught_up() -> None:
    gaps = [
        DomainGap(domain="a", student_ppl=4.2, teacher_ppl=4.0),
        DomainGap(domain="b", student_ppl=8.0, teacher_ppl=8.0),
    ]
    assert caught_up(gaps, 1.05)
    assert not caught_up(gaps, 1.04)
    assert not caught_up(gaps, None)


def test_config() -> None:
    assert MixtureConfig().alpha == 0.5
    assert MixtureConfig().interval == 1000
    assert MixtureConfig().initial == "gap"
    for wrong in ({"alpha": 1.5}, {"interval": 0}, {"initial": "other"}, {"smoothing": 1}):
        with pytest.raises(ValidationError):
            MixtureConfig.model_validate(wrong)


@pytest.mark.parametrize("weights", [None, "equal", "proportional", {"a": 1, "b": 0.5}])
def test_weights(weights) -> None:
    config = MixtureConfig(weights=weights)
    assert config.weights == weights
    assert MixtureConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.0, "b": 1.0}, "the weight of 'a' is 0.0; it must be a positive number"),
        ({"a": 1, "b": -1}, "the weight of 'b' is -1; it must be a positive number"),
        ({"a": math.nan}, "the weight of 'a' is nan"),
        ({"a": math.inf}, "the weight of 'a' is inf"),
        ({"a": True}, "the weight of 'a' is True"),
        ({"a": None}, "the weight of 'a' is None"),
        ("gap", "it must be 'equal', 'proportional', or a weight for each domain"),
        ([1, 2], "it must be 'equal', 'proportional', or a weight for each domain"),
    ],
)
def test_wrong_weights(weights, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as found:
        MixtureConfig(weights=weights)
    assert [error["loc"] for error in found.value.errors()] == [("weights",)], "one error, at the field"


def test_it_is_said_when_one_ratio_leaves_nothing_to_the_other_domains() -> None:
    # As measured of a student just cut out of SmolLM2.
    ratios = {"code": 1.56e6, "math": 1.25e5, "books": 10_176.0}
    teacher = dict.fromkeys(ratios, 1.0)
    config = MixtureConfig()
    said = one_domain_alone(initial_mixture(ratios, teacher), ratios, config)
    assert said is not None
    assert "from 'code' alone" in said
    assert "1.56e+06" in said
    assert "1.25e+05" in said
    assert "mixture.gap: log" in said
    assert one_domain_alone(initial_mixture(ratios, teacher, "log"), ratios, MixtureConfig(gap="log")) is None
    near = {"code": 4.7, "math": 4.0, "books": 2.0}
    assert one_domain_alone(initial_mixture(near, teacher), near, config) is None
    assert one_domain_alone(initial_mixture({"code": 9.0}, {"code": 1.0}), {"code": 9.0}, config) is None
