"""Places to store things in, small stores, and processes that end by SIGKILL where a test wants them to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_proxy import S3Proxy

from storage.files import settings
from storage.files.s3 import S3
from storage.stores.layout import Kind
from storage.stores.manifest import StoreWriter
from storage.stores.schema import Manifest

REPOSITORY = Path(__file__).parents[2]
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
def killed_at_each_rename(tmp_path: Path) -> Callable[..., list[int]]:
    """Runs Python code again and again, each time in a process that is killed (-9) just before one of its renames.

    The code finds the variable `folder`: `<folders>/<n>` in the process that dies at rename n, which is 1, 1 + every,
    and so on. Returns these numbers; the process after them ran to its end.
    """

    def run(code: str, folders: str, every: int = 1) -> list[int]:
        driver = tmp_path / "driver.py"
        driver.write_text(f"import sys\n\nsys.path.insert(0, {str(REPOSITORY)!r})\n{_DRIVER}")
        worker = tmp_path / "worker.py"
        worker.write_text(code)
        command = [sys.executable, str(driver), str(worker), folders, str(every)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return list(range(1, int(done.stdout), every))

    return run


# One process imports; a fork of it is what dies. Nothing has started a thread by then.
_DRIVER = """
import os
import signal

import storage.runs.checkpoints
import storage.stores.manifest

code = compile(open(sys.argv[1]).read(), sys.argv[1], "exec")
replace = os.replace
rename = 1
while True:
    child = os.fork()
    if child == 0:
        renames = 0

        def dying(source, target):
            global renames
            renames += 1
            if renames == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        exec(code, {"folder": f"{sys.argv[2]}/{rename}"})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    rename += int(sys.argv[3])
print(rename)
"""


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
