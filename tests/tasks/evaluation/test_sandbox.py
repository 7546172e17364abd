"""What a program that nobody has read can and cannot do in the sandbox: tried with programs that do their worst.

Whether a program passes is its own verdict: it asserts what it finds, from the inside.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ddk.errors import UserError
from tasks.evaluation.code_execution import executed, program_of, read_back, stored
from tasks.evaluation.sandbox import Limits, Outcome, Program, check_isolation, run_program, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux's namespaces")

SOON = Limits(cpu_seconds=1, wall_seconds=60)
"""Processor time is short; wall time is long enough for a machine that does much else."""


def run(program: str, limits: Limits = SOON, *, isolated: bool = True) -> Outcome:
    return run_program(textwrap.dedent(program), limits, isolated=isolated)


def test_this_machine_can_isolate() -> None:
    # Else every test below would pass for the wrong reason: a refusal is no success, but no proof either.
    check_isolation()


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("x = sum(range(10))\nassert x == 45", Outcome(True, "passed")),
        ("import math, re, heapq, hashlib, itertools, collections, json, decimal", Outcome(True, "passed")),
        ("assert 1 == 2", Outcome(False, "AssertionError")),
        ("def f(:", Outcome(False, "SyntaxError")),
        ("raise SystemExit(0)", Outcome(False, "SystemExit")),
        ("import os\nos._exit(0)", Outcome(False, "killed")),
        ("import sys\nsys.setrecursionlimit(10)\ndef f(): f()\nf()", Outcome(False, "RecursionError")),
        ("print('x' * 10**6)", Outcome(True, "passed")),
    ],
)
def test_how_a_program_ends(program: str, outcome: Outcome) -> None:
    assert run(program) == outcome


def test_an_endless_loop_ends_when_its_processor_time_is_used_up() -> None:
    assert run("while True: pass") == Outcome(False, "killed")


def test_a_program_that_sleeps_ends_when_its_wall_time_is_over() -> None:
    # For longer than a test may take: whoever waited for it would not come back in time.
    assert run("import time\ntime.sleep(100_000)", Limits(wall_seconds=3)) == Outcome(False, "out of time")


def test_a_memory_bomb_fails_alone() -> None:
    limits = Limits(memory_bytes=256 << 20, cpu_seconds=20)
    assert run("x = bytearray(1 << 30)", limits) == Outcome(False, "MemoryError")
    assert run("x = []\nwhile True: x.append(bytes(1 << 20))", limits) == Outcome(False, "MemoryError")


def test_a_fork_bomb_stays_small_and_leaves_nothing_behind() -> None:
    program = """
        import os, time
        started = 0
        try:
            while started < 100:
                if os.fork() == 0:
                    os.setsid()
                    time.sleep(1000)
                started += 1
        except BlockingIOError:
            pass
        assert 0 < started <= 8, started
    """
    before = _running()
    assert run(program) == Outcome(True, "passed")
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert not run(bomb, Limits(cpu_seconds=2, wall_seconds=3)).passed
    _until(lambda: _running() - before, 0)


@pytest.fixture(autouse=True)
def _adopt_orphans() -> Iterator[None]:
    """A process whose parent has died becomes a child of this one, so that `_running` sees it."""
    libc, child_subreaper = ctypes.CDLL(None), 36
    assert libc.prctl(child_subreaper, 1, 0, 0, 0) == 0
    yield
    libc.prctl(child_subreaper, 0, 0, 0, 0)


def _running(parent: int | None = None) -> set[psutil.Process]:
    """Everything that a process has started and that has not ended."""
    found = psutil.Process(parent).children(recursive=True)
    return {process for process in found if _status(process) not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)}


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)


def _until(found: Callable[[], set[psutil.Process]], count: int) -> set[psutil.Process]:
    deadline = time.monotonic() + 60
    while len(processes := found()) != count:
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)
    return processes


def test_there_is_no_file_of_the_user_and_no_way_to_write_but_in_memory(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    program = f"""
        import os
        home = {os.path.expanduser("~")!r}
        places = [{str(secret)!r}, home + "/.netrc", {os.getcwd()!r}, "/etc/passwd", "/proc", "/sys"]
        assert not [place for place in places if os.path.exists(place)]
        for place in ("/x", "/usr/lib/x", "/dev/x", os.path.dirname(os.__file__) + "/x.py"):
            try:
                open(place, "w")
            except OSError:
                continue
            raise AssertionError(place)
        open("here.txt", "w").write("allowed")
        assert os.listdir(".") == ["here.txt"] and os.path.samefile(".", "/tmp")
    """
    assert run(program) == Outcome(True, "passed")
    assert secret.read_text() == "token"


def test_the_folder_in_memory_is_bounded() -> None:
    program = """
        for i in range(40):
            open(str(i), "wb").write(bytes(4 << 20))
    """
    assert run(program, Limits(folder_bytes=16 << 20)) == Outcome(False, "OSError")
    assert run("open('x', 'wb').write(bytes(32 << 20))") == Outcome(False, "OSError"), "one file has its limit too"


def test_there_is_no_network_not_even_to_this_machine() -> None:
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        server.listen()
        name = f"\0ddk-test-{os.getpid()}"
        local.bind(name)
        local.listen()
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # from here it can be reached
        program = f"""
            import socket
            for kind, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, {name!r})):
                try:
                    socket.socket(kind).connect(address)
                except OSError:
                    continue
                raise AssertionError(address)
            datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                datagram.sendto(b"x", ("192.0.2.1", 53))
            except OSError:
                pass
            else:
                raise AssertionError("sent")
        """
        assert run(program) == Outcome(True, "passed")


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    program = """
        import os
        assert not [value for value in os.environ.values() if "hunter2" in value]
        assert set(os.environ) <= {"LC_CTYPE"}, set(os.environ)
    """
    assert run(program) == Outcome(True, "passed")
    assert run(program, isolated=False) == Outcome(True, "passed")


def test_other_processes_are_out_of_sight_and_privileges_out_of_reach() -> None:
    program = """
        import ctypes, os, signal
        assert os.getppid() == 1 and os.getuid() != 0
        os.kill(1, signal.SIGKILL)  # number 1 of a namespace cannot be killed from within
        for process in range(3, 2000):
            try:
                os.kill(process, 0)
            except ProcessLookupError:
                continue
            raise AssertionError(process)
        libc = ctypes.CDLL(None, use_errno=True)
        refused = {
            "user namespace": libc.unshare(0x10000000),
            "mount namespace": libc.unshare(0x00020000),
            "mount": libc.mount(b"none", b"/work", b"tmpfs", 0, None),
            "unmount": libc.umount2(b"/work", 2),
            "ptrace": libc.ptrace(16, 1, 0, 0),
        }
        assert all(result == -1 for result in refused.values()), refused
        for call in (lambda: os.setuid(0), lambda: os.chroot("/work")):
            try:
                call()
            except OSError:
                continue
            raise AssertionError("allowed")
    """
    assert run(program) == Outcome(True, "passed")


def test_no_descriptor_of_ours_is_open_inside() -> None:
    program = """
        import os
        found = []
        for descriptor in range(256):
            try:
                found.append(os.fstat(descriptor).st_mode)
            except OSError:
                pass
        # Standard input, output and error (/dev/null), and the pipe for the verdict.
        assert len(found) == 4, found
    """
    assert run(program) == Outcome(True, "passed")


def test_a_program_cannot_say_that_it_passed() -> None:
    program = """
        import os
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b'{"passed": "guess"}\\n')
            except OSError:
                pass
        os._exit(0)
    """
    assert run(program) == Outcome(False, "killed")


def test_a_killed_caller_takes_its_programs_along(tmp_path: Path) -> None:
    caller = (
        "from tasks.evaluation.sandbox import Limits, run_program\n"
        "print('started', flush=True)\n"
        "run_program('import time\\nwhile True: time.sleep(1)', Limits(wall_seconds=600))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", caller], stdout=subprocess.PIPE, env={**os.environ}, cwd=os.getcwd()
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    # The program, number 1 of its namespace above it, and the launcher.
    started = _until(lambda: _running(process.pid), 3)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    gone, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    assert len(gone) == 3


def test_without_isolation_a_program_still_dies_with_its_group() -> None:
    program = """
        import os, time
        if os.fork() == 0:
            time.sleep(1000)
    """
    before = _running()
    assert run(program, isolated=False) == Outcome(True, "passed")
    _until(lambda: _running() - before, 0)
    assert run("while True: pass", isolated=False) == Outcome(False, "killed")


def test_where_isolation_is_refused_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(program: str, limits: Limits, *, isolated: bool = True) -> Outcome:
        assert program == "pass", "a program was run all the same"
        return Outcome(False, "refused: [Errno 1] unshare: Operation not permitted")

    monkeypatch.setattr("tasks.evaluation.sandbox.run_program", refuse)
    with pytest.raises(
        UserError, match=r"unshare: Operation not permitted\), so none was run.*--allow-code-unisolated"
    ):
        run_programs(["open('/tmp/ran', 'w')"])


def test_a_kernel_that_refuses_is_told_of() -> None:
    # In a user namespace that may hold no further one, without any capability: as in many a container.
    script = (
        "import os, ctypes; libc = ctypes.CDLL(None)\n"
        "uid, gid = os.getuid(), os.getgid()\n"
        "assert libc.unshare(0x10000000) == 0\n"
        "open('/proc/self/setgroups', 'w').write('deny')\n"
        "open('/proc/self/uid_map', 'w').write(f'{uid} {uid} 1')\n"
        "open('/proc/self/gid_map', 'w').write(f'{gid} {gid} 1')\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "from tasks.evaluation.sandbox_child import drop_privileges\n"
        "for capability in range(64): libc.prctl(24, capability, 0, 0, 0)\n"
        "assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0\n"
        "from tasks.evaluation.sandbox import Limits, run_program\n"
        "print(run_program('pass', Limits()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "refused" in done.stdout
    assert "unshare" in done.stdout


SQUARE = {"prompt": 'def square(x):\n    """x times x"""\n', "entry_point": "square"}
TEST = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4\n"


def test_pass_at_1_is_the_share_of_programs_that_pass_their_tests() -> None:
    answers = ["    return x * x\n", "    return x + x\n", "    return x **\n", "    while True: pass\n"]
    programs = [program_of("humaneval", {**SQUARE, "test": TEST}, answer) for answer in answers]
    metric, outcomes = executed(programs, isolated=True, limits=SOON)
    assert outcomes == ["passed", "AssertionError", "SyntaxError", "killed"]
    assert metric["value"] == 0.25
    # Of four answers, one right: the standard deviation (n − 1) over the square root of n.
    assert metric["stderr"] == pytest.approx(0.5 / 2)


def test_an_mbpp_program_is_the_answer_and_its_tests() -> None:
    question = {"test_list": ["assert double(2) == 4", "assert double(0) == 0"]}
    program = program_of("mbpp", question, "def double(x):\r\n    return 2 * x")
    assert run_program(program, SOON).passed
    assert not run_program(program_of("mbpp", question, "def double(x): return x"), SOON).passed


BISECT = 'def middle(a, b):\n    return (a + b) / 2\n\n\ndef root(f, low, high):\n    """where f is zero"""\n'
TOLD_APART = {
    # The prompt's helpers are the tests', whatever the answer makes of them.
    "a helper": (
        program_of(
            "humaneval",
            {
                "prompt": BISECT,
                "entry_point": "root",
                "test": "def check(candidate):\n    assert middle(candidate([1, 2], 0, 4), 0) == 1.0",
            },
            "    return float(sum(f) - 1)\n\ndef middle(a, b): return 1.0",
        ),
        "passed",
    ),
    # A name that is Python's, and the answer's all the same.
    "sum": (
        program_of(
            "mbpp",
            {"code": "def sum(a, b): return a", "test_list": ["assert sum(10, 15) == 6"]},
            "def sum(a, b): return 6",
        ),
        "passed",
    ),
    "classes": (
        program_of(
            "mbpp",
            {
                "code": "class Pair: pass\ndef f(a): pass",
                "test_list": ["assert f([Pair(1, 2), Pair(b=4, a=3)], 2) == 6"],
            },
            "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
            "def f(pairs, n): return pairs[0].a + pairs[1].a + n",
        ),
        "passed",
    ),
    "a library": (
        program_of(
            "mbpp", {"test_list": ["assert math.isclose(f(2), 1.41421, rel_tol=1e-4)"]}, "import math\nf = math.sqrt"
        ),
        "passed",
    ),
    "the answer's own library": (
        program_of(
            "mbpp",
            {"test_list": ["assert math.isclose(f(2), 1.41421, rel_tol=1e-4)"]},
            "import types\nmath = types.SimpleNamespace(isclose=lambda *a, **k: True)\nf = float",
        ),
        "AssertionError",
    ),
    "all kinds of values": (
        Program(
            code="import collections, fractions, decimal, enum\nclass One(enum.IntEnum):\n    ONE = 1\n"
            "def same(x): return x\ndef up(n):\n    yield from range(n)\n"
            "def counted(x): return collections.Counter(x)\ndef first(x):\n    x.append(3)\n    return x[0]\n"
            "def one(): return One.ONE\ndef fails(): raise ValueError('no')\ndef keys(x): return x.keys()\n"
            "def third(): return fractions.Fraction(1, 3)\ndef pick(f): return sorted([3, 1], key=f)",
            tests="values = [None, True, 10**40, -1, 1.5, 'a\\ud800', b'x', (1, [2, {3}]), 2j]\n"
            "values.append({(1, 2): [frozenset({1})]})\n"
            "for value in values: assert same(value) == value and type(same(value)) is type(value)\n"
            "assert same(range(3)) == range(3) and same(float('inf')) == float('inf')\n"
            "assert list(same(iter('ab'))) == ['a', 'b']\n"
            "assert tuple(up(3)) == (0, 1, 2) and list(up(3)) != up(3) and next(up(1)) == 0\n"
            "assert counted('aab') == {'a': 2, 'b': 1} and keys({1: 2}) == {1} and one() == 1 and third() * 3 == 1\n"
            "given = [1, 2]\nassert first(given) == 1 and given == [1, 2, 3]\n"
            "try:\n    fails()\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError",
        ),
        "passed",
    ),
    "a function of the tests": (Program(code="def f(g): return g(1)", tests="assert f(lambda x: x)"), "TypeError"),
    "a name that nobody has": (Program(code="def f(): return 1", tests="assert g() == 1"), "NameError"),
    "an exception of its own": (
        Program(code="class Own(Exception): pass\ndef f(): raise Own", tests="assert f() == 1"),
        "Own",
    ),
}


def test_tests_see_what_a_program_gives_them() -> None:
    outcomes = run_programs([program for program, _ in TOLD_APART.values()], SOON)
    assert [outcome.reason for outcome in outcomes] == [wanted for _, wanted in TOLD_APART.values()]


def test_what_is_kept_of_a_program_is_run_again_later() -> None:
    question = {"test_list": ["assert double(2) == 4"], "code": "def double(x): return 2 * x"}
    program = program_of("mbpp", question, "def double(x): return x")
    assert read_back(json.loads(json.dumps(stored(program))), "x.jsonl") == program
    assert read_back("pass", "x.jsonl") == "pass"
    for damaged in (None, {}, {**stored(program), "tests": 3}, {**stored(program), "entries": 1}, [1]):
        with pytest.raises(UserError, match=r"x\.jsonl holds an answer without its program"):
            read_back(damaged, "x.jsonl")
