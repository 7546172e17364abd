from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk.methods.base import Interval
from ddk.methods.registry import mixture_after
from ddk.methods.retain import retaining_mixture
from ddk.mixture import MixtureConfig
from ddk.values import DomainGap, Mixture

DOMAINS = ("books", "code", "math")
PPL = st.floats(1.0, 1e6)
SETTINGS = st.fixed_dictionaries(
    {
        "alpha": st.floats(0.0, 1.0),
        "temperature": st.floats(0.05, 10.0),
        "retention": st.floats(0.0, 100.0),
        "tolerance": st.floats(1e-6, 10.0),
        "progress": st.floats(0.0, 1.0),
    }
)
USUAL = {"alpha": 0.5, "temperature": 0.25, "retention": 4.0, "tolerance": 0.2, "progress": 0.5}


def by_domain(values) -> dict[str, float]:
    return dict(zip(DOMAINS, values, strict=True))


perplexities = st.tuples(PPL, PPL, PPL).map(by_domain)


@given(student=perplexities, teacher=perplexities, first=perplexities, settings=SETTINGS)
def test_against_sixty_digits(student, teacher, first, settings) -> None:
    found = retaining_mixture(student, teacher, first, **settings).probabilities
    with localcontext() as context:
        context.prec = 60
        tau, kappa, p, alpha = (Decimal(settings[name]) for name in ("temperature", "retention", "progress", "alpha"))
        lost = {d: max(Decimal(0), (Decimal(student[d]) / Decimal(first[d])).ln()) for d in DOMAINS}
        most = max(Decimal(settings["tolerance"]), *lost.values())
        psi = {
            d: ((Decimal(student[d]) / Decimal(teacher[d])).ln() / tau + kappa * p * lost[d] / most).exp()
            for d in DOMAINS
        }
        total = sum(psi.values())
        for domain in DOMAINS:
            exact = alpha * psi[domain] / total + (1 - alpha) / 3
            assert found[domain] == pytest.approx(float(exact), rel=1e-9, abs=1e-12)


@given(student=perplexities, teacher=perplexities, first=perplexities, settings=SETTINGS)
def test_every_domain_keeps_its_floor(student, teacher, first, settings) -> None:
    found = retaining_mixture(student, teacher, first, **settings).probabilities
    assert math.fsum(found.values()) == pytest.approx(1.0)
    assert min(found.values()) >= (1.0 - settings["alpha"]) / 3 - 1e-12


def test_what_was_lost_counts_and_the_more_the_later() -> None:
    student, teacher = by_domain([22.0, 40.0, 30.0]), by_domain([10.0, 10.0, 10.0])
    kept, lost = by_domain([22.0, 90.0, 90.0]), by_domain([20.0, 90.0, 90.0])
    shares = [
        retaining_mixture(student, teacher, lost, **{**USUAL, "progress": progress}).probabilities["books"]
        for progress in (0.0, 0.3, 0.6, 1.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] == retaining_mixture(student, teacher, kept, **USUAL).probabilities["books"] < shares[1]


def test_the_domain_that_lost_most_is_raised_by_the_same_whatever_it_lost_and_the_others_in_proportion() -> None:
    start = by_domain([20.0, 20.0, 20.0])
    whole = {**USUAL, "alpha": 1.0, "progress": 1.0}
    for most in (0.2, 0.4, 2.0):
        losses = by_domain([most, most / 2, 0.0])
        student = {domain: 20.0 * math.exp(loss) for domain, loss in losses.items()}
        level = {domain: ppl / 2 for domain, ppl in student.items()}
        found = retaining_mixture(student, level, start, **whole).probabilities
        assert math.log(found["books"] / found["math"]) == pytest.approx(4.0)
        assert math.log(found["code"] / found["math"]) == pytest.approx(2.0)
    little = {"books": 20.0 * math.exp(0.05), "code": 20.0, "math": 20.0}
    found = retaining_mixture(little, little, start, **whole).probabilities
    assert math.log(found["books"] / found["math"]) == pytest.approx(4.0 * 0.05 / 0.2), "below the tolerance, less"


def test_a_gain_since_the_start_is_no_reason_to_draw_less() -> None:
    student, teacher = by_domain([22.0, 40.0, 30.0]), by_domain([10.0, 10.0, 10.0])
    same = [retaining_mixture(student, teacher, by_domain([50.0, 90.0, first]), **USUAL) for first in (30.0, 3000.0)]
    assert same[0] == same[1]


def test_the_start_of_the_run_is_its_first_measurement() -> None:
    def gaps(*student: float) -> list[DomainGap]:
        return [
            DomainGap(domain=domain, student_ppl=ppl, teacher_ppl=10.0)
            for domain, ppl in zip(DOMAINS, student, strict=True)
        ]

    mixture = Mixture(probabilities=by_domain([0.25, 0.5, 0.25]))
    past = [
        Interval(step=0, gaps=gaps(20.0, 90.0, 80.0), mixture=mixture),
        Interval(step=10, gaps=gaps(25.0, 60.0, 50.0), mixture=mixture),
    ]
    config = MixtureConfig(retain_alpha=0.7, retain_temperature=0.5, retain_weight=2.0, retain_tolerance=0.5)
    found = mixture_after("ddk_retain", past, gaps(22.0, 40.0, 30.0), config, by_domain([1, 1, 1]), progress=0.4)
    assert found == retaining_mixture(
        by_domain([22.0, 40.0, 30.0]),
        by_domain([10.0] * 3),
        by_domain([20.0, 90.0, 80.0]),
        alpha=0.7,
        temperature=0.5,
        retention=2.0,
        tolerance=0.5,
        progress=0.4,
    )
    first = mixture_after("ddk_retain", [], gaps(20.0, 90.0, 80.0), config, by_domain([1, 1, 1]))
    assert min(first.probabilities.values()) >= 0.1, "the floor holds in the first interval too"


@pytest.mark.parametrize("wrong", [0.0, math.nan, math.inf])
def test_a_perplexity_that_is_no_number_is_refused(wrong: float) -> None:
    good, bad = by_domain([2.0, 2.0, 2.0]), by_domain([2.0, wrong, 2.0])
    for place, name in enumerate(("student", "teacher", "start")):
        given = [good, good, good]
        given[place] = bad
        with pytest.raises(ValueError, match=f"the {name}'s perplexity on 'code' is"):
            retaining_mixture(*given, **USUAL)
