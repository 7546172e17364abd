"""What is read off the runs, against numpy on the same numbers."""

from __future__ import annotations

import numpy as np
import pytest

from ddk.values import worst_gap
from tasks.comparing.data import (
    CapturedStore,
    Comparison,
    Measure,
    by_seed,
    difference_of,
    frontier,
    regressed_domains,
    run_rows,
    saved_flops,
    spread_of,
    summary_rows,
)

THREE = {
    "ddk": {
        0: {"math": [4.0, 2.0], "web": [2.0, 1.5]},
        1: {"math": [4.0, 2.2], "web": [2.0, 1.7]},
        2: {"math": [4.0, 2.1], "web": [2.0, 1.6]},
    },
    "kd": {
        0: {"math": [4.0, 3.0], "web": [2.0, 1.4]},
        1: {"math": [4.0, 3.3], "web": [2.0, 1.5]},
        2: {"math": [4.0, 3.1], "web": [2.0, 1.4]},
    },
    "cpt": {
        0: {"math": [4.0, 2.5], "web": [2.0, 1.1]},
        1: None,
        2: {"math": [4.0, 2.4], "web": [2.0, 1.3]},
    },
}


@pytest.fixture
def three(make_comparison) -> Comparison:
    return make_comparison(THREE)


def final(variant, domain):
    return np.array([of[domain][-1] for of in THREE[variant].values() if of is not None])


def test_measures_over_all_domains(three):
    math, web = final("kd", "math"), final("kd", "web")
    for name, expected in [
        ("ratio", (math + web) / 2),
        ("worst_ratio", np.maximum(math, web)),
        ("perplexity", 8 * np.sqrt(math * web)),
        ("tokens", np.full(3, 640.0)),
    ]:
        found = spread_of(three, "kd", Measure(name=name))
        assert found.mean == pytest.approx(expected.mean())
        assert found.sd == pytest.approx(expected.std(ddof=1), abs=1e-12)
    assert worst_gap(three.of("kd")[0].last.gaps).domain == "math"


def test_measures_of_one_domain(three):
    assert list(by_seed(three, "kd", Measure(name="ratio", domain="web")).values()) == list(final("kd", "web"))
    assert spread_of(three, "ddk", Measure(name="perplexity", domain="math")).mean == pytest.approx(8 * 2.1)
    assert spread_of(three, "ddk", Measure(name="tokens", domain="math")).mean == 10 * 2 * 16
    assert spread_of(three, "ddk", Measure(name="share", domain="math")).mean == 0.5
    assert spread_of(three, "ddk", Measure(name="ratio", domain="code")) is None


def test_differences_are_paired_by_seed(three):
    found = difference_of(three, "kd", Measure(name="worst_ratio"))
    paired = final("kd", "math") - final("ddk", "math")
    assert (found.n, found.mean) == (3, pytest.approx(paired.mean()))
    half = 4.302652729911275 * paired.std(ddof=1) / np.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(paired.mean() - half), pytest.approx(paired.mean() + half))
    assert found.verdict == "worse"
    assert difference_of(three, "ddk", Measure(name="ratio")) is None, "the baseline is compared with nothing"


def test_a_domain_has_regressed_where_the_seeds_mean_rises_by_more_than_a_hundredth(make_comparison):
    comparison = make_comparison(
        {
            "ddk": {
                0: {"math": [4.0, 2.0], "web": [2.0, 2.3], "qa": [2.0, 2.015]},
                1: {"math": [4.0, 5.0], "web": [2.0, 1.9], "qa": [2.0, 2.015]},
            },
            "kd": {0: {"math": [4.0, 2.0], "web": [2.0, 1.9], "qa": [2.0, 2.03]}},
        }
    )
    # math rises with one seed and halves with the other; web rises by √(2.3 · 1.9)/2 in the geometric mean.
    assert regressed_domains(comparison, "ddk") == {"web": pytest.approx(np.sqrt(2.3 * 1.9) / 2)}
    assert regressed_domains(comparison, "kd") == {"qa": pytest.approx(1.015)}


