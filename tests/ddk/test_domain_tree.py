"""Rolling up is held to what a measurement over all tokens at once would say, and a level to today's mixtures."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk.domain_tree import (
    check_leaves,
    cut,
    depth,
    inner_nodes,
    lineage,
    rolled_up_counts,
    rolled_up_gaps,
    rolled_up_mixture,
    rolled_up_ppl,
    spread_mixture,
)
from ddk.methods.base import Interval
from ddk.methods.registry import MethodName, check_method, mixture_after
from ddk.mixture import MixtureConfig, initial_mixture, update_mixture
from ddk.train_config import LossConfig
from ddk.values import DomainGap, Mixture

calm = settings(deadline=None, max_examples=60)
METHODS: tuple[MethodName, ...] = get_args(MethodName)
part = st.sampled_from(["a", "b", "C++", "Number Theory", "数"])


@st.composite
def trees(draw, min_size: int = 1) -> list[str]:
    """Leaves of one to three parts, none above another."""
    found: list[str] = []
    for parts in draw(st.lists(st.lists(part, min_size=1, max_size=3), min_size=min_size, max_size=12)):
        leaf = "/".join(parts)
        if not any(f"{leaf}/".startswith(f"{other}/") or f"{other}/".startswith(f"{leaf}/") for other in found):
            found.append(leaf)
    return found


@st.composite
def measured(draw):
    """Old mixture, gaps, sizes and positions of the leaves of a tree."""
    leaves = draw(trees())
    weights = [draw(st.floats(0.01, 1.0)) for _ in leaves]
    ppl = st.floats(1.0, 50.0)
    return (
        Mixture(probabilities={leaf: w / math.fsum(weights) for leaf, w in zip(leaves, weights, strict=True)}),
        [DomainGap(domain=leaf, student_ppl=draw(ppl), teacher_ppl=draw(ppl)) for leaf in leaves],
        {leaf: draw(st.integers(1, 9999)) for leaf in leaves},
        {leaf: draw(st.integers(1, 99_999)) for leaf in leaves},
    )


def test_names() -> None:
    assert [cut("math/algebra/linear", level) for level in (1, 2, 3, 9)] == [
        "math",
        "math/algebra",
        "math/algebra/linear",
        "math/algebra/linear",
    ]
    assert [depth(domain) for domain in ("math", "math/algebra")] == [1, 2]
    assert lineage("math/algebra/linear") == ("math", "math/algebra", "math/algebra/linear")
    assert inner_nodes(["web", "math/algebra/linear", "math/rings"]) == ("math", "math/algebra")
    assert inner_nodes(["math", "mathematics"]) == ()


@pytest.mark.parametrize(
    ("leaves", "above"),
    [(["math", "math/algebra"], "math"), (["x", "a/b/c/d", "a/b"], "a/b"), (["a/b", "a/b/c"], "a/b")],
)
def test_a_leaf_above_another_is_refused(leaves: list[str], above: str) -> None:
    with pytest.raises(ValueError, match=rf"domain '{above}' has documents of its own, and '{above}/.*' lies below it"):
        check_leaves(leaves)
    check_leaves([leaf for leaf in leaves if leaf != above] + [f"{above}s"])


@calm
@given(leaves=trees(), level=st.integers(1, 3), seed=st.integers(0, 999))
def test_a_rolled_up_perplexity_is_that_of_all_tokens_at_once(leaves: list[str], level: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    losses = {leaf: random.gamma(2.0, 1.5, size=random.integers(1, 400)) for leaf in leaves}
    found = rolled_up_ppl(
        {leaf: math.exp(loss.mean()) for leaf, loss in losses.items()},
        {leaf: len(loss) for leaf, loss in losses.items()},
        level,
    )
    tokens: dict[str, list[float]] = {}
    for leaf, loss in losses.items():
        tokens.setdefault("/".join(leaf.split("/")[:level]), []).extend(loss)
    assert found == pytest.approx({node: math.exp(np.mean(every)) for node, every in tokens.items()}, rel=1e-12)


def test_rolling_up_by_hand() -> None:
    gaps = [
        DomainGap(domain="m/a", student_ppl=16.0, teacher_ppl=2.0),
        DomainGap(domain="m/b", student_ppl=2.0, teacher_ppl=2.0),
        DomainGap(domain="web", student_ppl=9.0, teacher_ppl=3.0),
    ]
    # (1·4 + 3·1) / 4 bits; the mean of the perplexities would be 9, that of the logarithms 5.7.
    math_, web = rolled_up_gaps(gaps, {"m/a": 100, "m/b": 300, "web": 7}, 1)
    assert math_.domain == "m"
    assert math_.student_ppl == pytest.approx(2.0 ** (7 / 4), rel=1e-14)
    assert math_.teacher_ppl == pytest.approx(2.0, rel=1e-14)
    assert web == gaps[2]
    assert rolled_up_counts({"m/a": 100, "m/b": 300, "web": 7}, 1) == {"m": 400, "web": 7}
    with pytest.raises(ValueError, match="domain 'm/b' was measured on no known number of positions"):
        rolled_up_gaps(gaps, {"m/a": 100, "web": 7}, 1)


@calm
@given(values=measured(), level=st.integers(1, 3))
def test_spreading_and_rolling_up_undo_each_other(values, level: int) -> None:
    old, _, sizes, _ = values
    whole = rolled_up_mixture(old, level)
    spread = spread_mixture(whole, sizes, level)
    assert set(spread.domains) == set(sizes)
    assert math.fsum(spread.probabilities.values()) == pytest.approx(1.0, abs=1e-12)
    assert dict(rolled_up_mixture(spread, level).probabilities) == pytest.approx(dict(whole.probabilities), abs=1e-12)
    for leaf in sizes:
        for other in sizes:
            if cut(leaf, level) == cut(other, level):  # in proportion to their blocks
                assert spread.probabilities[leaf] * sizes[other] == pytest.approx(
                    spread.probabilities[other] * sizes[leaf]
                )


def test_a_mixture_over_other_domains_is_not_spread() -> None:
    with pytest.raises(ValueError, match=r"the mixture has domains \['a', 'c'\], the data \['a', 'b'\]"):
        spread_mixture(Mixture(probabilities={"a": 0.5, "c": 0.5}), {"a/x": 1, "b": 2}, 1)


@calm
@given(values=measured(), method=st.sampled_from(METHODS), first=st.booleans())
def test_a_level_that_cuts_nothing_changes_nothing(values, method: MethodName, first: bool) -> None:
    old, gaps, sizes, positions = values
    past = [] if first else [Interval(step=0, gaps=gaps, mixture=old)]
    deepest = max(map(depth, sizes))
    cutting_nothing = MixtureConfig(level=deepest)
    expected = mixture_after(method, past, gaps, MixtureConfig(), sizes)
    # To the last bit: a run's mixtures must not depend on whether a level is spelt out.
    assert mixture_after(method, past, gaps, cutting_nothing, sizes, positions=positions) == expected


@calm
@given(values=measured(), method=st.sampled_from(METHODS), level=st.integers(1, 3), first=st.booleans())
def test_a_level_is_the_method_on_the_coarser_domains(values, method: MethodName, level: int, first: bool) -> None:
    """The same as a run whose configuration had only ever known the coarser domains."""
    old, gaps, sizes, positions = values
    past = [] if first else [Interval(step=0, gaps=gaps, mixture=old)]
    found = mixture_after(method, past, gaps, MixtureConfig(level=level), sizes, positions=positions)
    assert math.fsum(found.probabilities.values()) == pytest.approx(1.0, abs=1e-12)
    coarse_gaps = rolled_up_gaps(gaps, positions, level)
    coarse = mixture_after(
        method,
        [] if first else [Interval(step=0, gaps=coarse_gaps, mixture=rolled_up_mixture(old, level))],
        coarse_gaps,
        MixtureConfig(),
        rolled_up_counts(sizes, level),
    )
    assert dict(rolled_up_mixture(found, level).probabilities) == pytest.approx(dict(coarse.probabilities), abs=1e-12)


def test_equations_1_and_2_at_level_1_by_hand() -> None:
    gaps = [
        DomainGap(domain="m/a", student_ppl=16.0, teacher_ppl=2.0),
        DomainGap(domain="m/b", student_ppl=2.0, teacher_ppl=2.0),
        DomainGap(domain="web", student_ppl=9.0, teacher_ppl=3.0),
    ]
    sizes, positions = {"m/a": 30, "m/b": 10, "web": 5}, {"m/a": 100, "m/b": 300, "web": 7}
    student, teacher = {"m": 2.0 ** (7 / 4), "web": 9.0}, {"m": 2.0, "web": 3.0}
    config = MixtureConfig(level=1, alpha=0.3)
    first = mixture_after("ddk", [], gaps, config, sizes, positions=positions)
    expected = initial_mixture(student, teacher).probabilities
    assert dict(first.probabilities) == pytest.approx(
        {"m/a": 0.75 * expected["m"], "m/b": 0.25 * expected["m"], "web": expected["web"]}, abs=1e-14
    )
    second = mixture_after(
        "ddk", [Interval(step=0, gaps=gaps, mixture=first)], gaps, config, sizes, positions=positions
    )
    expected = update_mixture(expected, student, teacher, 0.3).probabilities
    assert dict(second.probabilities) == pytest.approx(
        {"m/a": 0.75 * expected["m"], "m/b": 0.25 * expected["m"], "web": expected["web"]}, abs=1e-14
    )


def test_a_reference_is_rolled_up_too() -> None:
    gaps = [DomainGap(domain=leaf, student_ppl=8.0, teacher_ppl=2.0) for leaf in ("m/a", "m/b", "web")]
    sizes = positions = dict.fromkeys(("m/a", "m/b", "web"), 10)
    old = Mixture(probabilities={"m/a": 0.25, "m/b": 0.25, "web": 0.5})
    config = MixtureConfig(level=1, doremi_smoothing=0.0)
    reference = {"m/a": 8.0, "m/b": 2.0, "web": 4.0}
    found = mixture_after(
        "cpt_doremi", [Interval(step=0, gaps=gaps, mixture=old)], gaps, config, sizes, reference, positions
    )
    # 'm' against √(8·2) = 4, as 'web' against 4: the same excess loss, so that nothing moves.
    assert dict(found.probabilities) == pytest.approx(dict(old.probabilities), abs=1e-12)


def test_weights_are_of_the_domains_at_the_level() -> None:
    leaves, sizes = ["m/a", "m/b", "web"], {"m/a": 30, "m/b": 10, "web": 5}
    gaps = [DomainGap(domain=leaf, student_ppl=8.0, teacher_ppl=2.0) for leaf in leaves]
    config = MixtureConfig(level=1, weights={"m": 3.0, "web": 1.0})
    check_method("kd", config, LossConfig(), leaves)
    mixture = mixture_after("kd", [], gaps, config, sizes, positions=sizes)
    assert mixture.probabilities == pytest.approx({"m/a": 0.5625, "m/b": 0.1875, "web": 0.25}, abs=1e-14)
    for wrong in ({"m/a": 1.0, "m/b": 1.0, "web": 1.0}, {"m": 1.0}):
        with pytest.raises(ValueError, match=r"mixture.weights: domain '.*' has no weight; give one to each of m, web"):
            check_method("kd", MixtureConfig(level=1, weights=wrong), LossConfig(), leaves)
    check_method("kd", MixtureConfig(weights=dict.fromkeys(leaves, 1.0)), LossConfig(), leaves)
