from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from ddk.methods.base import Interval
from ddk.methods.registry import METHODS, MethodName, check_method, effective_loss, mixture_after
from ddk.mixture import MixtureConfig, equal_mixture, initial_mixture, update_mixture
from ddk.train_config import LossConfig
from ddk.values import DomainGap, Mixture

GAPS = [
    DomainGap(domain="math", student_ppl=12.0, teacher_ppl=4.0),
    DomainGap(domain="web", student_ppl=9.0, teacher_ppl=8.0),
]
STUDENT, TEACHER = {"math": 12.0, "web": 9.0}, {"math": 4.0, "web": 8.0}
SIZES = {"math": 10, "web": 30}
OLD = Mixture(probabilities={"math": 0.9, "web": 0.1})
AFTER_OLD = [Interval(step=0, gaps=GAPS, mixture=OLD)]
EVERY: tuple[MethodName, ...] = get_args(MethodName)
FOLLOWING = ("ddk", "ddk_retain", "ddk_no_smoothing", "cpt_doremi")
FIXED = ("ddk_equal", "kd", "cpt", "minillm", "ted")


def test_every_name_has_a_method() -> None:
    assert list(METHODS) == list(EVERY)
    assert {name for name in EVERY if METHODS[name].follows_gap} == set(FOLLOWING)
    assert {name for name in EVERY if not METHODS[name].reads_targets} == {"cpt", "cpt_doremi"}
    assert {name for name in EVERY if METHODS[name].needs_teacher} == {"ted"}
    assert {name for name in EVERY if METHODS[name].reads_reference} == {"cpt_doremi"}


def test_ddk_follows_eq1_and_then_eq2() -> None:
    config = MixtureConfig(alpha=0.3)
    assert mixture_after("ddk", [], GAPS, config, SIZES) == initial_mixture(STUDENT, TEACHER)
    assert mixture_after("ddk", AFTER_OLD, GAPS, config, SIZES) == update_mixture(OLD, STUDENT, TEACHER, 0.3)


def test_the_gap_may_be_in_nats() -> None:
    config = MixtureConfig(alpha=0.3, gap="log")
    first, second = initial_mixture(STUDENT, TEACHER, "log"), update_mixture(OLD, STUDENT, TEACHER, 0.3, "log")
    assert mixture_after("ddk", [], GAPS, config, SIZES) == first
    assert mixture_after("ddk", AFTER_OLD, GAPS, config, SIZES) == second
    assert mixture_after("ddk_no_smoothing", AFTER_OLD, GAPS, config, SIZES) == first
    assert first != initial_mixture(STUDENT, TEACHER)


def test_without_smoothing_is_eq1_each_time() -> None:
    for past in ([], AFTER_OLD):
        mixture = mixture_after("ddk_no_smoothing", past, GAPS, MixtureConfig(), SIZES)
        assert mixture == initial_mixture(STUDENT, TEACHER)


def test_a_reference_changes_nothing_but_cpt_doremi() -> None:
    other = {"math": 11.0, "web": 2.0}
    for method in EVERY:
        own = mixture_after(method, AFTER_OLD, GAPS, MixtureConfig(), SIZES)
        assert (mixture_after(method, AFTER_OLD, GAPS, MixtureConfig(), SIZES, other) != own) is (
            method == "cpt_doremi"
        )
        assert mixture_after(method, AFTER_OLD, GAPS, MixtureConfig(), SIZES, TEACHER) == own


@pytest.mark.parametrize("method", FOLLOWING)
def test_proportional_is_for_the_first_interval_only(method: MethodName) -> None:
    config = MixtureConfig(initial="proportional")
    assert mixture_after(method, [], GAPS, config, SIZES).probabilities == {"math": 0.25, "web": 0.75}
    assert mixture_after(method, AFTER_OLD, GAPS, config, SIZES) == mixture_after(
        method, AFTER_OLD, GAPS, MixtureConfig(), SIZES
    )


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_mixture_stays_whatever_the_gap(method: MethodName) -> None:
    expected = {"math": 0.5, "web": 0.5} if method == "ddk_equal" else {"math": 0.25, "web": 0.75}
    by_hand: list[tuple[Any, dict[str, float]]] = [
        (None, expected),
        ("equal", {"math": 0.5, "web": 0.5}),
        ("proportional", {"math": 0.25, "web": 0.75}),
        ({"web": 1, "math": 4}, {"math": 0.8, "web": 0.2}),
    ]
    for weights, mixture in by_hand:
        for past in ([], AFTER_OLD):
            for config in (MixtureConfig(weights=weights), MixtureConfig(weights=weights, initial="proportional")):
                assert mixture_after(method, past, GAPS, config, SIZES).probabilities == mixture


