from __future__ import annotations

from typing import get_args

import pytest

from ddk.loss import LossConfig
from ddk.methods import METHODS, MethodName, effective_loss, mixture_after
from ddk.mixture import MixtureConfig, equal_mixture, initial_mixture, update_mixture
from ddk.types import DomainGap, Mixture

GAPS = [
    DomainGap(domain="math", student_ppl=12.0, teacher_ppl=4.0),
    DomainGap(domain="web", student_ppl=9.0, teacher_ppl=8.0),
]
STUDENT, TEACHER = {"math": 12.0, "web": 9.0}, {"math": 4.0, "web": 8.0}
SIZES = {"math": 10, "web": 30}
OLD = Mixture(probabilities={"math": 0.9, "web": 0.1})


def test_every_name_has_a_method() -> None:
    assert set(METHODS) == set(get_args(MethodName))


def test_ddk_follows_eq1_and_then_eq2() -> None:
    config = MixtureConfig(alpha=0.3)
    assert mixture_after("ddk", None, GAPS, config, SIZES) == initial_mixture(STUDENT, TEACHER)
    assert mixture_after("ddk", OLD, GAPS, config, SIZES) == update_mixture(OLD, STUDENT, TEACHER, 0.3)


def test_without_smoothing_is_eq1_each_time() -> None:
    for previous in (None, OLD):
        mixture = mixture_after("ddk_no_smoothing", previous, GAPS, MixtureConfig(), SIZES)
        assert mixture == initial_mixture(STUDENT, TEACHER)


@pytest.mark.parametrize("method", ["kd", "cpt"])
@pytest.mark.parametrize("initial", ["gap", "proportional"])
def test_the_baselines_ignore_the_gap(method: MethodName, initial) -> None:
    for previous in (None, OLD):
        mixture = mixture_after(method, previous, GAPS, MixtureConfig(initial=initial), SIZES)
        assert mixture == equal_mixture(["math", "web"])


@pytest.mark.parametrize("method", ["ddk", "ddk_no_smoothing"])
def test_proportional_is_for_the_first_interval_only(method: MethodName) -> None:
    config = MixtureConfig(initial="proportional")
    assert mixture_after(method, None, GAPS, config, SIZES).probabilities == {"math": 0.25, "web": 0.75}
    assert mixture_after(method, OLD, GAPS, config, SIZES) == mixture_after(method, OLD, GAPS, MixtureConfig(), SIZES)


def test_only_cpt_drops_the_kl_term() -> None:
    loss = LossConfig(gamma=0.4, tail="residual")
    for method in get_args(MethodName):
        expected = 0.0 if method == "cpt" else 0.4
        assert effective_loss(method, loss) == LossConfig(gamma=expected, tail="residual")
