"""Calls that wait for a child process which dies; and what a killed engine leaves behind."""

from __future__ import annotations

import glob
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddk.errors import LostPartError
from tasks.teachers import leftovers, vllm_engine
from tasks.teachers.leftovers import EngineFolder
from tasks.teachers.vllm_engine import engine_died
from tasks.teachers.watched_calls import ChildDiedError, WatchedCalls


def start(seconds: float = 600, code: int = 0) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_live, args=(seconds, code))
    process.start()
    return process


def _live(seconds: float, code: int) -> None:
    time.sleep(seconds)
    os._exit(code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_call_ends_with_the_child_that_it_waits_for(number: int) -> None:
    calls = WatchedCalls()
    child = calls(start)
    assert calls(lambda: "an answer") == "an answer"
    assert child.pid is not None
    looks: list[list[int]] = []
    calls.on_look = looks.append
    threading.Timer(0.7, os.kill, (child.pid, number)).start()
    with pytest.raises(ChildDiedError, match=f"killed by signal {number}"):
        calls(threading.Event().wait)
    # One, where it has ended in the middle of a look.
    assert looks.count([]) <= 1, "the first look at a process that has ended notices it; nothing waits for a time-out"
    assert looks.count([child.pid]) >= 1
    with pytest.raises(ChildDiedError):
        calls(lambda: "nobody is there to carry it out")
    calls.close()


def test_an_error_of_the_call_itself_stays_unless_the_child_was_killed() -> None:
    calls = WatchedCalls()

    def fail() -> None:
        raise KeyError("what it says itself")

    child = calls(start)
    with pytest.raises(KeyError):
        calls(fail)
    child.kill()
    child.join()
    with pytest.raises(ChildDiedError, match="signal 9"):
        calls(fail)
    calls.close()


def test_a_helper_that_is_done_with_its_work_is_no_loss() -> None:
    calls = WatchedCalls()
    children = [calls(start), calls(start, 0.0)]
    children[1].join()
    assert calls(lambda: time.sleep(1.2)) is None
    children[0].kill()
    children[0].join()
    calls.close()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (-9, r"killed by signal 9; probably the machine was out of memory \(`dmesg`.*lower teacher.max_batch_tokens"),
        (-7, "signal 7; probably /dev/shm is full"),
        (-11, "signal 11; its last lines above say more"),
        (1, "exit code 1; its last lines above"),
    ],
)
def test_an_engines_end_is_one_line_with_a_remedy(code: int, says: str) -> None:
    error = engine_died(code)
    assert isinstance(error, LostPartError)
    assert "\n" not in str(error)
    with pytest.raises(LostPartError, match=says):
        raise error


def test_vllms_words_of_an_engine_that_was_killed_at_its_start() -> None:
    words = "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': -9}"
    found = vllm_engine._FAILED_AT_START.search(words)
    assert found is not None
    assert found[1] == "-9"


OWNER = """
import os, sys
from tasks.teachers.leftovers import EngineFolder
folder = EngineFolder()
open(os.path.join(folder.path, "a-socket"), "w").close()
for name in sys.argv[1:]:
    with open(name, "w") as file:
        file.write("x")
        folder.list_file(name, os.fstat(file.fileno()).st_ino)
print(folder.path, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for temporary files with a path that a socket's has room for."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def test_what_the_killed_leave_is_cleared_away_at_the_next_start_and_nothing_else(place: str) -> None:
    shared = [f"{leftovers.SHARED_MEMORY}/psm_ddk{os.getpid()}{name}" for name in ("gone", "another", "alive")]
    environment = {**os.environ, "TMPDIR": place}

    def owner(*names: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    (dead, of_dead), (alive, of_alive) = owner(*shared[:2]), owner(shared[2])
    try:
        assert {of_dead, of_alive} == set(glob.glob(f"{place}/*"))
        dead.kill()
        dead.wait()
        os.unlink(shared[1])
        Path(shared[1]).with_suffix(".new").write_text("y")
        os.rename(f"{shared[1]}.new", shared[1])  # the same name, another's content
        ours = EngineFolder()
        assert set(glob.glob(f"{place}/*")) == {of_alive, ours.path}
        assert os.path.exists(os.path.join(of_alive, "a-socket"))
        assert [os.path.exists(name) for name in shared] == [False, True, True]
        ours.remove()
        ours.remove()
        assert glob.glob(f"{place}/*") == [of_alive]
    finally:
        for process in (dead, alive):
            process.kill()
            process.communicate()
        for name in shared:
            Path(name).unlink(missing_ok=True)


def test_shared_memory_that_a_process_has_mapped_is_listed_and_weights_are_not(place: str) -> None:
    names = [f"{leftovers.SHARED_MEMORY}/{name}{os.getpid()}" for name in ("psm_ddk", "weights-")]
    code = f"""if True:
        import mmap
        files = [open(name, "r+b") for name in {names}]
        mapped = [mmap.mmap(file.fileno(), 9) for file in files]
        print(flush=True)
        input()
    """
    for name in names:
        Path(name).write_bytes(b"x" * 9)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    folder = EngineFolder()
    try:
        assert process.stdout is not None
        process.stdout.readline()
        folder.list_shared_memory([process.pid])
        listed = Path(folder.path, "shared-memory").read_text()
        assert listed == f"{os.stat(names[0]).st_ino} {names[0]}\n"
    finally:
        process.kill()
        process.communicate()
        folder.remove()
        for name in names:
            os.unlink(name)
