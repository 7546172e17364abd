"""Ends processes that would outlive this one.

The processes of vLLM and torchrun outlive a front end that is killed with -9, and keep the GPU's memory from the next
one. Processes that we have started carry a mark in their environment, which they pass on to every process that they
start, in any session. A small separate process, the watcher, waits at the end of a pipe that only we hold open. If the
pipe closes without a message, we have died, and the watcher kills every process with the mark.

    descendants = Descendants()
    try:
        with descendants.marked():
            engine = Engine()
        ...
    finally:
        descendants.close()

`end_with_parent` is for the flow itself, whose worker may be killed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType

import psutil

MARK = "DDK_STARTED_BY"
_CLOSED = b"closed"
_SECONDS_TO_KILL = 60.0
"""After which the rest is left: a process that SIGKILL does not end hangs in the kernel."""


class Descendants:
    """All processes that are started with `environment`, and their children: they end at `close`, or with this process.

    Uses one small process until it is closed.
    """

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex
        # -P: this file's folder has modules with names of the standard library's. In a session of its own: Ctrl-C must
        # not take it along. Nor must the watcher of one that has started us: so without a mark.
        self._watcher = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", os.path.abspath(__file__), self._mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != MARK},
            start_new_session=True,
        )

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to be one of them."""
        # vLLM's processes give themselves titles, and without the second a title is written over the environment.
        return {MARK: self._mark, "SPT_NOENV": "1"}

    @contextlib.contextmanager
    def marked(self) -> Iterator[None]:
        """Within, every process that anybody here starts is one of them."""
        # Not this one, which Python starts with the first semaphore: it clears away what those that are killed have
        # left in shared memory, and ends when the last of them has.
        resource_tracker.ensure_running()
        with changed_environment(self.environment):
            yield

    def close(self, seconds: float = 0.0) -> None:
        """End those that are left, and the watching. Harmless when called twice, or where the watcher was killed.

        Args:
            seconds: that they have to end by themselves.
        """
        if self._watcher.stdin is None or self._watcher.stdin.closed:
            return
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and _bearers(self._mark):
                time.sleep(0.1)
        finally:
            _kill(self._mark, rounds=1)
            try:
                self._watcher.communicate(_CLOSED)
            except BrokenPipeError:
                self._watcher.wait()


@contextlib.contextmanager
def changed_environment(changes: dict[str, str]) -> Iterator[None]:
    """Within, `os.environ` has these; afterwards, what it had before."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def end_with_parent(
    seconds: float = 15.0, last_words: Callable[[], object] = lambda: None, seconds_for_words: float = 15.0
) -> None:
    """From now on this process ends once the one that started it is gone: by SIGTERM, so that it can clear up and say
    so, and `seconds` later in any case.

    Args:
        last_words: called if it has not ended by then (an exception raised by a signal is lost where Python ignores
            exceptions, and a busy machine may need longer); what it raises is ignored.
        seconds_for_words: after which it ends in the midst of them.
    """
    parent = os.getppid()
    _let_it_clear_up(parent)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        _write_to_nobody()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(seconds_for_words)
        os._exit(1)

    def say() -> None:
        with contextlib.suppress(Exception):
            last_words()

    threading.Thread(target=watch, name="ddk-end-with-parent", daemon=True).start()


def _let_it_clear_up(parent: int) -> None:
    """Prefect's engine turns SIGTERM into an exception, and sends the signal once more when that has come to the end of
    the outermost flow: the runner that sees the process die then reports the crash. Where the runner is gone too, the
    second signal does nothing, and the engine comes to its own report."""

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getppid() == parent:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)


def _write_to_nobody() -> None:
    """What is written to a pipe whose reader is gone fails, and Prefect's console (rich) ends the process at that,
    before the flow has said that it crashed."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                nobody = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nobody, descriptor)
                os.close(nobody)


def _bearers(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        # Those that end meanwhile, and other users'.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(process)
    return found


def _kill(mark: str, rounds: int) -> None:
    """Kill them until so many looks in a row have found none: one may just have started another."""
    deadline = time.monotonic() + _SECONDS_TO_KILL
    quiet = 0
    while quiet < rounds and time.monotonic() < deadline:
        found = _bearers(mark)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        quiet = 0 if found else quiet + 1
        if quiet < rounds:
            time.sleep(0.1)


def _watch(mark: str) -> None:
    front_end = os.getppid()
    # The pipe says it at once; the parent changes too where a forked process holds the pipe open.
    while os.getppid() == front_end:
        if select.select([0], [], [], 1.0)[0]:
            if os.read(0, len(_CLOSED)) == _CLOSED:
                return
            break
    _kill(mark, rounds=5)


if __name__ == "__main__":
    _watch(sys.argv[1])
