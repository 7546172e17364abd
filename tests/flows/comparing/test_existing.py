"""`ddk compare --runs`: of runs that were made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import START, make_run
from small_run import ASSETS, Ddk, write_config

from flows.comparing.existing import existing, name_of
from storage.files import uri
from tasks.comparing.plots import time_figure
from tasks.comparing.report import read_comparison

CONFIG = {
    "teacher": {"model": str(ASSETS / "teacher"), "revision": None},
    "student": {"model": str(ASSETS / "student"), "revision": None},
    "packing": {"seq_len": 100},
    "loss": {"gamma": 0.2},
}


@pytest.fixture
def root(tmp_path: Path) -> str:
    root = str(tmp_path / "root")
    # Not in the order of their names.
    for name, day, ratio in (("weekly-c", 0, 3.0), ("weekly-a", 7, 2.5), ("weekly-b", 14, 2.0)):
        make_run(root, name, ratios=(4.0, ratio), start=START + 86400.0 * day, config=CONFIG)
    make_run(root, "other", config=CONFIG)
    make_run(root, "weekly-going", finished=False, start=START + 86400.0 * 21, config=CONFIG)
    return root


def test_largest_gap_and_mean_over_time(root: str) -> None:
    comparison = existing(root, ["weekly-*"], "weekly")
    assert [variant.name for variant in comparison.variants] == ["weekly-c", "weekly-a", "weekly-b", "weekly-going"]
    assert comparison.baseline == "weekly-c"
    axes = time_figure(comparison).axes[0]
    largest, mean = (
        next(line for line in axes.lines if line.get_gid() == f"{of} of the domains") for of in ("largest", "mean")
    )
    assert list(largest.get_ydata()) == [3.0, 2.5, 2.0]
    assert list(mean.get_ydata()) == pytest.approx([0.75 * ratio for ratio in (3.0, 2.5, 2.0)])
    days = [(START + 86400.0 * day + 12.0) / 86400.0 for day in (0, 7, 14)]  # matplotlib counts them from 1970
    assert list(largest.get_xdata()) == pytest.approx(days)


def test_the_command_runs_nothing_and_writes_a_report(root: str, tmp_path: Path) -> None:
    done = Ddk(tmp_path)("compare", "--runs", "weekly-*", "--root", root)
    assert done.code == 0, done.err
    assert "waiting   weekly-going" in done.out
    assert f"report    {root}/comparisons/weekly/index.html" in done.out
    comparison = read_comparison(root, "weekly")
    assert comparison.over_time
    assert len([run for run in comparison.runs if run.counts]) == 3
    page = (Path(root) / "comparisons" / "weekly" / "index.html").read_text()
    assert "Over time" in page
    assert (Path(root) / "comparisons" / "weekly" / "time.png").read_bytes().startswith(b"\x89PNG")
    # By a configuration, of the same root; a run that is damaged is named, and the others are compared.
    uri.write_bytes(f"{root}/runs/weekly-a/config.json", b"{")
    config = write_config(tmp_path)
    done = Ddk(tmp_path)("compare", config, "--runs", "weekly-[ab]", "--runs", "other", "--name", "two", "--root", root)
    assert done.code == 1
    assert f"failed    weekly-a: {root}/runs/weekly-a/config.json" in done.out


def test_what_cannot_be_compared_is_refused(root: str, tmp_path: Path) -> None:
    ddk = Ddk(tmp_path)
    assert "1 run of" in ddk.refusal("compare", "--runs", "other", "--root", root)
    assert "there are: other, weekly-a" in ddk.refusal("compare", "--runs", "none-*", "--root", root)
    assert "--runs needs the root" in ddk.refusal("compare", "--runs", "weekly-*")
    assert "name the run's YAML file" in ddk.refusal("compare")
    assert "asks for new ones" in ddk.refusal("compare", "--runs", "weekly-*", "--root", root, "--methods", "kd")
    assert "--name is '../x'" in ddk.refusal("compare", "--runs", "weekly-*", "--root", root, "--name", "../x")


@pytest.mark.parametrize(
    ("patterns", "name"),
    [(["weekly-*"], "weekly"), (["a*", "b?"], "a-b"), (["*"], "runs"), (["weekly-[0-9]*-x"], "weekly-0-9-x")],
)
def test_the_name_follows_from_the_patterns(patterns: list[str], name: str) -> None:
    assert name_of(patterns) == name
