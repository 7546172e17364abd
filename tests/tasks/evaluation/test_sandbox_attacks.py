"""Programs that do their worst in the sandbox: what each tries is in its name, and none may come through.

Most attacks are tried one after another by one program, which says what came through; those on the verdict have a
sandbox each, since each ends its process, or spoils it.
"""

from __future__ import annotations

import itertools
import os
import sys
import textwrap
from pathlib import Path

import pytest

from tasks.evaluation.sandbox import Limits, Outcome, Program, run_program, run_programs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux's namespaces")

LIMITS = Limits(cpu_seconds=10, wall_seconds=120, memory_bytes=256 << 20)

CALL = """
import ctypes, os, platform, socket, errno
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"

class Refused(OSError):
    pass

def refused(result):
    if result in (-1, 0xffffffffffffffff):
        raise Refused(os.strerror(ctypes.get_errno()))

def call(x86, arm, *arguments):
    refused(libc.syscall(arm if ARM else x86, *arguments))

def connect(family, kind, address):
    with socket.socket(family, kind) as found:
        found.settimeout(1)
        found.connect(address)
"""
AN_ATTACK = {
    # ---- network
    "tcp to this machine": "connect(socket.AF_INET, socket.SOCK_STREAM, ('127.0.0.1', 22))",
    "tcp elsewhere": "connect(socket.AF_INET, socket.SOCK_STREAM, ('192.0.2.1', 80))",
    "tcp by IPv6": "connect(socket.AF_INET6, socket.SOCK_STREAM, ('::1', 22))",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
    "a name": "socket.getaddrinfo('example.com', 80)",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "vsock to the host": "socket.socket(40, socket.SOCK_STREAM)",
    "the kernel's cryptography": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "a protocol that is seldom looked at": "socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)",
    "an interface": "__import__('fcntl').ioctl(socket.socket(), 0x8914, bytes(40))",
    # ---- files
    "a file of the user": "open({secret!r})",
    "this folder": "os.listdir({here!r})",
    "passwords": "open('/etc/passwd')",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'w')",
    "the memory of the parent": "open('/proc/1/mem', 'rb')",
    "its own memory": "open('/proc/self/mem', 'r+b')",
    "the environment of the parent": "open('/proc/1/environ')",
    "devices": "open('/dev/mem', 'rb')",
    "shared memory": "open('/dev/shm/x', 'w')",
    "beside the root": "open('/x', 'w')",
    "the library": "open(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w')",
    "out of the root": "os.chroot('.')",
    "a device of its own": "os.mknod('disk', 0o60600, os.makedev(8, 0))",
    "a file by its handle": "call(304, 265, -100, b'x', 0, 0)",
    "a handle": "call(303, 264, -100, b'.', 0, 0, 0)",
    "attributes": "os.setxattr('.', 'user.x', bytes(64))",
    "a look at every file": "call(300, 262, 0, 0)",
    "a mount": "refused(libc.mount(b'none', b'/work', b'tmpfs', 0, None))",
    "a mount by the new calls": "call(430, 430, b'tmpfs', 0)",
    "an open tree": "call(428, 428, -100, b'/', 1)",
    "less of the mounts": "refused(libc.umount2(b'/work', 2))",
    "another root": "call(155, 41, b'/work', b'/work')",
    "swap": "call(167, 224, b'x', 0)",
    # ---- processes and privileges
    "another program": "os.execv('/lib64/ld-linux-x86-64.so.2', ['x'])",
    "another program by descriptor": "call(322, 281, os.open('.', os.O_RDONLY), b'', 0, 0, 0x1000)",
    "a user namespace": "refused(libc.unshare(0x10000000))",
    "a child in a user namespace": "call(56, 220, 0x10000011, 0, 0, 0, 0)",
    "a child by the new call": "call(435, 435, bytes(88), 88)",
    "a namespace of another": "call(308, 268, 0, 0)",
    "another user": "os.setuid(0)",
    "another group": "os.setgroups([0])",
    "capabilities": "refused(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[255] * 6)))",
    "tracing its parent": "refused(libc.ptrace(16, os.getppid(), 0, 0))",
    "reading its parent": "call(310, 270, os.getppid(), 0, 0, 0, 0, 0)",
    "writing its parent": "call(311, 271, os.getppid(), 0, 0, 0, 0, 0)",
    "its parent's descriptors": "call(438, 438, 0, 0, 0)",
    "a descriptor for its parent": "call(434, 434, os.getppid(), 0)",
    "its parent's limits": "__import__('resource').prlimit(os.getppid(), 0, (0, 0))",
    "processes beside it": "os.kill(3, 0)",
    "more of its own limits": "call(302, 261, 0, 9, (ctypes.c_uint64 * 2)(1 << 40, 1 << 40), 0)",
    "another personality": "call(135, 92, 0x0400000)",
    "a filter of its own": "refused(libc.prctl(22, 2, 0, 0, 0))",
    "its dumps": "refused(libc.prctl(4, 1, 0, 0, 0))",
    "the clock": "__import__('time').clock_settime(0, 0)",
    "the machine's name": "socket.sethostname('x')",
    "a reboot": "refused(libc.reboot(0))",
    "a kernel module": "call(175, 105, b'x', 1, b'')",
    "another kernel": "call(246, 104, 0, 0, 0, 0)",
    # ---- the kernel's rarer parts
    "io_uring": "call(425, 425, 8, bytes(120))",
    "a key": "call(248, 217, b'user', b'x', b'secret', 6, -3)",
    "a key that is there": "call(249, 218, b'user', b'x', 0, 0)",
    "the ring of keys": "call(250, 219, 0, -3, 0)",
    "a program in the kernel": "call(321, 280, 0, bytes(128), 128)",
    "performance counters": "call(298, 241, bytes(128), 0, -1, -1, 0)",
    "page faults": "call(323, 282, 0)",
    "the kernel's log": "call(103, 116, 3, 0, 0)",
    "the input of a terminal": "__import__('fcntl').ioctl(0, 0x5412, b'x')",
    # ---- memory that is in no process
    "shared memory of System V": "call(29, 194, 0, 512 << 20, 0o1600)",
    "message queues of System V": "call(68, 186, 0, 0o1600)",
    "semaphores of System V": "call(64, 190, 0, 1 << 15, 0o1600)",
    "a file in memory": "os.memfd_create('x')",
    "a secret file in memory": "call(447, 447, 0)",
    "message queues": "call(240, 180, b'x', 0o102, 0o600, 0)",
    "huge pages": "__import__('mmap').mmap(-1, 2 << 20, flags=0x40022)",
    "wide pipes": "__import__('fcntl').fcntl(os.pipe()[1], 1031, 1 << 20)",
    "locked memory": "call(151, 230, 1)",
    "a folder that is too full": "[open(str(i), 'wb').write(bytes(4 << 20)) for i in range(20)]",
    "a file that is too long": "open('x', 'wb').write(bytes(20 << 20))",
    "too many files": "[open(f'file{i}', 'w').close() for i in range(5000)]",
    "too many descriptors": "[os.dup(0) for i in range(100)]",
}
TRY_ALL = """
through = []
for name, code in attacks.items():
    child = os.fork()
    if child == 0:
        try:
            exec(code)
        except OSError:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if status:
        through.append(f"{name} {os.waitstatus_to_exitcode(status)}")
    for left in os.listdir("."):
        os.unlink(left)
if through:
    raise type("_".join("".join(c if c.isalnum() else "_" for c in name) for name in through)[:60], (Exception,), {})
"""


