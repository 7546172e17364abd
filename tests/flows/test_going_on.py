"""Runs that go on from another run's checkpoint: `ddk train --from`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import Ddk, SmallRun, files_below, write_config

from ddk.mixture import update_mixture
from flows.stores.describe import describe
from storage.checking.verify_runs import run_findings
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from tasks.reporting.costs import costs_of


def train(ddk: Ddk, small_run: SmallRun, name: str, *options: str, config: str | None = None) -> RunFolder:
    done = ddk("train", config or small_run.config, "--run", name, *options)
    assert done.code == 0, done.err
    return RunFolder(str(small_run.root), name)


def settings(**values: Any) -> list[str]:
    return [word for name, value in values.items() for word in ("--set", f"train.{name}={value}")]


def weights(run: RunFolder) -> bytes:
    return Path(run.student_url, "model.safetensors").read_bytes()


def test_a_longer_run_branches_off_before_the_decay_as_if_it_had_been_one(small_run: SmallRun, ddk: Ddk) -> None:
    """The same weights, history and measurements of each step as of a run that was that long from the start."""
    long = (*settings(schedule="wsd", steps=10, decay_share=0.2),)
    short = train(ddk, small_run, "on-short", *settings(schedule="wsd", decay_share=0.34))
    whole = train(ddk, small_run, "on-whole", *long)
    planned = ddk("plan", small_run.config, "--run", "on-branch", "--from", "on-short@4", *long)
    assert (
        "goes on from step 4 of run 'on-short' to step 10; the learning rate was 0.001 there and goes on at 0.001"
        in (planned.out)
    )
    branch = train(ddk, small_run, "on-branch", "--from", "on-short@4", *long)
    assert weights(branch) == weights(whole) != weights(short)
    one, other = MixtureHistory(branch.url).records(), MixtureHistory(whole.url).records()
    assert one == other
    assert len(one) == 6
    timed = {"seconds", "waited_seconds", "wall_seconds", "time"}
    rows, wanted = (
        [{name: value for name, value in row.items() if name not in timed} for row in run.metrics()]
        for run in (branch, whole)
    )
    assert rows == wanted
    assert [row["learning_rate"] for row in rows[-3:]] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    assert run_findings(str(small_run.root), "on-branch", full=True) == []
    assert "goes on from step 4 of run 'on-short'" in list(describe(branch.url))
    assert (
        "<p>This run goes on from step 4 of run &#39;on-short&#39;.</p>"
        in Path(branch.report_url, "index.html").read_text()
    )
    assert "This run goes on from step 4 of run 'on-short'." in Path(branch.student_url, "README.md").read_text()
    # It needs nothing of the other run any more.
    shutil.rmtree(short.url)
    before = files_below(Path(branch.url, "student"))
    train(ddk, small_run, "on-branch", "--from", "on-short@4", *long)
    assert files_below(Path(branch.url, "student")) == before


def test_weights_alone_with_another_recipe_and_resumed(small_run: SmallRun, ddk: Ddk) -> None:
    options = (
        *("--from", "small", "--fresh-optimizer", "--set", "method=kd", "--set", "loss.gamma=1.0"),
        *settings(steps=10, batch_size=4, learning_rate=5e-4, warmup_steps=2),
    )
    run = train(ddk, small_run, "on-other", *options)
    rows = run.metrics()
    assert [row["tokens"] for row in rows] == [8 * 96] * 6 + [4 * 96] * 4
    assert [row["learning_rate"] for row in rows[6:]] == pytest.approx([2.5e-4, 5e-4, 3e-4, 1e-4])
    assert CheckpointFolder(run.url).state(10)["optimizer_start"] == 6
    records = MixtureHistory(run.url).records()
    assert [record.step for record in records] == [0, 2, 4, 6, 8, 10]
    assert records[-1].tokens_seen == (6 * 8 + 4 * 4) * 96
    # What the other run has trained was paid there.
    own = costs_of(run)
    assert own["training_tokens"] == own["planned_tokens"] == 4 * 4 * 96
    assert own["training_seconds"] == pytest.approx(sum(row["seconds"] for row in rows[6:]), abs=1e-3)
    begun = run.identity() or {}
    assert (begun["from"]["run"], begun["from"]["step"], begun["from"]["optimizer"]) == ("small", 6, False)
    # Moments of zero and a step count of the run would make the first steps many times too small, and silently so.
    first = CheckpointFolder(run.url)
    assert 0.2 < rows[6]["ce"] / rows[5]["ce"] < 2.0
    assert rows[9]["ce"] != rows[6]["ce"]
    before = weights(run)
    for name in ("summary.json", "student.json", "report.json", "mixtures/00005.json"):
        Path(run.url, name).unlink()
    for folder in ("student", "report"):
        shutil.rmtree(Path(run.url, folder))
    shutil.rmtree(first.url(10))
    assert weights(train(ddk, small_run, "on-other", *options)) == before


def test_a_domain_more_enters_by_its_gap(small_run: SmallRun, ddk: Ddk, tmp_path: Path) -> None:
    pair = write_config(tmp_path, domains={"zh_books": None})
    options = ("--root", str(small_run.root))
    train(ddk, small_run, "on-pair", *options, config=pair)
    run = train(ddk, small_run, "on-three", "--from", "on-pair@4", *settings(steps=8))
    trained = MixtureHistory(f"{small_run.root}/runs/on-pair").records()[1]
    first, last = (MixtureHistory(run.url).records()[at] for at in (0, -1))
    assert (first.version, first.step) == (0, 4)
    assert first.blocks_drawn["zh_books"] == 0
    assert first.tokens_seen == 4 * 8 * 96
    ppl = {who: {d: getattr(both, who) for d, both in first.perplexities.items()} for who in ("student", "teacher")}
    before = {domain: p * 2 / 3 for domain, p in trained.probabilities.items()} | {"zh_books": 1 / 3}
    expected = update_mixture(before, ppl["student"], ppl["teacher"], 0.5)
    assert first.probabilities == pytest.approx(dict(expected.probabilities))
    assert sum(last.blocks_drawn.values()) == 8 * 8
    assert last.blocks_drawn["zh_books"] > 0
    assert run_findings(str(small_run.root), "on-three", full=True) == []
    said = ddk("plan", small_run.config, "--run", "on-four", "--from", "on-pair@4", *settings(steps=8)).out
    assert "drawn from their beginning: zh_books; the mixture history begins anew" in said


@pytest.mark.parametrize(
    ("run", "source", "options", "message"),
    [
        ("a", "none", (), "train.from_run: there is no run 'none' below"),
        ("a", "small@5", (), "run 'small' has no checkpoint of step 5; its checkpoints are of the steps: 2, 4, 6"),
        ("a", "small", (), "train.steps is 6, and run 'small' is at step 6 already; steps count on from there"),
        ("small", "small@4", (), "train.from_run is 'small', which is this run itself"),
        ("a", "../small", (), "train.from_run"),
        ("a", "small@4", ("--set", "method=ted"), "run 'small' is of method ddk and this one of ted"),
    ],
)
def test_what_cannot_be_gone_on_from(
    small_run: SmallRun, ddk: Ddk, run: str, source: str, options: tuple[str, ...], message: str
) -> None:
    assert message in ddk.refusal("train", small_run.config, "--run", run, "--from", source, *options)


def test_a_checkpoint_that_has_changed_is_refused_and_one_half_copied_is_copied_again(
    small_run: SmallRun, ddk: Ddk, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--from", "small@4", *settings(steps=8))
    commit = CheckpointFolder.commit

    def killed(self: CheckpointFolder, *arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointFolder, "commit", killed)
        assert ddk("train", small_run.config, "--run", "on-half", *options).code != 0
    assert CheckpointFolder.commit is commit
    half = RunFolder(str(small_run.root), "on-half")
    assert [record.step for record in MixtureHistory(half.url).records()] == [0, 2]
    assert CheckpointFolder(half.url).steps() == []
    source = Path(CheckpointFolder(str(small_run.run)).url(4), "rank-00000.safetensors")
    sound = source.read_bytes()
    source.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        assert "rank-00000.safetensors is missing or damaged" in ddk.refusal(
            "train", small_run.config, "--run", "on-half", *options
        )
    finally:
        source.write_bytes(sound)
    train(ddk, small_run, "on-half", *options)
    assert [record.step for record in MixtureHistory(half.url).records()] == [0, 2, 4, 6, 8]
    assert json.dumps(half.identity())


def test_training_stops_at_a_checkpoint_when_its_hours_are_over(small_run: SmallRun, ddk: Ddk) -> None:
    options = settings(max_hours=1e-6)
    said = ddk.refusal("train", small_run.config, "--run", "on-limited", *options)
    assert "train on-limited: stopped at step 2 of 6, as train.max_hours is 1e-06; the checkpoint is kept" in said
    limited = RunFolder(str(small_run.root), "on-limited")
    assert limited.summary() is None
    assert CheckpointFolder(limited.url).steps() == [2]
    assert (
        weights(train(ddk, small_run, "on-limited")) == Path(small_run.run, "student", "model.safetensors").read_bytes()
    )
