"""Which measurements of which runs become points, and which runs may not be under one law."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_model import make_tiny_model

from ddk.errors import UserError
from ddk.values import DomainGap, Mixture
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record
from tasks.predicting.points import MOST_POINTS, read_points, student_size

STORES = {"a": {"blocks": "b1", "targets": "t1"}, "b": {"blocks": "b2", "targets": "t2"}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("student"), rows=64, context=64)


def make_run(
    root: Path,
    name: str,
    student: str,
    *,
    steps: tuple[int, ...] = (0, 2, 4, 8),
    share: float = 0.25,
    complete: bool = True,
    train: dict[str, Any] | None = None,
    stores: Any = STORES,
    loss: dict[str, Any] | None = None,
) -> None:
    """A run's folder as training leaves it, with losses of our choice."""
    folder = RunFolder(str(root), name)
    config = {
        "method": "ddk_equal",
        "student": {"model": student, "revision": None},
        "loss": {"gamma": 0.2} if loss is None else loss,
        "train": {
            "steps": 8,
            "warmup_steps": 0,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-3,
            **(train or {}),
        },
        "packing": {"seq_len": 16},
    }
    folder.claim({"stores": stores, "name": name}, config)
    history = MixtureHistory(folder.url)
    for version, step in enumerate(steps):
        history.append(
            make_record(
                version=version,
                step=step,
                tokens_seen=step * 64,
                gaps=[
                    DomainGap(domain=domain, student_ppl=math.exp(4.0 - 0.1 * step), teacher_ppl=math.exp(2.0))
                    for domain in stores
                ],
                mixture=Mixture(probabilities={"a": share, "b": 1 - share} if "b" in stores else {"a": 1.0}),
                blocks_drawn={"a": int(400 * step * share), "b": int(400 * step * (1 - share))}
                if "b" in stores
                else {"a": step},
            )
        )
    if complete:
        folder.finish({"steps": steps[-1]})


def test_every_measurement_is_a_point_where_the_learning_rate_is_held(tmp_path: Path, student: str) -> None:
    make_run(tmp_path, "law-1", student)
    make_run(tmp_path, "law-2", student, share=0.5, complete=False, steps=(0, 2))
    make_run(tmp_path, "other", student)
    found = read_points(str(tmp_path), ["law-*"])
    assert [(point.run, point.tokens) for point in found.points] == [
        *(("law-1", 128.0), ("law-1", 256.0), ("law-1", 512.0)),
        ("law-2", 128.0),
    ]
    first = found.points[0]
    assert first.shares == {"a": 0.25, "b": 0.75}
    assert first.losses["a"] == pytest.approx(3.8)
    assert found.teacher == pytest.approx({"a": 2.0, "b": 2.0})
    assert found.start["a"] == {first.parameters: pytest.approx(4.0)}
    assert found.tokens_per_step == 64
    assert found.notes == []
    assert first.parameters == student_size(student, None)


def test_the_size_is_that_without_embeddings(student: str) -> None:
    hidden, inner, layers, heads = 64, 128, 2, 2
    attention = 2 * hidden * hidden + 2 * hidden * (hidden // heads)
    assert student_size(student, None) == layers * (attention + 3 * hidden * inner)


def test_of_a_learning_rate_that_falls_the_end_alone_is_a_point(tmp_path: Path, student: str) -> None:
    falling = {"min_learning_rate": 1e-5}
    make_run(tmp_path, "a", student, train=falling)
    make_run(tmp_path, "b", student, train=falling, complete=False)
    found = read_points(str(tmp_path), ["*"])
    assert [(point.run, point.tokens) for point in found.points] == [("a", 512.0)]
    assert "last measurement of each complete run" in found.notes[0]
    assert len(read_points(str(tmp_path), ["*"], all_points=True).points) == 6


def test_the_warm_up_is_left_out_and_long_runs_are_thinned(tmp_path: Path, student: str) -> None:
    make_run(tmp_path, "a", student, steps=tuple(range(200)), train={"warmup_steps": 10})
    tokens = [point.tokens for point in read_points(str(tmp_path), ["a"]).points]
    assert tokens[0] == 10 * 64
    assert tokens[-1] == 199 * 64
    assert 10 < len(tokens) <= MOST_POINTS
    ratios = [late / early for early, late in itertools.pairwise(tokens)]
    assert max(ratios) < 1.4, "evenly on the logarithm"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"stores": {"a": STORES["a"]}}, "has the domains a, run 'a' a, b"),
        ({"stores": {**STORES, "b": {"blocks": "b9", "targets": "t2"}}}, "other validation sets) of 'b'"),
        ({"stores": {**STORES, "a": {"blocks": "b1", "targets": "t9"}}}, "other targets of 'a'"),
        ({"stores": {**STORES, "a": {**STORES["a"], "selections": "s1"}}}, "other selections of 'a'"),
        ({"loss": {"gamma": 1.0}}, "differ in loss"),
        ({"train": {"learning_rate": 5e-3, "min_learning_rate": 5e-3}}, "differ in train.learning_rate"),
    ],
)
def test_runs_that_cannot_be_under_one_law_are_named(
    tmp_path: Path, student: str, changed: dict[str, Any], said: str
) -> None:
    make_run(tmp_path, "a", student)
    make_run(tmp_path, "b", student, **changed)
    with pytest.raises(UserError, match=r"run.* 'b'.*--runs") as refused:
        read_points(str(tmp_path), ["*"])
    assert said in str(refused.value)


def test_no_run_says_which_there_are(tmp_path: Path, student: str) -> None:
    make_run(tmp_path, "weekly", student)
    with pytest.raises(UserError, match=r"matches law-\*; there are: weekly"):
        read_points(str(tmp_path), ["law-*"])