def test_the_frontier_has_a_point_for_each_variant_with_its_intervals(three):
    ddk, kd, cpt = frontier(three)
    assert [point.variant for point in (ddk, kd, cpt)] == ["ddk", "kd", "cpt"]
    assert (ddk.perplexity_interval, ddk.worst_ratio_interval) == (None, None), "the baseline is compared with nothing"
    assert kd.worst_ratio == pytest.approx(final("kd", "math").mean())
    difference = difference_of(three, "kd", Measure(name="worst_ratio"))
    base = final("ddk", "math").mean()
    assert kd.worst_ratio_interval == (pytest.approx(base + difference.low), pytest.approx(base + difference.high))
    assert not any(point.regressed for point in (ddk, kd, cpt))


def test_a_failed_run_is_in_no_mean(three):
    assert set(by_seed(three, "cpt", Measure(name="ratio"))) == {0, 2}
    assert difference_of(three, "cpt", Measure(name="ratio")).n == 2
    assert [run.run for run in three.failed] == ["trial-cpt-s1"]


def test_an_unfinished_run_is_in_no_mean(three):
    runs = [run.model_copy(update={"status": "unfinished"}) if run.run == "trial-kd-s0" else run for run in three.runs]
    assert set(by_seed(three.model_copy(update={"runs": tuple(runs)}), "kd", Measure(name="ratio"))) == {1, 2}


def test_cost_of_a_run(make_comparison):
    ratios = {"math": [4.0, 2.0], "web": [2.0, 1.5]}
    comparison = make_comparison({name: {0: ratios} for name in ("ddk", "cpt", "ted")})
    ddk, cpt, ted = comparison.runs
    assert ddk.training_flops == cpt.training_flops == 3 * 1_000 * 640
    assert ddk.evaluation_flops == 1_000 * 320 * 2
    assert [run.teacher_forwards("stored") for run in (ddk, cpt, ted)] == [5_000 * 640, 0, 0]
    assert [run.teacher_forwards("live") for run in (ddk, cpt, ted)] == [0, 0, 5_000 * 640]


def test_what_the_cache_saved(three):
    store = CapturedStore(positions=1_000, captured=True, teacher_flops=5_000)
    stores = {"a": store, "b": store, "c": store.model_copy(update={"captured": False})}
    found = saved_flops(three.model_copy(update={"stores": stores}))
    replaced = 5_000 * 640 * 6  # ddk's and kd's runs; cpt reads no teacher
    assert found == {"replaced": replaced, "captured": 10_000_000, "saved": replaced - 10_000_000}
    unknown = {"a": store.model_copy(update={"teacher_flops": None})}
    assert saved_flops(three.model_copy(update={"stores": unknown}))["saved"] is None


def test_rows_of_runs_are_flat_and_complete(three):
    rows = list(run_rows(three))
    assert len({tuple(row) for row in rows}) == 1, "every row has the same columns"
    assert len(rows) == 8 * 3 + 1, "a row a domain and one over all; the failed run has one alone"
    row = next(row for row in rows if row["run"] == "trial-kd-s1" and row["domain"] == "math")
    assert (row["ratio_before"], row["ratio"], row["tokens"]) == (4.0, pytest.approx(3.3), 320.0)
    failed = next(row for row in rows if row["status"] == "failed")
    assert (failed["ratio"], failed["reason"]) == (None, "cpt has diverged")


def test_rows_of_the_summary(three):
    rows = list(summary_rows(three))
    found = next(row for row in rows if (row["variant"], row["measure"], row["domain"]) == ("kd", "ratio", "web"))
    difference = difference_of(three, "kd", Measure(name="ratio", domain="web"))
    assert (found["difference"], found["low"], found["verdict"]) == (
        difference.mean,
        difference.low,
        "better",
    )
    assert all(row["verdict"] == "" for row in rows if row["variant"] == "ddk" or row["measure"] == "tokens")


def test_json_keeps_everything(three):
    assert Comparison.model_validate_json(three.model_dump_json()) == three


def test_nothing_is_known_of_a_variant_without_a_run(make_comparison):
    comparison = make_comparison({"ddk": {0: {"math": [2.0, 1.5]}}, "kd": {0: None}})
    assert spread_of(comparison, "kd", Measure(name="ratio")) is None
    assert difference_of(comparison, "kd", Measure(name="ratio")) is None
    assert {row["variant"] for row in summary_rows(comparison)} == {"ddk"}
