"""Calls that wait for a child process, and that raise an error if it has died instead of waiting for ever.

vLLM's front end waits for its engine on a queue that is never filled again once the engine is gone, for example killed
by the kernel when memory ran out. Therefore such calls are made in a separate thread, always the same one, while the
calling thread watches the processes by their handles, without a timeout.

    calls = WatchedCalls()
    llm = calls(LLM, model=...)              children that are started within a call are watched from then on
    calls(llm.wait_for_completion)           ChildDiedError, where one of them has ended

The thread of a call that never comes back ends with this process.
"""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_OF_GRACE = 5.0
"""For a call to say itself why a process has ended, where that was no signal."""
_T = TypeVar("_T")


class ChildDiedError(RuntimeError):
    """A child process has ended, and with it a call that needs it.

    Args:
        exit_code: as `multiprocessing` has it: −9 after signal 9.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"it {ending(exit_code)}")
        self.exit_code = exit_code


def ending(exit_code: int) -> str:
    """`−9` → `was killed by signal 9`; `1` → `ended with exit code 1`."""
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"


class WatchedCalls:
    """See the module. For one caller at a time."""

    def __init__(self) -> None:
        self.on_look: Callable[[list[int]], None] = lambda children: None
        """Called at every look, while a call is under way, with the process ids of the children."""
        self._others = set(multiprocessing.active_children())
        self._children: set[BaseProcess] = set()
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ddk-watched-calls", daemon=True)
        self._thread.start()
        self._stuck = False

    def __call__(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """What the call returns or raises.

        Raises:
            ChildDiedError: a child has ended, and the call does not come back, or failed after a signal to the child.
        """
        if self._stuck:
            raise ChildDiedError(next((code for code in self._exit_codes()), 0))
        future: Future[_T] = Future()
        self._asked.put(lambda: _carry_out(future, function, args, kwargs))
        self._stuck = True  # also where this wait is interrupted
        code = self._wait(future)
        self._stuck = code is not None
        self._note_children()
        if code is not None:
            raise ChildDiedError(code)
        if (error := future.exception()) is not None:
            # By SIGTERM whoever failed has ended them himself.
            for killed_by in (code for code in self._exit_codes() if code < 0 and code != -signal.SIGTERM):
                raise ChildDiedError(killed_by) from error
        return future.result()

    def close(self) -> None:
        """The thread ends, where no call is stuck. Harmless when called twice."""
        self._asked.put(None)

    @property
    def children(self) -> list[int]:
        """Process ids of the children that live."""
        return [child.pid for child in self._children if child.pid is not None and child.exitcode is None]

    @property
    def stuck(self) -> bool:
        """Whether a call has not come back: no other can be made."""
        return self._stuck

    def _wait(self, future: Future[Any]) -> int | None:
        """Until the call has come back (None), or never will: then the exit code of the child that has died."""
        while not wait([future], _SECONDS_BETWEEN_LOOKS).done:
            codes = self._exit_codes()
            if codes:
                # It may be about to say more than that.
                return None if wait([future], _SECONDS_OF_GRACE if codes[0] >= 0 else 0.0).done else codes[0]
            self.on_look(self.children)
        return None

    def _exit_codes(self) -> list[int]:
        """Of the children that have ended, signals first; a helper that is done with its work is none of them."""
        self._note_children()
        codes = sorted(child.exitcode for child in self._children if child.exitcode is not None)
        return codes if len(codes) == len(self._children) else [code for code in codes if code != 0]

    def _note_children(self) -> None:
        self._children |= set(multiprocessing.active_children()) - self._others

    def _work(self) -> None:
        while (call := self._asked.get()) is not None:
            call()


def _carry_out(future: Future[Any], function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    try:
        future.set_result(function(*args, **kwargs))
    except BaseException as error:  # handed over, not handled
        future.set_exception(error)
