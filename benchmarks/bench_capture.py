"""What capture costs and what its cache weighs: `make bench-capture`, about ten minutes on two cores.

Ratios of medians, measured side by side: `capture_speed` (each shape in a process of its own, the ways of capturing
taking turns), `capture_size` (bytes and distortion beside DistillKit's), `capture_scale` (reading, rerunning, growing).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

import capture_scale
import capture_size
from harness import Row, publish, row, s3_server

HERE = os.path.dirname(os.path.abspath(__file__))
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
        # This checkout, whichever is installed.
        "PYTHONPATH": os.pathsep.join([os.path.dirname(HERE), HERE]),
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
