"""The small run that the tests of the flows share."""

from __future__ import annotations

import pytest
from small_run import Ddk, SmallRun, write_config


@pytest.fixture(scope="session")
def ddk(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Ddk:
    return Ddk(tmp_path_factory.mktemp("prefect"), prefect_server)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """An uninterrupted `ddk distill`, with no server to report to."""
    folder = tmp_path_factory.mktemp("small")
    config = write_config(folder)
    output = Ddk(tmp_path_factory.mktemp("prefect"))("distill", config)
    assert output.code == 0, output.err
    return SmallRun(config, folder / "root", output)
