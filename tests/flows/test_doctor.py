from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from repository import REPOSITORY
from small_run import Ddk

from flows.commands import doctor
from tasks.diagnosis import numerics
from tasks.diagnosis.result import Found


def test_the_command(ddk: Ddk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("training_step", "collectives"):
        monkeypatch.setattr(numerics, name, lambda: Found("ok", "as it should be"))
    monkeypatch.setattr(numerics, "capture", lambda folder: Found("ok", "as it should be"))
    config = str(REPOSITORY / "flows" / "presets" / "quickstart.yaml")
    done = ddk("doctor", config, "--root", str(tmp_path / "root"))
    assert done.code == 0, done.out
    assert "ok    models and data   teacher, student and corpora fit; 11 of 11 stages are to be done" in done.out
    assert "ok    what it needs" in done.out
    done = ddk("doctor", str(tmp_path / "none.yaml"), "--json")
    assert done.code == 1
    said = json.loads(done.out)
    assert said["ok"] is False
    assert [one["name"] for one in said["checks"] if one["state"] == "fail"] == ["configuration"]
    assert str(tmp_path) not in done.out
    assert os.path.expanduser("~") not in done.out
    assert doctor._lock() == str(REPOSITORY / "requirements" / "cpu.txt")
