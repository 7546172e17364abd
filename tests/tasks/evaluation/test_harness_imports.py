"""What stands in for what the harness's models name, and that nothing of it is left behind."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata

import pytest
from transformers.utils import is_accelerate_available

from tasks.evaluation.harness_imports import accelerate_unneeded, vllm_by_that_name
from tasks.teachers.config import engine_version


def test_accelerate_is_there_only_within_and_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    available = is_accelerate_available()
    with accelerate_unneeded():
        accelerator = importlib.import_module("accelerate").Accelerator
    assert "accelerate" not in sys.modules
    assert is_accelerate_available() == available
    with pytest.raises(
        ModuleNotFoundError, match=r"accelerate\.Accelerator is wanted, and accelerate is not installed"
    ):
        accelerator()


def test_the_version_of_either_build_of_vllm_is_found_under_its_name() -> None:
    version = metadata.version
    with vllm_by_that_name():
        assert metadata.version("vllm").split("+")[0] == engine_version()
        assert metadata.version("torch") == version("torch")
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("no-such-distribution")
    assert metadata.version is version
