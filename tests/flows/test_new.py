"""`ddk new`, and a quickstart.yaml that was copied elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_run import ASSETS, Ddk

from flows.config import load_config

PRESETS = ASSETS.parent


def test_a_configuration_of_one_s_own(tmp_path: Path) -> None:
    ddk, path = Ddk(tmp_path), tmp_path / "my run.yaml"
    done = ddk("new", str(path))
    assert done.code == 0, done.err
    config = load_config(str(path))
    assert (config.run, config.root) == ("my-run", str(tmp_path / "my-run-run"))
    assert set(config.domains) == {"web", "code"}
    lines = path.read_text().splitlines()
    named = [line for line in done.out.splitlines() if line.startswith("change    line ")]
    assert len(named) == sum("# CHANGE" in line for line in lines) == 5
    for line in named:
        number, _, what = line.removeprefix("change    line ").partition(": ")
        assert lines[int(number) - 1].strip() == what
    before = path.read_bytes()
    assert "exists and is not overwritten" in ddk.refusal("new", str(path))
    assert "exists and is not overwritten" in ddk.refusal("new", str(path), "--preset", "quickstart")
    assert path.read_bytes() == before
    # What is still to be changed is said where it is looked for.
    models = [f"{who}.model={ASSETS / who}" for who in ("teacher", "student")]
    given = [word for one in (*models, "packing.seq_len=256") for word in ("--set", one)]
    assert "domain 'web'" in ddk.refusal("plan", str(path), *given)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_with_a_run_of_its_own(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "mine.yaml"
    assert Ddk(tmp_path)("new", str(path), "--preset", preset).code == 0
    found, original = load_config(str(path)), load_config(str(PRESETS / f"{preset}.yaml"))
    assert found.run == "mine"
    assert found.model_dump(exclude={"run", "root"}) == original.model_dump(exclude={"run", "root"})


def test_a_copied_quickstart_works_wherever_it_lies(tmp_path: Path) -> None:
    path = shutil.copy(PRESETS / "quickstart.yaml", tmp_path / "copied.yaml")
    found = load_config(str(path))
    assert found.teacher.model == str(ASSETS / "teacher")
    assert list(found.domains["math"].train) == [str(ASSETS / "corpora" / "math" / "train.jsonl.gz")]
    # A folder of that name beside it comes first.
    (tmp_path / "quickstart" / "teacher").mkdir(parents=True)
    assert load_config(str(path)).teacher.model == str(tmp_path / "quickstart" / "teacher")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    ddk = Ddk(tmp_path)
    assert "there is no preset 'none'; there are " in ddk.refusal("new", str(tmp_path / "a.yaml"), "--preset", "none")
    assert "cannot be written" in ddk.refusal("new", str(tmp_path / "nowhere" / "a.yaml"))
    assert not (tmp_path / "a.yaml").exists()
