"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.running.descendants import MARK, Descendants

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

# As vLLM's and torchrun's are: sessions of their own, a title over what was there, a parent that has ended, and deaf to
# all that one may be deaf to.
TREE = f"""
import os, signal, subprocess, sys, time
import setproctitle
def start(code):
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)
setproctitle.setproctitle("TREE::Root")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
parent = start('''if True:
    import subprocess
    print(subprocess.Popen({SLEEP}, start_new_session=True, stdout=subprocess.DEVNULL).pid)
''')
orphan = int(parent.stdout.readline())
parent.wait()
print(os.getpid(), start("import time; time.sleep(600)").pid, orphan, flush=True)
time.sleep(600)
"""

HOLDER = f"""
import os, subprocess, sys, time
from tasks.running.descendants import Descendants
descendants, others = Descendants(), Descendants()
before = subprocess.Popen({SLEEP})
with descendants.marked():
    tree = subprocess.Popen([sys.executable, "-c", {TREE!r}], stdout=subprocess.PIPE, text=True)
after = subprocess.Popen({SLEEP})
other = subprocess.Popen({SLEEP}, env=os.environ | others.environment)
print(tree.stdout.readline().strip(), flush=True)
print(before.pid, after.pid, other.pid, flush=True)
if "fork" in sys.argv and os.fork() == 0:
    os.close(1)
    time.sleep(30)  # and holds every pipe
    os._exit(0)
sys.stdin.readline()
descendants.close()
descendants.close()
print("closed", flush=True)
sys.stdin.readline()
"""


class Holder:
    """A process that has started others, and those: with its mark, and without."""

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )
        self.marked = self._processes()
        self.before, self.after, self.of_another = self._processes()

    def _processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(number)) for number in self._line().split()]

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self._line() == "closed\n"

    def clear(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        for process in (*self.marked, self.before, self.after, self.of_another):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def holders() -> Iterator[list[Holder]]:
    made: list[Holder] = []
    yield made
    for holder in made:
        holder.clear()


def live(*processes: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    return False


def assert_gone(processes: list[psutil.Process], within: float = 20) -> None:
    assert not psutil.wait_procs(processes, timeout=within)[1]


def wait_for(path: Path, timeout: float = 20) -> str:
    deadline = time.monotonic() + timeout
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize("arguments", [(), ("fork",)], ids=["alone", "a fork of it lives on"])
def test_they_end_with_a_killed_parent_and_nobody_else_does(holders: list[Holder], arguments: tuple[str, ...]) -> None:
    holders += [killed := Holder(*arguments), another := Holder()]
    assert len(killed.marked) == 3
    assert live(*killed.marked)
    killed.kill()
    assert_gone([*killed.marked, killed.of_another])
    assert live(killed.before, killed.after, *another.marked, another.before, another.after, another.of_another)


def test_they_end_when_closed_and_nobody_else_does(holders: list[Holder]) -> None:
    holders.append(holder := Holder())
    holder.close()
    assert not any(live(process) for process in holder.marked if process.is_running())
    assert live(holder.before, holder.after, holder.of_another)


def test_those_of_one_that_is_itself_one_of_them_end_too(holders: list[Holder]) -> None:
    """Their watcher must outlive its holder, which another's watcher kills."""
    outer = Descendants()
    try:
        holders.append(inner := Holder(environment=outer.environment))
    finally:
        outer.close()
    assert inner.process.wait(timeout=20) == -signal.SIGKILL
    assert_gone([*inner.marked, inner.of_another, inner.before, inner.after])


def test_who_is_given_time_may_end_by_itself(tmp_path: Path) -> None:
    descendants = Descendants()
    script = f"import time; time.sleep(1); open({str(tmp_path / 'said')!r}, 'w').write('goodbye')"
    started = subprocess.Popen([sys.executable, "-c", script], env=os.environ | descendants.environment)
    descendants.close(60)
    assert started.wait() == 0
    assert (tmp_path / "said").read_text() == "goodbye"


def test_the_environment_is_put_back_and_no_helper_of_ours_is_marked() -> None:
    before = dict(os.environ)
    descendants = Descendants()
    with descendants.marked():
        assert os.environ[MARK]
        here = subprocess.Popen(SLEEP)
    try:
        assert dict(os.environ) == before
        # Not one of another test's that has ended and was not asked for its exit code yet.
        children = [child for child in psutil.Process().children() if live(child)]
        assert [child.pid for child in children if MARK in child.environ()] == [here.pid]
        assert any("resource_tracker" in " ".join(child.cmdline()) for child in children)
    finally:
        descendants.close()
    assert here.wait(timeout=5) == -signal.SIGKILL


def test_a_watcher_that_was_killed_does_not_keep_anybody() -> None:
    descendants = Descendants()
    here = subprocess.Popen(SLEEP, env=os.environ | descendants.environment)
    descendants._watcher.kill()
    descendants._watcher.wait()
    descendants.close()
    assert here.wait(timeout=5) == -signal.SIGKILL


# A flow as its worker starts it; a worker that is killed.
FLOW = """
import os, pathlib, signal, sys, time
from tasks.running.descendants import end_with_parent
said = pathlib.Path(sys.argv[1])
class Terminated(BaseException): pass
def terminate(*_): raise Terminated
kind = sys.argv[2]
if kind != "as Prefect":
    signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "deaf" else terminate)
end_with_parent(2.0, lambda: said.write_text("last words"))
if kind == "as Prefect":
    before = signal.signal(signal.SIGTERM, terminate)
said.write_text("running")
try:
    time.sleep(600)
finally:
    if kind == "as Prefect":  # its runner is to see it die of the signal
        signal.signal(signal.SIGTERM, before)
        os.kill(os.getpid(), signal.SIGTERM)
    said.write_text("cleared up")
"""
WORKER = "import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())"


def test_it_dies_of_sigterm_as_ever_while_its_parent_lives(tmp_path: Path) -> None:
    said = tmp_path / "said"
    flow = subprocess.Popen([sys.executable, "-c", FLOW, str(said), "as Prefect"])
    assert wait_for(said) == "running"
    flow.terminate()
    assert flow.wait(timeout=20) == -signal.SIGTERM
    assert said.read_text() == "running"


@pytest.mark.parametrize(
    ("hears", "leaves"), [("hears", "cleared up"), ("as Prefect", "cleared up"), ("deaf", "last words")]
)
def test_a_process_ends_with_its_parent_in_order_where_it_can(hears: str, leaves: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    worker = subprocess.Popen([sys.executable, "-c", WORKER, "-c", FLOW, str(said), hears])
    assert wait_for(said) == "running"
    (flow,) = psutil.Process(worker.pid).children()
    time.sleep(1.5)
    assert live(flow), "not as long as its parent lives"
    worker.kill()
    worker.wait()
    assert_gone([flow])
    assert said.read_text() == leaves
