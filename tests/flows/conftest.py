"""The small run that the tests of the flows share."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable

import pytest
from small_run import Ddk, Finished, SmallRun, write_config


@pytest.fixture(scope="session")
def ddk(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Ddk:
    return Ddk(tmp_path_factory.mktemp("prefect"), prefect_server)


@pytest.fixture
def ddk_error(ddk: Ddk) -> Callable[..., str]:
    """`ddk_error("pack", config)`: the line with which the command refuses."""
    return ddk.refusal


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """An uninterrupted `ddk distill`, with no server to report to, in a folder of this worker's own.

    It is made once for all workers, and copied: a test may add a run to its root.
    """
    own = tmp_path_factory.mktemp("small")
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    made, said = common / "small-run", common / "small-run.json"
    with open(f"{said}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            output = Ddk(tmp_path_factory.mktemp("prefect")).process("distill", write_config(made))
            assert output.code == 0, output.err
            said.write_text(json.dumps(dataclasses.asdict(output)))
    shutil.copytree(made, own, dirs_exist_ok=True)
    output = Finished(**json.loads(said.read_text().replace(str(made), str(own))))
    return SmallRun(str(own / "config.yaml"), own / "root", output)
