"""`ddk runs`, and `ddk --version`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from made_runs import make_run
from small_run import Ddk, SmallRun

from storage.files import uri
from storage.runs.folder import RunFolder


def test_runs_in_a_table_of_eighty_columns_and_as_json(tmp_path: Path) -> None:
    root, ddk = str(tmp_path / "root"), Ddk(tmp_path)
    make_run(root, "weekly-2026-11-01-with-a-name-longer-than-its-column", planned=30_000, finished=False)
    make_run(root, "small", start=1.6e9, identity={"from": {"run": "elder", "step": 2}})
    make_run(root, "broken")
    uri.write_bytes(f"{root}/runs/broken/config.json", b"{")
    done = ddk("runs", root)
    assert done.code == 0, done.err
    table = done.out.split("broken: damaged")[0].splitlines()
    assert max(map(len, table)) <= 80
    # Its own two steps: the first two were paid by the run that it goes on from.
    assert "2020-09-13 4 2.000 50.0 6.0 s" in " ".join(done.out.split())
    assert "small: began from elder@2" in done.out
    assert f"broken: damaged: {root}/runs/broken/config.json" in done.out
    assert "4/30,000" in done.out
    found = {one["name"]: one for one in json.loads(ddk("runs", root, "--json").out)}
    assert found["small"]["tokens_per_second"] == 50.0
    assert found["small"]["ancestry"] == ["elder@2"]
    assert (found["small"]["wall_seconds"], found["broken"]["state"]) == (6.0, "damaged")


def test_a_place_without_runs_is_refused(tmp_path: Path) -> None:
    assert "there are no runs below" in Ddk(tmp_path).refusal("runs", str(tmp_path))


def test_the_version(tmp_path: Path) -> None:
    assert Ddk(tmp_path)("--version").out.strip() == f"ddk {version('ddk-distill')}"


def test_what_a_real_run_took(small_run: SmallRun, tmp_path: Path) -> None:
    ddk = Ddk(tmp_path)
    # Other tests train further runs below the same root.
    runs = json.loads(ddk("runs", str(small_run.root), "--json").out)
    (found,) = [run for run in runs if run["name"] == "small"]
    assert (found["state"], found["steps"], found["training_tokens"]) == ("complete", 6, 6 * 8 * 96)
    rows = RunFolder(str(small_run.root), "small").metrics()
    # Loading, measurements, checkpoints and saving are in the one, and not in the other.
    assert found["training_seconds"] < sum(row["wall_seconds"] for row in rows) < found["wall_seconds"]
    assert all(row["seconds"] <= row["wall_seconds"] for row in rows)
    assert found["device"].startswith("CPU, ")
    inspected = ddk("inspect", str(small_run.run)).out
    assert "capture took: " in inspected
    assert "tokens/s on CPU, " in inspected
    planned = ddk("plan", small_run.config, "--cost").out
    assert "What it has taken so far" in planned
    measured = json.loads(ddk("plan", small_run.config, "--cost", "--json").out)["measured"]
    assert measured["capture"]["positions"] == 3 * 46 * 96
    assert 0.0 < measured["capture"]["seconds"] < 600.0