def test_what_a_method_fixes_of_the_loss() -> None:
    loss = LossConfig(gamma=0.4, divergence="jensen_shannon", beta=0.3)
    for method in EVERY:
        fixed: dict[str, Any] = {"gamma": 0.0} if method in ("cpt", "cpt_doremi") else {}
        fixed |= {"divergence": "reverse_kl"} if method == "minillm" else {}
        assert effective_loss(method, loss) == LossConfig(**{**loss.model_dump(), **fixed})


def test_what_goes_together() -> None:
    for method in EVERY:
        check_method(method, MixtureConfig(), LossConfig(), SIZES)
    for method in FIXED:
        check_method(method, MixtureConfig(weights={"web": 0.1, "math": 7}), LossConfig(), SIZES)
        check_method(method, MixtureConfig(weights="equal"), LossConfig(), SIZES)
    check_method("cpt_doremi", MixtureConfig(reference_run="first"), LossConfig(tail="residual"), SIZES)
    check_method("kd", MixtureConfig(), LossConfig(tail="residual"), SIZES)


@pytest.mark.parametrize("method", FOLLOWING)
@pytest.mark.parametrize("weights", ["equal", {"math": 1.0, "web": 1.0}])
def test_weights_beside_a_mixture_that_follows_the_gap(method: MethodName, weights) -> None:
    with pytest.raises(
        ValueError,
        match=rf"mixture.weights is set, and method {method} determines its mixture itself; leave it out, or set "
        r"method to one with a fixed mixture \(ddk_equal, kd, cpt, minillm, ted\)",
    ):
        check_method(method, MixtureConfig(weights=weights), LossConfig(), SIZES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"math": 1.0}, "mixture.weights: domain 'web' has no weight; give one to each of math, web"),
        ({"math": 1.0, "web": 1.0, "wbe": 1.0}, "mixture.weights: there is no domain 'wbe'; the domains are math, web"),
    ],
)
def test_weights_of_other_domains(weights, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method("kd", MixtureConfig(weights=weights), LossConfig(), SIZES)


@pytest.mark.parametrize("method", [name for name in EVERY if name != "cpt_doremi"])
def test_a_reference_run_without_use_for_it(method: MethodName) -> None:
    with pytest.raises(ValueError, match=rf"method {method} uses no reference; .*set method: cpt_doremi"):
        check_method(method, MixtureConfig(reference_run="first"), LossConfig(), SIZES)


@pytest.mark.parametrize("loss", [LossConfig(tail="residual"), LossConfig(tail="sampled")])
def test_minillm_needs_a_tail_that_the_reverse_kl_can_take(loss: LossConfig) -> None:
    with pytest.raises(
        ValueError, match=r"^method minillm means loss.divergence: reverse_kl, which conflicts with .*tail: bucket$"
    ):
        check_method("minillm", MixtureConfig(), loss, SIZES)
    with pytest.raises(ValueError, match="tail: bucket"):
        effective_loss("minillm", loss)


def test_the_order_of_the_domains_is_kept_by_equal_weights() -> None:
    assert mixture_after("ddk_equal", [], GAPS, MixtureConfig(), SIZES) == equal_mixture(["math", "web"])


def test_a_domain_that_has_caught_up_keeps_the_floor_until_it_lags_again() -> None:
    config = MixtureConfig(alpha=0.4, domain_stop_ratio=1.1)
    sizes = {"a": 10, "b": 10, "c": 10}

    def gaps(**ratios: float) -> list[DomainGap]:
        return [DomainGap(domain=domain, student_ppl=ratio * 5, teacher_ppl=5.0) for domain, ratio in ratios.items()]

    free = mixture_after(
        "ddk", [], gaps(a=1.0, b=1.5, c=2.5), config.model_copy(update={"domain_stop_ratio": None}), sizes
    )
    found = mixture_after("ddk", [], gaps(a=1.0, b=1.5, c=2.5), config, sizes)
    assert found.probabilities["a"] == pytest.approx(min(free.probabilities["a"], 0.6 / 3))
    low = mixture_after("ddk", [], gaps(a=0.26, b=1.5, c=2.5), config, sizes).probabilities
    assert low["a"] <= 0.2
    assert low["b"] / low["c"] == pytest.approx(math.exp(1.5 - 2.5))
    past = [Interval(step=0, gaps=gaps(a=1.0, b=1.5, c=2.5), mixture=found)]
    again = mixture_after("ddk", past, gaps(a=3.0, b=1.2, c=1.2), config, sizes).probabilities
    assert again["a"] > 0.2
    everyone = gaps(a=1.0, b=1.0, c=1.0)
    assert mixture_after("ddk", [], everyone, config, sizes) == equal_mixture(sizes)
    with pytest.raises(ValueError, match="domain_stop_ratio is set, and method kd does not follow the gap"):
        check_method("kd", config, LossConfig(), sizes)
