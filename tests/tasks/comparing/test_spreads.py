"""Against printed tables, numpy and scipy's paired t test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tasks.comparing.spreads import paired_difference, spread, t_quantile

VALUES = st.floats(min_value=-1e3, max_value=1e3, allow_subnormal=False)


@pytest.mark.parametrize(
    ("confidence", "degrees", "printed"),
    [
        *((0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.95, 9, 2.262), (0.95, 29, 2.045)),
        *((0.99, 1, 63.657), (0.99, 4, 4.604), (0.9, 10, 1.812), (0.5, 3, 0.765), (0.95, 10**6, 1.960)),
    ],
)
def test_t_quantile_is_that_of_the_tables(confidence, degrees, printed):
    assert t_quantile(confidence, degrees) == pytest.approx(printed, abs=5e-4)


@pytest.mark.parametrize(("confidence", "degrees"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_there_is_no_quantile_of_nothing(confidence, degrees):
    with pytest.raises(ValueError, match="no t quantile"):
        t_quantile(confidence, degrees)


@settings(deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=8))
def test_spread_is_numpys(values):
    found = spread(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_one_value_has_no_spread_and_equal_ones_none_at_all():
    assert spread([3.0]).sd is None
    assert spread([0.1, 0.1, 0.1]).sd == 0.0
    with pytest.raises(ValueError, match="at least one"):
        spread([])


@settings(deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=8))
def test_the_interval_is_that_of_the_paired_t_test(pairs):
    ours, base = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    found = paired_difference(ours, base)
    differences = [a - b for a, b in pairs]
    if np.std(differences) < 1e-6:  # scipy warns of what it cannot divide by
        return
    expected = stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-9)
    p = stats.ttest_rel(list(ours.values()), list(base.values())).pvalue
    if abs(p - 0.05) > 1e-6:
        assert (found.verdict != "no difference shown") == (p < 0.05)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({0: 1.0, 1: 1.1, 2: 0.9}, "better"),
        ({0: 3.0, 1: 3.1, 2: 2.9}, "worse"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "no difference shown"),
        ({0: 2.0, 1: 2.0, 2: 2.0}, "no difference shown"),
        ({0: 1.5, 1: 1.5, 2: 1.5}, "better"),
        ({1: 1.0}, "one seed, no interval"),
    ],
)
def test_verdicts(values, verdict):
    assert paired_difference(values, {0: 2.0, 1: 2.0, 2: 2.0}).verdict == verdict


def test_only_common_seeds_are_paired():
    found = paired_difference({0: 1.0, 1: 2.0, 5: 99.0}, {0: 0.5, 1: 1.0, 7: -99.0})
    assert (found.n, found.mean) == (2, 0.75)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
