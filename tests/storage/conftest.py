"""Places to store things in, small stores, and processes that end by SIGKILL where a test wants them to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import deaths
import numpy as np
import pytest
from repository import REPOSITORY
from s3_proxy import S3Proxy

from storage.files import settings
from storage.files.s3 import S3
from storage.stores.layout import Kind
from storage.stores.manifest import StoreWriter
from storage.stores.schema import Manifest

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a folder of the test's own, on either kind of storage."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}"


@pytest.fixture
def s3_calls(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests to the S3 server from here on, by the name of the operation."""
    calls: list[str] = []
    original = S3._call_s3

    async def counting(self, method, *args, **kwargs):
        calls.append(method)
        return await original(self, method, *args, **kwargs)

    monkeypatch.setattr(S3, "_call_s3", counting)
    return calls


@pytest.fixture
def s3_proxy(s3_server: str) -> Iterator[S3Proxy]:
    """Between every later call of `storage` and the S3 server; see `tests/support/s3_proxy.py`."""
    with S3Proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        settings.use_options("s3", {"endpoint_url": proxy.url})
        yield proxy
        settings.use_options("s3", {})


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once, so that all eight attempts take no minute."""
    monkeypatch.setattr("botocore.retryhandler.delay_exponential", lambda *_, **__: 0.001)


class StoreMaker:
    """Random but fixed content for stores, and the shortest way to write it."""

    def arrays(self, kind: Kind, dims: Mapping[str, int], blocks: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng, seq_len = np.random.default_rng(seed), dims["seq_len"]
        if kind == "blocks":
            return {"tokens": rng.integers(0, dims["vocab_size"], (blocks, seq_len + 1), dtype=np.int32)}
        shape = (blocks, seq_len, dims["k"])
        return {
            "ids": rng.integers(0, dims["vocab_size"], shape, dtype=np.int32),
            "logprobs": -np.sort(rng.exponential(3.0, shape)).astype(np.float32),
            "tail_mass": rng.random(shape[:2], dtype=np.float32),
            "true_logprobs": -rng.exponential(2.0, shape[:2]).astype(np.float32),
        }

    def write_shards(self, writer: StoreWriter, content: Mapping[str, Arrays]) -> list[tuple[str, int]]:
        """Write what is not committed yet; returns which shards those were."""
        written = []
        step = writer.manifest.dims["shard_blocks"]
        for split, arrays in content.items():
            committed = writer.committed(split)
            for shard in range(-(-len(next(iter(arrays.values()))) // step)):
                if shard not in committed:
                    part = {name: data[shard * step : (shard + 1) * step] for name, data in arrays.items()}
                    writer.write_shard(split, shard, part, {"shard": shard})
                    written.append((split, shard))
        return written

    def write(
        self, url: str, kind: Kind, dims: Mapping[str, int], content: Mapping[str, Arrays], **inputs: Any
    ) -> Manifest:
        writer = StoreWriter(url, kind, inputs, dims)
        self.write_shards(writer, content)
        return writer.finish(facts={"seconds": 1.5})


@pytest.fixture
def maker() -> StoreMaker:
    return StoreMaker()


@pytest.fixture
def killed_at_each_rename() -> Callable[..., list[int]]:
    """`deaths.killed_at_each_rename` for code of the storage."""
    return partial(deaths.killed_at_each_rename, imports=("storage.runs.checkpoints", "storage.stores.manifest"))


@pytest.fixture
def killed_after_lines() -> Callable[..., None]:
    """Runs Python code in a process that is killed (-9) as soon as it has printed so many lines."""

    def run(code: str, *arguments: str, lines: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, env=os.environ.copy()
        )
        with process:
            for _ in range(lines):
                assert process.stdout.readline(), "it ended by itself"
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL

    return run


@pytest.fixture
def files_below() -> Callable[[str], dict[str, bytes]]:
    """Every file below a local folder, by its path."""

    def read(folder: str) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}

    return read
