"""Runs Python programs that a model wrote, each in a process of its own that can do as little as possible.

`run_programs` runs programs that nobody has read. On Linux 5.14 or newer, as root or not, it guarantees:

- no network: the process has a network of its own in which no interface is up;
- no files: its root folder holds Python's standard library and shared libraries, read-only, and an empty writable
  folder in memory that is gone afterwards. The user's files, the system's settings, /proc and /sys are not there;
- no environment, no other processes to see or to signal, no other programs to start, no privileges and no way to get
  them, and no system calls but those on a list (`tasks.evaluation.sandbox_filter`);
- limits (`Limits`) of processor time, wall time, memory (in sum), file sizes and number of processes;
- no influence on the verdict: the tests of a `Program` run in their own sandbox, and the program's process holds
  neither their text nor the values that they expect (`tasks.evaluation.sandbox_talk`);
- when its time is over, or the process that started it has died, the kernel kills everything that it started.

It does not guarantee more: the kernel is shared, so a program that exploits a kernel bug is not contained; Python's
library and the shared libraries can be read; and memory is checked every 10 ms, so the limit may be exceeded for that
long. If a program is given without tests, 'passed' only means that it reached its end, by its own report.

If the kernel does not allow namespaces (some containers, Ubuntu's AppArmor), `check_isolation` says so and nothing is
run, unless the caller asks for `isolated=False`. Then only the empty environment, the folder, the limits by process,
the list of system calls (if the kernel supports it), the tests' own process and the killing of the process group
remain, and a program can read, write and send what the user can. `tasks.evaluation.sandbox_child` describes the
implementation.

bubblewrap uses the same namespaces and mounts of the kernel, so it fails where this fails. It leaves limits, the list
of system calls and the verdict to its caller, and is not installed on every machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ddk.errors import UserError
from tasks.evaluation.sandbox_filter import compiled

_CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one program."""

    cpu_seconds: int = 5
    """Of a process. What counts is processor time, so that a busy machine fails no program."""
    wall_seconds: float = 30.0
    """From start to end, whatever the program does; then everything is killed."""
    memory_bytes: int = 1 << 30
    """Of all its processes and files together, and the address space of each."""
    file_bytes: int = 16 << 20
    """Of one file."""
    folder_bytes: int = 64 << 20
    """Of all files."""
    processes: int = 8
    """Threads count among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program that nobody has read, and the tests that say whether it is right."""

    code: str
    tests: str
    """Run in a sandbox of their own; what they name and do not have themselves is the program's."""
    setup: str = ""
    """Run before the tests, where they run."""
    entries: tuple[str, ...] = ()
    """Names that are the program's in the tests, even where Python or its library has such a name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """Its tests came to their end without an exception; where it has none, it did."""
    reason: str
    """'passed', the name of the exception, 'killed' (a limit, or it ended itself), 'out of memory', 'out of time'; or
    'refused: …' where the isolation could not be had, and the program was not run."""


def run_programs(
    programs: Sequence[Program | str], limits: Limits | None = None, *, isolated: bool = True
) -> list[Outcome]:
    """Run the programs, as many at a time as there are processors, and say of each how it ended.

    Raises:
        UserError: isolation is not possible; nothing was run.
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
            f"run it without isolation on a machine that holds nothing of value (--allow-code-unisolated)"
        )


def run_program(program: Program | str, limits: Limits, *, isolated: bool = True) -> Outcome:
    """Run one program to its end, or to the end of its time.

    Args:
        program: a text has no tests; see the module.
    """
    if sys.platform != "linux":
        return Outcome(False, f"refused: programs are run on Linux only, and this is {sys.platform}")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ddk-sandbox-", ignore_cleanup_errors=True))
        job = {**asdict(limits), "isolated": isolated, "filter": compiled(), "tests": None}
        end = time.monotonic() + limits.wall_seconds
        ours, theirs = map(stack.enter_context, socket.socketpair())
        if isinstance(program, str):
            word = secrets.token_hex(16)
            ours.sendall(word.encode())
            alone = stack.enter_context(
                _Sandbox(folder, "program", {**job, "program": program, "talks": False}, theirs)
            )
            late = not alone.wait(end)
            return _outcome(_said(ours), word, [alone], late=late)
        job |= {"talks": True}
        verdict, writing = map(stack.enter_context, socket.socketpair())
        about_tests = {"tests": program.tests, "setup": program.setup, "entries": program.entries}
        code = stack.enter_context(_Sandbox(folder, "program", {**job, "program": program.code}, theirs))
        tests = stack.enter_context(_Sandbox(folder, "tests", {**job, **about_tests}, ours, verdict=writing))
        late = not tests.wait(end)
        return _outcome(_said(verdict), True, [tests, code], late=late)


class _Sandbox:
    """One process, everything that it starts, and what is known of it. All of it is killed when the context ends.

    Args:
        job: what `tasks.evaluation.sandbox_child` is to do.
        out: the descriptor that is left to what runs inside; closed here.
        verdict: another one, likewise.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        job: Mapping[str, Any],
        out: socket.socket,
        verdict: socket.socket | None = None,
    ) -> None:
        root = os.path.join(folder, name)
        os.mkdir(root)
        self._ours, status = socket.socketpair()
        given = {"out": out, "status": status, **({"verdict": verdict} if verdict is not None else {})}
        numbers = {key: one.fileno() for key, one in given.items()}
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=root,
            env={},
            pass_fds=tuple(numbers.values()),
            start_new_session=True,
        )
        for one in given.values():
            one.close()
        user = 2_000_000_000 + secrets.randbelow(1_000_000)  # that nobody has; limits of processes are by user
        content = json.dumps({**job, **numbers, "root": root, "user": user}).encode()
        if (stdin := self._process.stdin) is not None:
            with contextlib.suppress(BrokenPipeError), stdin:
                stdin.write(content)

    def __enter__(self) -> _Sandbox:
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()
        self._ours.close()

    def wait(self, end: float) -> bool:
        """Whether it has ended before this time (monotonic)."""
        try:
            self._process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        # Also where it has ended: without isolation, what it started may go on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def status(self) -> dict[str, Any]:
        """What those of its processes say that the program has no hold of: refused, or out of memory."""
        self.kill()
        return _said(self._ours)


def _said(channel: socket.socket) -> dict[str, Any]:
    """The first line there. Without waiting: what escaped its group may hold the other end open."""
    channel.setblocking(False)
    try:
        content = channel.recv(1 << 16)
    except OSError:
        content = b""
    try:
        said = json.loads(content.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _outcome(said: Mapping[str, Any], passed: str | bool, sandboxes: Sequence[_Sandbox], *, late: bool) -> Outcome:
    """What the verdict comes to.

    Args:
        said: by the program, or by its tests.
        passed: what says that it passed.
    """
    for status in [sandbox.status() for sandbox in sandboxes]:
        if "refused" in status:
            return Outcome(False, f"refused: {status['refused']}")
        if "failed" in status:
            return Outcome(False, str(status["failed"]))
    if said.get("passed") == passed:
        return Outcome(True, "passed")
    if late:
        return Outcome(False, "out of time")
    # A name that a program gave its exception, or wrote there: it comes into tables and pages.
    reason = str(said.get("failed", "killed"))
    return Outcome(False, reason if re.fullmatch(r"[A-Za-z_]\w{0,63}", reason, re.ASCII) else "Exception")
