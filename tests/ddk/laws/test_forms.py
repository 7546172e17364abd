from __future__ import annotations

import math

import numpy as np
import pytest

from ddk.laws.forms import FORMS, FormName, Inputs, Shape

GENERATOR = np.random.default_rng(1)
AT = Inputs(
    parameters=GENERATOR.uniform(0.3, 3.0, 6),
    tokens=GENERATOR.uniform(0.1, 5.0, 6),
    shares=GENERATOR.dirichlet([1.0, 1.0, 1.0], 6),
    own=1,
)


def inside(shape: Shape, seed: int) -> np.ndarray:
    """Constants well inside their bounds."""
    generator = np.random.default_rng(seed)
    exponents = [generator.uniform(max(low, -1.0), min(high, 1.0)) for low, high in shape.bounds]
    return np.array(exponents)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sized", [False, True])
def test_the_slopes_are_those_of_the_losses(form: FormName, sized: bool) -> None:
    shape = Shape(form, 3, sized)
    theta = inside(shape, 3)
    losses, slopes = shape.losses_and_slopes(theta, AT)
    assert losses == pytest.approx(shape.losses(theta, AT))
    for number in range(len(theta)):
        step = np.zeros_like(theta)
        step[number] = 1e-6
        expected = (shape.losses(theta + step, AT) - shape.losses(theta - step, AT)) / 2e-6
        assert slopes[:, number] == pytest.approx(expected, rel=1e-5, abs=1e-8), (form, number)


def test_each_form_is_what_its_formula_says() -> None:
    n, d, shares = float(AT.parameters[0]), float(AT.tokens[0]), AT.shares[0]
    r = float(shares[1])
    ln = math.log
    cases: dict[FormName, tuple[list[float], float]] = {
        "dcpt": (
            [ln(1.1), ln(0.7), ln(0.3), ln(2.0), 0.3, 0.4, 0.5, 0.1, 0.2],
            1.1 + 0.7 * r**0.4 / d**0.3 + 0.3 / (r + 0.1) ** 0.5 + 2.0 / n**0.2,
        ),
        "own_tokens": (
            [ln(1.1), ln(0.7), ln(2.0), 0.3, 0.2, 0.1, 0.2],
            1.1 + 0.7 / (0.2 + (r + 0.1) * d) ** 0.3 + 2.0 / n**0.2,
        ),
        "forgetting": (
            [ln(1.1), ln(0.7), ln(0.4), ln(2.0), 0.3, 0.2, 0.1, 0.6, 1.5, 0.2],
            1.1 + 0.7 / (0.2 + (r + 0.1) * d) ** 0.3 + 0.4 * (1 - r) ** 1.5 * (1 - math.exp(-d / 0.6)) + 2.0 / n**0.2,
        ),
        "exponential": (
            [ln(1.1), ln(0.7), ln(2.0), 0.3, 0.5, -1.0, 0.2, 0.2],
            1.1
            + 0.7 * math.exp(sum(t * (x - 1 / 3) for t, x in zip((0.5, -1.0, 0.2), shares, strict=True))) / d**0.3
            + 2.0 / n**0.2,
        ),
        "power": ([ln(1.1), ln(0.7), ln(2.0), 0.3, 0.2], 1.1 + 0.7 / d**0.3 + 2.0 / n**0.2),
    }
    assert set(cases) == set(FORMS)
    for form, (theta, expected) in cases.items():
        assert Shape(form, 3, sized=True).losses(np.array(theta), AT)[0] == pytest.approx(expected, rel=1e-12)
