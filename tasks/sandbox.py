"""Runs Python programs that a model wrote, each in a process of its own that can do as little as possible.

`run_programs` is for programs that nobody has read. What holds, on Linux 5.14 or newer, as root or not:

- no network: the process has a network of its own in which no interface is up;
- no files: its root folder holds Python's standard library and shared libraries, read-only, and an empty writable
  folder in memory that is gone afterwards. The user's files, the system's settings, /proc and /sys are not there;
- no environment, no other processes to see or to signal, no privileges and no way to get them;
- limits (`Limits`) of processor time, wall time, memory, file sizes and number of processes;
- when its time is over, or whoever started it has died, everything that it started is killed by the kernel.

What does not: the kernel is shared, so a program that exploits a fault of it is not held; memory is limited by process
(times `Limits.processes`), not in sum; Python's library and the shared libraries can be read.

Where the kernel does not give namespaces (some containers, Ubuntu's AppArmor), `check_isolation` says so and nothing
is run, unless the caller asks for `isolated=False`: then only the empty environment, the folder, the limits and the
killing of the process group remain, and a program can read, write and send what the user can. See
`tasks.sandbox_child` for how it is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from ddk.errors import UserError

_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one program."""

    cpu_seconds: int = 5
    """Of a process. What counts is processor time, so that a busy machine fails no program."""
    wall_seconds: float = 30.0
    """From start to end, whatever the program does; then everything is killed."""
    memory_bytes: int = 1 << 30
    """Address space of a process."""
    file_bytes: int = 16 << 20
    """Of one file."""
    folder_bytes: int = 64 << 20
    """Of all files."""
    processes: int = 8
    """Threads count among them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It came to its end without an exception."""
    reason: str
    """'passed', the name of the exception, 'killed' (a limit, or it ended itself), 'out of time'; or 'refused: …'
    where the isolation could not be had, and the program was not run."""


def run_programs(programs: Sequence[str], limits: Limits | None = None, *, isolated: bool = True) -> list[Outcome]:
    """Run the programs, as many at a time as there are processors, and say of each how it ended.

    Raises:
        UserError: the isolation cannot be had; nothing was run.
    """
    if isolated and programs:
        check_isolation()
    limits = limits or Limits()
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as executor:
        return list(executor.map(lambda program: run_program(program, limits, isolated=isolated), programs))


def check_isolation() -> None:
    """That this machine lets a program be isolated.

    Raises:
        UserError: it does not; what was refused and what to do about it are named.
    """
    outcome = run_program("pass", Limits())
    if not outcome.passed:
        raise UserError(
            f"the code that models wrote cannot be isolated on this machine ({outcome.reason}), so none was run; allow "
            f"user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces above 0, "
            f"kernel.apparmor_restrict_unprivileged_userns=0; in a container --security-opt seccomp=unconfined), or "
            f"run it without isolation where nothing can be lost (--allow-code-unisolated)"
        )


def run_program(program: str, limits: Limits, *, isolated: bool = True) -> Outcome:
    """Run one program to its end, or to the end of its time."""
    if sys.platform != "linux":
        return Outcome(False, f"refused: programs are run on Linux only, and this is {sys.platform}")
    word = secrets.token_hex(16)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="ddk-sandbox-", ignore_cleanup_errors=True) as folder:
        job = {**asdict(limits), "program": program, "word": word, "out": writing, "isolated": isolated, "root": folder}
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        try:
            process.communicate(json.dumps(job).encode(), timeout=limits.wall_seconds)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill_group(process)
        said = _said(reading)
    return _outcome(said, word, late=late)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Also where it has ended: without isolation, what it started may go on.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _said(reading: int) -> dict[str, str]:
    """The first line in the pipe. Without waiting: what escaped its group may hold the other end open."""
    os.set_blocking(reading, False)
    try:
        content = os.read(reading, 1 << 16)
    except BlockingIOError:
        content = b""
    finally:
        os.close(reading)
    try:
        said = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _outcome(said: dict[str, str], word: str, *, late: bool) -> Outcome:
    if "refused" in said:
        return Outcome(False, f"refused: {said['refused']}")
    if said.get("passed") == word:
        return Outcome(True, "passed")
    if late:
        return Outcome(False, "out of time")
    return Outcome(False, str(said.get("failed", "killed")))
