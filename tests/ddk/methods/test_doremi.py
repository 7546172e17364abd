from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ddk.methods.base import Interval
from ddk.methods.doremi import average_mixture, doremi_mixture
from ddk.methods.registry import mixture_after
from ddk.mixture import MixtureConfig, equal_mixture
from ddk.values import DomainGap, Mixture

calm = settings(deadline=None, max_examples=60)


def plain(
    old: dict[str, float], student: dict[str, float], reference: dict[str, float], eta: float, c: float
) -> dict[str, Decimal]:
    """The docstring's three lines in 60 digits, in which exp does not overflow."""
    with localcontext(prec=60):
        raised = {}
        for d, before in old.items():
            excess = Decimal(student[d]).ln() - Decimal(reference[d]).ln()
            raised[d] = Decimal(before) * (Decimal(eta) * max(Decimal(0), excess)).exp()
        total = sum(raised.values())
        return {d: (1 - Decimal(c)) * raised[d] / total + Decimal(c) / len(old) for d in old}


@st.composite
def measured(draw):
    names = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8, unique=True))
    weights = [draw(st.floats(0.01, 1.0)) for _ in names]
    perplexities = st.floats(1.0, 5000.0)
    return (
        {name: weight / math.fsum(weights) for name, weight in zip(names, weights, strict=True)},
        {name: draw(perplexities) for name in names},
        {name: draw(perplexities) for name in names},
    )


@calm
@given(values=measured(), eta=st.floats(0.0, 200.0), c=st.floats(0.0, 1.0))
def test_against_60_digits(values, eta: float, c: float) -> None:
    old, student, reference = values
    mixture = doremi_mixture(Mixture(probabilities=old), student, reference, eta, c).probabilities
    expected = plain(old, student, reference, eta, c)
    assert mixture.keys() == expected.keys()
    for domain, probability in mixture.items():
        assert probability == pytest.approx(float(expected[domain]), rel=1e-9, abs=1e-15), domain
        assert probability >= c / len(old) * (1 - 1e-12) - 1e-15


def test_by_hand() -> None:
    # Excess losses 1 nat, and none (the student is better than the reference: clipped, not lowered).
    mixture = doremi_mixture(
        Mixture(probabilities={"a": 0.25, "b": 0.75}), {"a": 2 * math.e, "b": 1.0}, {"a": 2.0, "b": 3.0}, 1.0, 0.1
    )
    raised = 0.25 * math.e / (0.25 * math.e + 0.75)
    assert mixture.probabilities["a"] == pytest.approx(0.9 * raised + 0.05, abs=1e-12)


def test_enormous_excess_does_not_overflow() -> None:
    mixture = doremi_mixture(
        equal_mixture("ab"), {"a": 1e300, "b": 1e10}, {"a": 1e-300, "b": 1.0}, step=1e6, smoothing=1e-3
    )
    assert mixture.probabilities == pytest.approx({"a": 0.9995, "b": 0.0005}, abs=1e-12)


def test_the_method_starts_uniform_and_then_steps_by_its_settings() -> None:
    gaps = [
        DomainGap(domain="a", student_ppl=12.0, teacher_ppl=4.0),
        DomainGap(domain="b", student_ppl=9.0, teacher_ppl=8.0),
    ]
    sizes, old = {"a": 10, "b": 30}, Mixture(probabilities={"a": 0.4, "b": 0.6})
    after_old = [Interval(step=0, gaps=gaps, mixture=old)]
    config = MixtureConfig(doremi_step=0.7, doremi_smoothing=0.02, alpha=0.9)
    student, teacher = {"a": 12.0, "b": 9.0}, {"a": 4.0, "b": 8.0}
    assert mixture_after("cpt_doremi", [], gaps, config, sizes) == equal_mixture("ab")
    assert mixture_after("cpt_doremi", after_old, gaps, config, sizes) == doremi_mixture(
        old, student, teacher, 0.7, 0.02
    )
    first = {"a": 11.0, "b": 5.0}
    assert mixture_after("cpt_doremi", after_old, gaps, config, sizes, first) == doremi_mixture(
        old, student, first, 0.7, 0.02
    )
    default = mixture_after("cpt_doremi", after_old, gaps, MixtureConfig(), sizes)
    assert default == doremi_mixture(old, student, teacher, 1.0, 1e-3)


def test_what_cannot_be_compared_is_refused() -> None:
    old = equal_mixture("ab")
    with pytest.raises(
        ValueError, match=r"student and reference need .* the student has \['a', 'b'\], the reference has \['a'\]"
    ):
        doremi_mixture(old, {"a": 1.0, "b": 1.0}, {"a": 1.0}, 1.0, 0.0)
    with pytest.raises(ValueError, match="the reference's perplexity on 'b' is inf"):
        doremi_mixture(old, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": math.inf}, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"the mixture has domains \['a', 'b'\], the perplexities \['a'\]"):
        doremi_mixture(old, {"a": 1.0}, {"a": 1.0}, 1.0, 0.0)


def test_average() -> None:
    history = [Mixture(probabilities={"a": p, "b": 1 - p}) for p in (0.5, 0.1, 0.3)]
    assert average_mixture(history).probabilities == pytest.approx({"a": 0.3, "b": 0.7}, abs=1e-12)
    assert average_mixture(history[:1]) == history[0]
    with pytest.raises(ValueError, match="at least one mixture"):
        average_mixture([])
    with pytest.raises(ValueError, match=r"one mixture has domains \['a', 'b'\], another \['a', 'c'\]"):
        average_mixture([history[0], equal_mixture("ac")])


@pytest.mark.parametrize("wrong", [{"doremi_step": -1}, {"doremi_step": math.inf}, {"doremi_smoothing": 1.1}])
def test_settings(wrong) -> None:
    with pytest.raises(ValidationError):
        MixtureConfig.model_validate(wrong)
