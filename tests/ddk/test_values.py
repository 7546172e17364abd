from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ddk.values import DomainGap, Draw, Mixture, SparseTargets


def arrays(blocks: int = 2, positions: int = 3, k: int = 4) -> dict[str, np.ndarray]:
    return {
        "ids_BLK": np.zeros((blocks, positions, k), np.int32),
        "logprobs_BLK": np.zeros((blocks, positions, k), np.float32),
        "tail_mass_BL": np.zeros((blocks, positions), np.float32),
        "true_logprobs_BL": np.zeros((blocks, positions), np.float32),
    }


def test_targets_have_names_without_shape_letters() -> None:
    targets = SparseTargets(**arrays())
    assert len(targets) == 2
    assert targets.ids is targets.ids_BLK
    assert targets.logprobs is targets.logprobs_BLK
    assert targets.tail_mass is targets.tail_mass_BL
    assert targets.true_logprobs is targets.true_logprobs_BL


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("logprobs_BLK", (2, 3, 5), r"logprobs has shape \(2, 3, 5\); beside ids of shape \(2, 3, 4\) it must be"),
        ("tail_mass_BL", (2, 3, 1), r"tail_mass has shape \(2, 3, 1\); .* it must be \(2, 3\)"),
        ("true_logprobs_BL", (2, 4), r"true_logprobs has shape \(2, 4\); .* it must be \(2, 3\)"),
    ],
)
def test_targets_of_unequal_shapes_are_refused(name, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTargets(**{**arrays(), name: np.zeros(shape, np.float32)})


def test_values_are_frozen() -> None:
    mixture = Mixture(probabilities={"a": 1.0})
    for value, field in (
        (SparseTargets(**arrays()), "ids_BLK"),
        (DomainGap(domain="a", student_ppl=2.0, teacher_ppl=1.0), "domain"),
        (mixture, "probabilities"),
        (Draw(domain="a", index=0), "index"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
    with pytest.raises(TypeError, match="does not support item assignment"):
        mixture.probabilities["a"] = 0.5


def test_a_mixture_is_independent_of_the_mapping_it_was_made_from() -> None:
    source = {"a": 0.25, "b": 0.75}
    mixture = Mixture(probabilities=source)
    source["a"] = 9.0
    assert mixture.probabilities == {"a": 0.25, "b": 0.75}
    assert mixture.domains == ("a", "b")
    assert mixture == Mixture(probabilities={"b": 0.75, "a": 0.25})
    assert mixture != Mixture(probabilities={"a": 0.75, "b": 0.25})


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ({}, "a mixture needs at least one domain"),
        ({"a": math.nan, "b": 0.5}, r"the probability of domain 'a' is nan; it must lie in \[0, 1\]"),
        ({"a": 1.5, "b": -0.5}, r"the probability of domain 'a' is 1.5"),
        ({"a": -1e-12, "b": 1.0}, r"the probability of domain 'a' is -1e-12"),
        ({"a": math.inf}, r"the probability of domain 'a' is inf"),
        ({"a": 0.5, "b": 0.4}, "the probabilities of a mixture must sum to 1; these sum to 0.9"),
        ({"a": 0.0}, "these sum to 0.0"),
    ],
)
def test_what_is_no_mixture_is_refused(probabilities, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(probabilities=probabilities)


def test_a_mixture_takes_rounded_thirds_and_impossible_domains() -> None:
    assert Mixture(probabilities=dict.fromkeys("abc", 1 / 3)).domains == ("a", "b", "c")
    assert Mixture(probabilities={"a": 0.0, "b": 1.0}).probabilities["a"] == 0.0


def test_the_ratio_of_a_gap() -> None:
    assert DomainGap(domain="a", student_ppl=12.0, teacher_ppl=8.0).ratio == 1.5
