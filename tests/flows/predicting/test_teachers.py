"""The short runs that rank teachers, and what is said of their results; `ddk compare` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import ASSETS, write_config

from ddk.errors import UserError
from ddk.values import DomainGap, Mixture
from flows.comparing.variants import Request, planned_runs
from flows.config import Config, load_config
from flows.costing.run_size import Assumptions
from flows.predicting.teachers import hint, rank, teachers_request
from storage.runs.mixtures import MixtureRecord, make_record
from tasks.comparing.data import ComparedRun, ComparedVariant, Comparison

TEACHER, STUDENT = str(ASSETS / "teacher"), str(ASSETS / "student")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


def asked(config: Config, teachers: list[str]) -> Request:
    return teachers_request(config, ".", name="teachers", teachers=teachers, seeds=[0, 1], blocks=32, steps=5)


def test_every_teacher_has_the_same_short_run(config: Config) -> None:
    runs = planned_runs(config, asked(config, [TEACHER, STUDENT]))
    assert [(run.variant.name, run.seed) for run in runs] == [
        *(("teacher", 0), ("student", 0)),
        *(("teacher", 1), ("student", 1)),
    ]
    for run in runs:
        assert run.config is not None, run.refusal
        assert run.config.teacher.model == {"teacher": TEACHER, "student": STUDENT}[run.variant.name]
        assert {domain.max_train_blocks for domain in run.config.domains.values()} == {32}
        assert (run.config.train.steps, run.config.train.warmup_steps) == (5, 0)
        assert run.config.method == "ddk_equal"


def test_a_domain_may_have_a_dot_in_its_name(config: Config) -> None:
    dotted = config.model_copy(update={"domains": {"a.b": next(iter(config.domains.values()))}})
    (run, *_) = planned_runs(dotted, asked(dotted, [TEACHER, STUDENT]))
    assert run.config is not None
    assert run.config.domains["a.b"].max_train_blocks == 32


def test_teachers_that_end_alike_are_numbered(config: Config) -> None:
    request = asked(config, ["x/model", "y/model"])
    assert [variant.name for variant in request.variants] == ["model 1", "model 2"]


@pytest.mark.parametrize("teachers", [[], [TEACHER], [TEACHER, TEACHER]])
def test_one_teacher_is_no_choice(config: Config, teachers: list[str]) -> None:
    with pytest.raises(UserError, match="at least two different models"):
        asked(config, teachers)


def record(ppl: float) -> MixtureRecord:
    return make_record(
        version=0,
        step=5,
        tokens_seen=100,
        gaps=[DomainGap(domain="math", student_ppl=ppl, teacher_ppl=2.0)],
        mixture=Mixture(probabilities={"math": 1.0}),
        blocks_drawn={"math": 3},
    )


def test_the_teacher_whose_student_is_best_comes_first_with_the_price(config: Config) -> None:
    request = asked(config, [TEACHER, STUDENT])
    ends = {"teacher": (20.0, 20.4), "student": (18.0, 18.3)}
    comparison = Comparison(
        name="teachers",
        baseline="teacher",
        seeds=(0, 1),
        domains=("math",),
        variants=tuple(ComparedVariant(name=name, method="ddk_equal") for name in ends),
        runs=tuple(
            ComparedRun(
                variant=name, seed=seed, run=f"{name}{seed}", status="complete", seq_len=96, records=(record(ppl),)
            )
            for name, both in ends.items()
            for seed, ppl in enumerate(both)
        ),
    )
    ranked = rank(config, request, comparison, Assumptions())
    assert [one.model for one in ranked] == [STUDENT, TEACHER]
    assert [one.perplexity for one in ranked] == pytest.approx([18.15, 20.2])
    assert [one.difference for one in ranked] == ["best", "worse"]
    assert ranked[0].times == 1.0
    assert ranked[1].times > 5
    assert ranked[1].capture_hours > ranked[0].capture_hours > 0
    assert STUDENT in hint(ranked), "1 lies nearer to 2.5 than the teacher's 10 does"
