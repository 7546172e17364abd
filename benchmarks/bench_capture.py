"""What capture costs and what its cache weighs: `make bench-capture`, about ten minutes on two cores.

Ratios of medians, measured side by side: `capture_speed` (each shape in a process of its own, the ways of capturing
taking turns), `capture_size` (bytes and distortion beside DistillKit's), `capture_scale` (reading, rerunning, growing).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import capture_scale
import capture_size
from harness import Row, publish, row

ROUNDS = 5
BARS = {  # of the floor, of the users' way, of transformers, of the hook (portable)
    "4M": (0.78, 5.0, 2.0, 0.85),
    "30M": (0.85, 1.6, 2.0, 0.85),
    "wide": (0.6, 1.7, 2.0, None),
}
LABELS = {"4M": "4M, V = 4,096", "30M": "30M, V = 32,000", "wide": "20M, V = 151,936"}


def speed_rows(name: str) -> Iterator[Row]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.path.dirname(os.path.abspath(__file__)),
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable, capture_size.__file__.replace("capture_size", "capture_speed"), name, str(ROUNDS)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    floor, ours = median(found["floor"]), median(found["ours"])
    label, (of_floor, of_users, of_hf, of_hook) = LABELS[name], BARS[name]
    for path, what in (("bare", "bare prefill"), ("floor", "floor"), ("ours", "captured and stored")):
        yield row(f"{label}: {what}", found[path], "tokens/s")
    yield row(f"{label}: stored / floor", [one / floor for one in found["ours"]], "x", of_floor, ">")
    yield row(f"{label}: stored in one shard / floor", [one / floor for one in found["one_shard"]], "x")
    yield row(f"{label}: stored / prompt_logprobs", [ours / one for one in found["users"]], "x", of_users, ">")
    yield row(f"{label}: stored / transformers", [ours / one for one in found["transformers"]], "x", of_hf, ">")
    yield row(f"{label}: portable / stored", [one / ours for one in found["portable"]], "x", of_hook, ">")


@contextmanager
def s3_server() -> Iterator[str]:
    """A moto server on a free port of the loopback, with a bucket."""
    import socket

    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    server = os.path.join(os.path.dirname(sys.executable), "moto_server")
    process = subprocess.Popen(
        [server, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        for _ in range(100):
            try:
                boto3.client("s3").create_bucket(Bucket="bench")
                break
            except Exception:
                time.sleep(0.2)
        yield "s3://bench"
    finally:
        process.kill()
        process.wait()


def main() -> int:
    rows: list[Row] = []
    for name in SHAPES:
        rows += speed_rows(name)
    rows += capture_size.rows()
    rows += capture_scale.rerun_rows(ROUNDS)
    with s3_server() as url:
        rows += capture_scale.reading_rows(ROUNDS, url)
    rows += capture_scale.growth_rows()
    return 0 if publish("capture", "make bench-capture", rows) else 1


SHAPES = tuple(BARS)

if __name__ == "__main__":
    sys.exit(main())