def test_nothing_comes_through(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("token")
    places = {"{secret!r}": repr(str(secret)), "{here!r}": repr(os.getcwd())}
    attacks = dict(AN_ATTACK)
    for name, place in itertools.product(attacks, places):
        attacks[name] = attacks[name].replace(place, places[place])
    program = f"{CALL}\nattacks = {attacks!r}\n{TRY_ALL}"
    assert run_program(program, LIMITS) == Outcome(True, "passed")
    assert len(AN_ATTACK) > 71


MEMORY = {
    "by processes that share nothing": """
        import os, time
        for i in range(5):
            if os.fork() == 0:
                held = b"x" * (100 << 20)
                time.sleep(60)
        time.sleep(60)
    """,
    "by mappings that processes share": """
        import mmap, os, time
        for i in range(5):
            if os.fork() == 0:
                held = mmap.mmap(-1, 100 << 20)
                for page in range(0, 100 << 20, 4096):
                    held[page] = 1
                time.sleep(60)
        time.sleep(60)
    """,
    "by grandchildren whose parents have gone": """
        import os, time
        for i in range(5):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    held = b"x" * (100 << 20)
                    time.sleep(60)
                os._exit(0)
            os.wait()
        time.sleep(60)
    """,
    "by a process and files": """
        import time
        for i in range(8):
            open(str(i), "wb").write(bytes(15 << 20))
        held = b"x" * (180 << 20)
        time.sleep(60)
    """,
    "by threads of a child": """
        import os, threading, time
        held = []
        threading.stack_size(1 << 18)
        def work():
            if os.fork() == 0:
                held.append(b"x" * (70 << 20))
                time.sleep(60)
        for i in range(5):
            threading.Thread(target=work).start()
        time.sleep(60)
    """,
}


def test_memory_is_limited_in_sum() -> None:
    limits = Limits(cpu_seconds=20, wall_seconds=120, memory_bytes=256 << 20, folder_bytes=128 << 20)
    programs = ["import os\n" + textwrap.dedent(program) for program in MEMORY.values()]
    outcomes = dict(zip(MEMORY, run_programs(programs, limits), strict=True))
    assert outcomes == dict.fromkeys(MEMORY, Outcome(False, "out of memory"))
    # What processes share counts once: a page of Python's own is in each of them.
    shared = "import os, time\nheld = bytearray(b'x') * (100 << 20)\n"
    shared += "for i in range(5):\n    if os.fork() == 0:\n        time.sleep(0.3)\n        os._exit(0)\n"
    shared += "for i in range(5): os.wait()"
    assert run_program(shared, limits) == Outcome(True, "passed")


WANTED = "assert answer(20) == 42 or 42 in answer(21)\nassert all(map(right, [answer(i) for i in range(3)]))"
RIGHT = "def right(value):\n    return value == 42\n"
FORGED = """
import json, os
def say(descriptor):
    for message in ({"passed": True}, {"done": []}, {"done": [42, {}]}, {"passed": "guess"}):
        content = json.dumps(message).encode()
        os.write(descriptor, content + b"\\n")
        os.write(descriptor, len(content).to_bytes(4, "big") + content)
def say_everywhere():
    for descriptor in range(3, 64):
        try:
            say(descriptor)
        except OSError:
            pass
"""
VERDICT = {
    "a wrong answer": "def answer(x): return 41",
    "no answer": "",
    "the end of the process": "import os\nos._exit(0)",
    "the end of the program": "raise SystemExit(0)",
    "the end of the process when asked": "import os\ndef answer(x): os._exit(0)",
    "the end of the program when asked": "import sys\ndef answer(x): sys.exit(0)",
    "passed, everywhere": FORGED + "say_everywhere()\nos._exit(0)",
    "passed, everywhere, when asked": FORGED + "def answer(x):\n    say_everywhere()\n    os._exit(0)",
    "passed, at the end": FORGED + "import atexit\natexit.register(say_everywhere)\nraise SystemExit(0)",
    "passed, from a signal": FORGED
    + "import signal\nsignal.signal(signal.SIGALRM, lambda *a: say_everywhere())\nsignal.alarm(1)\nsignal.pause()",
    "passed, from a thread": FORGED + "import threading\nthreading.Thread(target=say_everywhere).start()\nanswer = 1",
    "passed, from a child": FORGED
    + "import time\nif os.fork() == 0:\n    say_everywhere()\n    time.sleep(1)\nos._exit(0)",
    "equal to all": "class Any:\n    def __eq__(self, other): return True\ndef answer(x): return Any()",
    "a number equal to all": "class Any(int):\n    def __eq__(self, other): return True\ndef answer(x): return Any(1)",
    "a text equal to all": "class Any(str):\n    def __eq__(self, other): return True\ndef answer(x): return Any(1)",
    "a holder of all": "class All:\n    def __contains__(self, item): return True\n"
    "    def __iter__(self): return iter('ab')\ndef answer(x): return All()",
    "what tests call any": "from unittest import mock\ndef answer(x): return mock.ANY",
    "what tests call anything": "from unittest import mock\nanswer = mock.MagicMock(return_value=mock.MagicMock())",
    "another map": "map = all = print = lambda *given: 1\ndef answer(x): return 42 if x == 20 else 1",
    "other builtins": "import builtins\nbuiltins.all = builtins.map = lambda *given: 1\n"
    "builtins.AssertionError = type('A', (), {})\ndef answer(x): return 42 if x == 20 else 1",
    "another test": "def right(value): return True\ndef answer(x): return 42 if x == 20 else 1",
    "no more to come": "def answer(x):\n    if x == 20: return 42\n    raise StopIteration",
    "a trace": "import sys\ndef skip(frame, event, argument):\n    frame.f_trace_lines = False\n    return skip\n"
    "sys.settrace(skip)\ndef answer(x): return 41",
    "another interpreter": "import json, sys\njson.dumps = lambda *given: '{\"passed\": true}'\n"
    "for name, value in list(vars(sys.modules['__main__']).items()):\n"
    "    if callable(value): setattr(sys.modules['__main__'], name, lambda *given, **named: True)\n"
    "def answer(x): return 41",
    "what is in the frames": FORGED
    + "import sys\nframe = sys._getframe()\nwhile frame:\n    for name, value in list(frame.f_locals.items()):\n"
    "        assert 'answer(20)' not in repr(value)[:100000] or frame.f_back is None or name == 'program'\n"
    "        if name in ('out', 'channel', 'verdict'): say(value)\n    frame = frame.f_back\nos._exit(0)",
    "what is in memory": "import gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and 'tests' in o]\n"
    "for one in found:\n    if one['tests']: raise KeyError('found')\ndef answer(x): return 41",
    "a program that is not one": "def f(:",
    "an endless answer": "def answer(x): return [answer] * (1 << 24)",
    "a message without end": "import os\nfor i in range(3, 64):\n    try: os.write(i, b'\\xff' * 8)\n"
    "    except OSError: pass\ndef answer(x): return 42",
}
RAISED = 'class passed(Exception): pass\npassed.__name__ = "<img src=x>"\nraise passed'
TOLD = 'import os\nfor i in range(3, 64):\n    try: os.write(i, b\'{"refused": "<b>", "failed": "<b>"}\\n\')\n'
TOLD += "    except OSError: pass\nos._exit(0)"


def test_no_program_decides_on_its_verdict() -> None:
    programs = [Program(code=code, tests=WANTED, setup=RIGHT, entries=("answer",)) for code in VERDICT.values()]
    outcomes = dict(zip(VERDICT, run_programs(programs, LIMITS), strict=True))
    assert {name: outcome.reason for name, outcome in outcomes.items() if outcome.passed} == {}
    assert {outcome.reason for outcome in outcomes.values()} <= {
        *("AssertionError", "NameError", "SystemExit", "SyntaxError", "RuntimeError", "TypeError", "MemoryError"),
        *("killed", "AttributeError", "EndedError", "JSONDecodeError", "KeyError", "out of memory"),
    }
    assert outcomes["what is in memory"].reason == "TypeError", "no KeyError: there was nothing to find"
    # That the tests can be passed at all, by the same means.
    right = Program(code="def answer(x): return 42", tests=WANTED, setup=RIGHT, entries=("answer",))
    assert run_program(right, LIMITS) == Outcome(True, "passed")
    # A text without tests has its own word for it, but not by chance, nor for the word in a frame.
    text = VERDICT["what is in the frames"].replace("assert", "x =")
    for code, reason in ((text, "killed"), (RAISED, "Exception"), (TOLD, "Exception")):
        assert run_program(code, LIMITS) == Outcome(False, reason)
