"""Roll-up and intervals against hand-made numbers and scipy's; the mixture against the formula, level by level."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ddk.concepts import (
    Accuracies,
    concept_mixture,
    rolled_up_tallies,
    shrunk_accuracies,
    strangers,
    unasked,
    weakest_first,
    weaknesses,
    wilson,
)
from ddk.domain_tree import lineage
from ddk.methods.base import Interval
from ddk.methods.registry import METHODS, check_method, mixture_after
from ddk.mixture import MixtureConfig, initial_mixture, update_mixture
from ddk.train_config import LossConfig
from ddk.values import DomainGap, Mixture, Tally

DOMAINS = ["math/add", "math/mul", "web"]
TALLIES = {
    "math/add": Tally(right=18, asked=20),
    "math/mul": Tally(right=2, asked=20),
    "web": Tally(right=20, asked=40),
}


def test_every_node_has_the_questions_below_it() -> None:
    found = rolled_up_tallies({**TALLIES, "math/add/carry": Tally(right=0.5, asked=2)})
    assert found == {
        "math": Tally(right=20.5, asked=42),
        "math/add": Tally(right=18.5, asked=22),
        "math/add/carry": Tally(right=0.5, asked=2),
        "math/mul": Tally(right=2, asked=20),
        "web": Tally(right=20, asked=40),
    }


def test_the_weakest_sibling_comes_first_at_every_level() -> None:
    tallies = {**TALLIES, "web": Tally(right=1, asked=40), "math/div": Tally(right=2, asked=20)}
    assert weakest_first(tallies) == ["web", "math", "math/div", "math/mul", "math/add"]


@pytest.mark.parametrize(("right", "asked"), [(0, 1), (1, 1), (0, 20), (8, 10), (18, 20), (500, 1000)])
def test_the_interval_is_wilsons(right: int, asked: int) -> None:
    expected = binomtest(right, asked).proportion_ci(method="wilson")
    assert wilson(Tally(right=right, asked=asked)) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_interval_by_hand() -> None:
    # 8 of 10: (0.8 + 0.19207) / 1.38415 ± 1.96·√(0.016 + 0.0096036) / 1.38415
    assert wilson(Tally(right=8, asked=10)) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_tally_is_refused_where_it_is_none() -> None:
    for right, asked in ((0, 0), (3, 2), (-1, 2), (math.nan, 2)):
        with pytest.raises(ValueError, match="are no tally"):
            Tally(right=right, asked=asked)


def test_few_questions_are_shrunk_towards_what_lies_above() -> None:
    found = shrunk_accuracies({"math/add": Tally(right=0, asked=1), "math/mul": Tally(right=90, asked=99)}, DOMAINS)
    assert found["math"] == pytest.approx(0.9)
    # One wrong answer: (0 + 10·0.9) / 11, and not 0.
    assert found["math/add"] == pytest.approx(9 / 11)
    assert found["math/mul"] == pytest.approx((90 + 9) / 109)
    # Nothing was asked of it: as what lies above it.
    assert found["web"] == pytest.approx(0.9)


def test_questions_above_and_below_the_domains_count_where_they_belong() -> None:
    paths = {
        "math": Tally(right=0, asked=10),
        "math/mul/by two": Tally(right=10, asked=10),
        "physics": Tally(right=0, asked=90),
    }
    assert strangers(paths, DOMAINS) == ["physics"]
    assert unasked(paths, DOMAINS) == ["math/add", "web"]
    found = shrunk_accuracies(paths, DOMAINS)
    assert found["math"] == pytest.approx(0.5)
    assert found["math/add"] == pytest.approx(0.5)
    assert found["math/mul"] == pytest.approx((10 + 5) / 20)


def test_questions_of_no_domain_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"paths 'art', and none .* domains 'math/add', 'math/mul', 'web'"):
        shrunk_accuracies({"art": Tally(right=1, asked=2)}, DOMAINS)


def test_weakness_is_what_the_teacher_knows_better() -> None:
    student = {"a": Tally(right=20, asked=100), "b": Tally(right=60, asked=100)}
    teacher = {"a": Tally(right=30, asked=100), "b": Tally(right=50, asked=100)}
    alone = weaknesses(Accuracies(student=student), ["a", "b"])
    assert alone == pytest.approx({"a": 1 - 24 / 110, "b": 1 - 64 / 110})
    found = weaknesses(Accuracies(student=student, teacher=teacher), ["a", "b"])
    assert found == pytest.approx({"a": 34 / 110 - 24 / 110, "b": 0.0})


def test_the_mixture_by_hand_level_by_level() -> None:
    weakness = {"math": 0.5, "math/add": 0.0, "math/mul": 0.5, "web": 0.25}
    found = concept_mixture(DOMAINS, weakness, alpha=0.6, temperature=0.25).probabilities
    # Two domains at e^(0.5/0.25) each against one at e^(0.25/0.25); the floor is a third for each domain.
    math_share = 0.6 * 2 * math.e / (2 * math.e + 1) + 0.4 * 2 / 3
    mul_share = 0.6 * math.e**2 / (math.e**2 + 1) + 0.4 / 2
    assert found["math/mul"] == pytest.approx(math_share * mul_share)
    assert found["math/add"] == pytest.approx(math_share * (1 - mul_share))
    assert found["web"] == pytest.approx(1 - math_share)
    alike = concept_mixture(DOMAINS, dict.fromkeys(weakness, 0.3), alpha=0.6, temperature=0.25).probabilities
    assert alike == pytest.approx(dict.fromkeys(DOMAINS, 1 / 3)), "equally weak: equal sampling"


def test_a_base_is_tilted_and_one_without_probability_is_taken_as_equal() -> None:
    base = Mixture(probabilities={"math/add": 0.6, "math/mul": 0.2, "web": 0.2})
    level = dict.fromkeys(["math", "math/add", "math/mul", "web"], 0.3)
    found = concept_mixture(DOMAINS, level, alpha=1.0, temperature=0.1, base=base).probabilities
    assert found == pytest.approx(dict(base.probabilities)), "equally weak: as it was"
    nothing = Mixture(probabilities={"math/add": 0.0, "math/mul": 0.0, "web": 1.0})
    found = concept_mixture(DOMAINS, level, alpha=0.5, temperature=0.1, base=nothing).probabilities
    assert found == pytest.approx({"math/add": 1 / 6, "math/mul": 1 / 6, "web": 2 / 3})


@settings(deadline=None, max_examples=60)
@given(
    right=st.lists(st.integers(0, 5), min_size=5, max_size=5),
    alpha=st.floats(0, 1),
    temperature=st.floats(1e-3, 10),
)
def test_no_child_falls_below_the_floor_of_its_level(right: list[int], alpha: float, temperature: float) -> None:
    domains = ["a/x", "a/y", "a/z/1", "a/z/2", "b"]
    tallies = {domain: Tally(right=one, asked=5) for domain, one in zip(domains, right, strict=True)}
    weakness = weaknesses(Accuracies(student=tallies), domains)
    assert all(0 <= value <= 1 for value in weakness.values())
    found = concept_mixture(domains, weakness, alpha=alpha, temperature=temperature).probabilities
    assert math.fsum(found.values()) == pytest.approx(1)
    share = {"": 1.0}
    for domain in domains:
        for node in lineage(domain):
            share[node] = math.fsum(p for leaf, p in found.items() if leaf == node or leaf.startswith(f"{node}/"))
    floors = {"a": 4 / 5, "b": 1 / 5, "a/x": 1 / 4, "a/y": 1 / 4, "a/z": 2 / 4, "a/z/1": 1 / 2, "a/z/2": 1 / 2}
    for node, floor in floors.items():
        assert share[node] >= share[node.rpartition("/")[0]] * (1 - alpha) * floor - 1e-12
    # A weaker sibling is never drawn less.
    assert (found["a/z/1"] - found["a/z/2"]) * (right[2] - right[3]) <= 1e-12


# ---- as methods use it

GAPS = [
    DomainGap(domain=domain, student_ppl=ppl, teacher_ppl=4.0) for domain, ppl in zip(DOMAINS, (4, 6, 9), strict=True)
]
LATER = [DomainGap(domain=domain, student_ppl=5.0, teacher_ppl=4.0) for domain in DOMAINS]
SIZES = {"math/add": 10, "math/mul": 30, "web": 20}
ACCURACIES = Accuracies(student=TALLIES)


def followed(follow: str, **fields: object) -> MixtureConfig:
    return MixtureConfig.model_validate({"follow": follow, "accuracy_run": "first", **fields})


def test_accuracy_gives_one_mixture_for_the_whole_run() -> None:
    config = followed("accuracy", alpha=0.7)
    expected = concept_mixture(DOMAINS, weaknesses(ACCURACIES, DOMAINS), alpha=0.7, temperature=0.25)
    first = mixture_after("ddk", [], GAPS, config, SIZES, accuracies=ACCURACIES)
    past = [Interval(step=0, gaps=GAPS, mixture=first)]
    assert first == expected == mixture_after("ddk", past, LATER, config, SIZES, accuracies=ACCURACIES)
    assert first.probabilities["math/mul"] > 2 * first.probabilities["math/add"]
    # ddk_retain has an α of its own, and the first interval may be by blocks as elsewhere.
    retain = mixture_after("ddk_retain", [], GAPS, followed("accuracy", retain_alpha=0.7), SIZES, accuracies=ACCURACIES)
    assert retain == expected
    begun = mixture_after("ddk", [], GAPS, followed("accuracy", initial="proportional"), SIZES, accuracies=ACCURACIES)
    assert begun.probabilities == {"math/add": 1 / 6, "math/mul": 0.5, "web": 1 / 3}


def test_both_tilts_the_gaps_own_mixture_and_counts_the_weakness_once() -> None:
    config = followed("both", alpha=0.5)
    ppl = {gap.domain: gap.student_ppl for gap in GAPS}, {gap.domain: gap.teacher_ppl for gap in GAPS}
    alone = initial_mixture(*ppl)
    weak = weaknesses(ACCURACIES, DOMAINS)
    past: list[Interval] = []
    for step in range(3):
        mixture = mixture_after("ddk", past, GAPS, config, SIZES, accuracies=ACCURACIES)
        assert mixture == concept_mixture(DOMAINS, weak, alpha=0.5, temperature=0.25, base=alone)
        past.append(Interval(step=step, gaps=GAPS, mixture=mixture))
        alone = update_mixture(alone, *ppl, 0.5)


def test_a_level_is_followed_as_its_domains_are() -> None:
    gaps = [DomainGap(domain=domain, student_ppl=5.0, teacher_ppl=4.0) for domain in ("math", "web")]
    config = followed("accuracy", level=1)
    whole = mixture_after(
        "ddk", [], gaps, followed("accuracy"), {"math": 40, "web": 20}, accuracies=ACCURACIES
    ).probabilities
    positions = dict.fromkeys(DOMAINS, 100)
    found = mixture_after("ddk", [], GAPS, config, SIZES, positions=positions, accuracies=ACCURACIES).probabilities
    assert found == pytest.approx(
        {"math/add": whole["math"] / 4, "math/mul": whole["math"] * 3 / 4, "web": whole["web"]}
    )


def test_what_does_not_go_together_is_refused() -> None:
    for method, known in METHODS.items():
        if known.smoothing is None:
            with pytest.raises(ValueError, match=rf"'accuracy', and method {method} .* set method: ddk or ddk_retain"):
                check_method(method, followed("accuracy"), LossConfig(), DOMAINS)
        else:
            check_method(method, followed("both"), LossConfig(), DOMAINS)
    with pytest.raises(ValueError, match=r"mixture.follow is 'both', .*set mixture.accuracy_run to a run"):
        check_method("ddk", MixtureConfig(follow="both"), LossConfig(), DOMAINS)
    with pytest.raises(ValueError, match=r"mixture.accuracy_run is set, and mixture.follow is 'gap'"):
        check_method("ddk", MixtureConfig(accuracy_run="first"), LossConfig(), DOMAINS)
    with pytest.raises(ValueError, match="accuracy_run"):
        MixtureConfig(follow="both", accuracy_run="../elsewhere")
