"""Ends processes that would outlive this one.

vLLM's processes outlive a front end that was killed with -9, and hold the GPU's memory against the next one. A small
process of its own waits at the end of a pipe that only we hold open: when it closes without a word, we are gone, and
it kills what it was told to. (Where code of ours runs inside the engine, that does it: `tasks.vllm_worker.end_with`.)

    with Engine() as engine:
        orphans = Orphans(process_ids)
        ...
    orphans.close()
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable

_CLOSED = b"closed"


class Orphans:
    """Kills the processes once this one is gone, unless it is closed before."""

    def __init__(self, process_ids: Iterable[int]) -> None:
        # Isolated: this file's folder has modules with names of the standard library's. In a session of its own:
        # Ctrl-C must not take it along.
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), *map(str, process_ids)]
        self._watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603

    def close(self) -> None:
        """Let them be. Harmless when called twice, and where the watcher was killed itself."""
        if self._watcher.stdin is not None and not self._watcher.stdin.closed:
            try:
                self._watcher.communicate(_CLOSED)
            except BrokenPipeError:
                self._watcher.wait()


def _watch(process_ids: list[int]) -> None:
    if sys.stdin.buffer.read() == _CLOSED:
        return
    for process_id in process_ids:
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    _watch([int(argument) for argument in sys.argv[1:]])
