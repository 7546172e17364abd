"""The version of vLLM as the harness asks for it, and that nothing is left behind."""

from __future__ import annotations

from importlib import metadata

import pytest

from tasks.evaluation.harness_imports import vllm_by_that_name
from tasks.teachers.config import engine_version


def test_the_version_of_either_build_of_vllm_is_found_under_its_name() -> None:
    version = metadata.version
    with vllm_by_that_name():
        assert metadata.version("vllm").split("+")[0] == engine_version()
        assert metadata.version("torch") == version("torch")
        with pytest.raises(metadata.PackageNotFoundError):
            metadata.version("no-such-distribution")
    assert metadata.version is version
