"""What the tests of the tasks share: a small run to report on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ddk.types import DomainGap, Mixture
from tasks.report_data import IntervalRecord, RunSummary

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
