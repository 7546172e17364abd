"""What the tests of the tasks share: a small run to report on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ddk.methods.registry import METHODS
from ddk.values import DomainGap, Mixture
from storage.runs.mixtures import make_record
from tasks.comparing.data import ComparedRun, ComparedVariant, Comparison
from tasks.reporting.records import IntervalRecord, RunSummary

MakeRecords = Callable[..., list[IntervalRecord]]


@pytest.fixture
def make_records() -> MakeRecords:
    """`make_records({'math': [3.0, 2.0], 'web': [1.5, 1.25]})`: ratios per version → records.

    The teacher's perplexity is 8 everywhere, probabilities follow the ratios, and the interval after version t has
    read 4 blocks of the first domain, 6 of the second, 8 of the third …, of 256 predictions each.
    """

    def make(ratios: dict[str, list[float]], *, teacher_ppl: float = 8.0) -> list[IntervalRecord]:
        drawn = {domain: 4 + 2 * place for place, domain in enumerate(ratios)}
        versions = len(next(iter(ratios.values())))
        return [
            IntervalRecord(
                t=t,
                step=10 * t,
                tokens_seen=256 * t * sum(drawn.values()),
                gaps=tuple(
                    DomainGap(domain=domain, student_ppl=teacher_ppl * curve[t], teacher_ppl=teacher_ppl)
                    for domain, curve in ratios.items()
                ),
                mixture=Mixture(probabilities=_shares({domain: curve[t] for domain, curve in ratios.items()})),
                blocks_drawn={domain: t * blocks for domain, blocks in drawn.items()} if t else {},
            )
            for t in range(versions)
        ]

    return make


def _shares(weights: dict[str, float]) -> dict[str, float]:
    finite = {domain: weight if weight < 1e9 else 1e9 for domain, weight in weights.items()}
    total = sum(finite.values())
    return {domain: weight / total for domain, weight in finite.items()}


@pytest.fixture
def records(make_records: MakeRecords) -> list[IntervalRecord]:
    """Three domains; 'code' lags most before, 'math' after."""
    return make_records({"math": [3.0, 2.5, 2.0], "code": [4.0, 2.0, 1.5], "web": [1.5, 1.25, 1.0]})


@pytest.fixture
def make_summary() -> Callable[..., RunSummary]:
    def make(**changes: object) -> RunSummary:
        values: dict[str, object] = {
            "name": "try_1",
            "method": "ddk",
            "teacher": "Qwen/Qwen2.5-14B",
            "student": "Qwen/Qwen2.5-1.5B",
            "domains": ("math", "code", "web"),
            "tokens_seen": 9216,
            "steps": 20,
            "seq_len": 256,
            "settings": {
                "train": {"learning_rate": 3e-5, "steps": 20, "batch_size": 4},
                "loss": {"gamma": 0.2, "temperature": 1.0, "tail": "bucket"},
                "mixture": {"alpha": 0.5, "interval": 10},
                "corpus": {"domains": ["math", "code", "web"], "url": None},
            },
            "wall_seconds": 251.3,
            "stopped_early": None,
        }
        return RunSummary(**(values | changes))  # type: ignore[arg-type]

    return make


@pytest.fixture
def summary(make_summary: Callable[..., RunSummary]) -> RunSummary:
    return make_summary()


MakeComparison = Callable[..., Comparison]


@pytest.fixture
def make_comparison() -> MakeComparison:
    """`make_comparison({'ddk': {0: {'math': [3.0, 2.0], 'web': [1.5, 1.2]}, 1: …}, 'kd': …})`.

    Variant → seed → domain → ratios at the measurements; None in place of a seed's domains: that run has failed. The
    teacher's perplexity is 8 everywhere; a step reads 2 blocks a domain, of 16 positions each.
    """

    def make(ratios: dict[str, dict[int, dict[str, list[float]] | None]], **changes: object) -> Comparison:
        seeds = tuple(dict.fromkeys(seed for runs in ratios.values() for seed in runs))
        domains = next(of for runs in ratios.values() for of in runs.values() if of)
        values: dict[str, object] = {
            "name": "trial",
            "baseline": next(iter(ratios)),
            "seeds": seeds,
            "domains": tuple(domains),
            "variants": tuple(ComparedVariant(name=name, method=_method(name)) for name in ratios),
            "runs": tuple(
                _compared(name, seed, runs[seed]) for seed in seeds for name, runs in ratios.items() if seed in runs
            ),
        }
        return Comparison.model_validate(values | changes)

    return make


def _method(name: str) -> str:
    return name if name in METHODS else "ddk"


def _compared(variant: str, seed: int, ratios: dict[str, list[float]] | None) -> ComparedRun:
    common = {"variant": variant, "seed": seed, "run": f"trial-{variant}-s{seed}"}
    if ratios is None:
        return ComparedRun(status="failed", reason=f"{variant} has diverged", **common)
    records = tuple(
        make_record(
            version=t,
            step=10 * t,
            tokens_seen=10 * t * 2 * len(ratios) * 16,
            gaps=[DomainGap(domain=domain, student_ppl=8.0 * of[t], teacher_ppl=8.0) for domain, of in ratios.items()],
            mixture=Mixture(probabilities=_shares({domain: of[t] for domain, of in ratios.items()})),
            blocks_drawn=dict.fromkeys(ratios, 10 * t * 2),
        )
        for t in range(len(next(iter(ratios.values()))))
    )
    return ComparedRun(
        status="complete",
        training_seconds=12.5,
        seq_len=16,
        records=records,
        student_flops=1_000,
        teacher_flops=5_000,
        teacher="unused" if variant == "cpt" else "live" if variant == "ted" else "stored",
        validation_positions=320,
        stores=("targets/a/math.zarr",),
        **common,
    )
