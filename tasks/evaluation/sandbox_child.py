"""What runs inside the sandbox's process: shuts itself in, then runs one program. Only the standard library is used.

`tasks.evaluation.sandbox` starts this file (`python -I -S`, an empty environment, a session of its own), writes the job
to its standard input and reads lines of JSON from the descriptors that the job names. What happens here, in order:

1. Namespaces of its own for processes, mounts, network, System V and host name. Somebody who is not root gets them
   inside a user namespace of its own.
2. A root folder in memory with nothing in it but Python's library, the shared libraries and /dev/null, zero, urandom,
   all read-only, and one writable folder of bounded size.
3. Every privilege is dropped. Being in a changed root, the process cannot make user namespaces to win them back.
4. Limits of processor time, memory, file sizes, open files and processes, and the list of the system calls that
   there are (`tasks.evaluation.sandbox_filter`); then the program.

The process that waits for the program is number 1 of its namespace: whatever ends it ends everything inside. The one
outside, which waits for that, adds up the memory of everything inside many times a second, and ends it where it is
too much.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.machinery
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    *(0x00020000, 0x04000000, 0x08000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_SYS_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_NOBODY = 65534
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_WORK = "/work"
_LOOK_MS = 10
"""Between two looks at the memory."""

_libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(OSError):
    """The kernel, or who set this machine up, does not allow a part of the isolation."""


def main() -> None:
    job = json.load(sys.stdin)
    status = int(job["status"])
    talk = _beside("sandbox_talk") if job["talks"] else None  # while it can be read
    # Whoever waits may be gone already; then nobody would end this.
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if not job["isolated"]:
        os.close(status)
        _run(job, talk)
    try:
        if job["filter"] is None:
            raise RefusedError(0, f"there is no list of system calls for {os.uname().machine}")
        isolate_namespaces()
        child = os.fork()
        if child:
            os.close(int(job["out"]))
            _watch(child, job, status)
        shut_in(job)
    except OSError as error:
        _say(status, {"refused": str(error)})
        os._exit(1)
    # Number 1 of its namespace ignores signals, the kernel's for too much processor time as well: it only waits.
    os.close(status)
    child = os.fork()
    if child:
        os.close(int(job["out"]))
        _leave(child)
    _run(job, talk)


def isolate_namespaces() -> None:
    """Step 1: the next child is in namespaces of its own."""
    wanted = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    user, group = os.getuid(), os.getgid()
    if user == 0 and _libc.unshare(wanted) == 0:
        return
    _check(_libc.unshare(wanted | _NEWUSER), "unshare")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(content)


def shut_in(job: dict[str, Any]) -> None:
    """Steps 2 and 3, in the process that is number 1 of its namespace."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*_readable(), *_existing(_DEVICES))}
    root = job["root"]
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID, "size=1m,mode=755")
    for path, source in sources.items():
        _bind(source, path, root, device=path in _DEVICES)
    for path in _existing(_LIBRARIES):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
    os.mkdir(root + _WORK)
    os.symlink(_WORK.lstrip("/"), root + "/tmp")  # noqa: S108 (the sandbox's own)
    size = int(job["folder_bytes"])
    _mount("tmpfs", root + _WORK, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=4096,mode=1777")
    _set_attributes(root, _MOUNT_ATTR_RDONLY, 0)
    os.chroot(root)
    os.chdir(_WORK)
    drop_privileges(int(job["user"]))


def _readable() -> list[str]:
    """Folders and files that the program may read; none lies in another."""
    library = os.path.dirname(os.path.dirname(os.__file__))
    # A link (/lib is one to usr/lib) is made again as a link.
    real = {path for path in (*_existing(_LIBRARIES), library) if not os.path.islink(path)}
    real |= {os.path.realpath(path) for path in _existing(_LIBRARIES)}
    return sorted(path for path in real if not any(path.startswith(other + "/") for other in real))


def _existing(paths: tuple[str, ...]) -> list[str]:
    return [path for path in paths if os.path.exists(path)]


def _bind(source: int, path: str, root: str, *, device: bool) -> None:
    target = root + path
    origin = f"/proc/self/fd/{source}"
    if os.path.isdir(origin):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(origin, target, None, _MS_BIND | _MS_REC)
    if not device:
        _set_attributes(target, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, _AT_RECURSIVE)


def _set_attributes(target: str, attributes: int, flags: int) -> None:
    """`mount_setattr`: unlike a remount it keeps what a mount has already, which a user namespace may not take off."""
    asked = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # set, clear, propagation, user namespace
    place = ctypes.c_char_p(target.encode())
    done = _libc.syscall(_SYS_MOUNT_SETATTR, -1, place, flags, asked, ctypes.sizeof(asked))
    _check(done, f"mount_setattr {target}")


def drop_privileges(user: int) -> None:
    """Drop all capabilities for good and, as root, change to another user, as root is exempt from the process limit."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # the last one that this kernel knows
    if os.getuid() == 0:
        _become_nobody(user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # Forgotten when the user changes, so asked for again.
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _become_nobody(own: int) -> None:
    """A user of its own where there may be one, so that two sandboxes do not count each other's processes."""
    for user in (own, _NOBODY):
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        return
    # Root of a user namespace in which there is nobody else: it stays, without any capability.


def _run(job: dict[str, Any], talk: ModuleType | None) -> None:
    """Step 4. Never returns."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    high = [fcntl.fcntl(int(job[name]), fcntl.F_DUPFD, 64) for name in ("out", "verdict") if name in job]
    for descriptor, found in enumerate(high, start=3):
        os.dup2(found, descriptor)
    os.closerange(3 + len(high), 4096)
    out, verdict = 3, 4
    cpu, memory = int(job["cpu_seconds"]), int(job["memory_bytes"])
    limits = {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_AS: (memory, memory),
        resource.RLIMIT_FSIZE: (int(job["file_bytes"]),) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_NPROC: (int(job["processes"]),) * 2,
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_SIGPENDING: (64, 64),
    }
    for limit, values in limits.items():
        resource.setrlimit(limit, values)
    if job["tests"] is not None:
        # Without isolation another process of the same user could look into this one.
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _filter(job, out)
    if talk is None:
        _run_alone(out, job["program"])
    elif job["tests"] is None:
        talk.serve(out, job["program"])
    else:
        ended = talk.judge(out, job["tests"], job["setup"], job["entries"])
        said: dict[str, Any] = {"passed": True} if ended is None else {"failed": ended}
        _say(verdict, said)
    os._exit(0)


def _run_alone(out: int, program: str) -> None:
    """A program without tests: that it came to its end is its own word."""
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102 (what this is for)
    except BaseException as error:
        _say(out, {"failed": type(error).__name__})
        os._exit(1)
    # What shows that this was reached is the job's own, and in no variable while the program runs: one that ends
    # early, writes what it likes or looks through the interpreter's frames does not say it by accident.
    _say(out, {"passed": os.read(out, 64).decode()})


def _filter(job: dict[str, Any], out: int) -> None:
    """From here on there are no system calls but those on the list, for whatever is started from here as well."""
    instructions = job["filter"] or []
    code = b"".join(
        code.to_bytes(2, "little") + bytes((yes, no)) + number.to_bytes(4, "little")
        for code, yes, no, number in instructions
    )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    program = Program(len(instructions), code)
    privileges = _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    done = _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    if job["isolated"] and (privileges or done):
        _say(out, {"failed": "SeccompRefused"})  # heard by `tasks.evaluation.sandbox.check_isolation`
        os._exit(1)


def _beside(name: str) -> ModuleType:
    """A module that lies beside this file, which is on no path of modules."""
    loader = importlib.machinery.SourceFileLoader(
        name, os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    )
    module = ModuleType(name)
    loader.exec_module(module)
    return module


def _watch(child: int, job: dict[str, Any], status: int) -> None:
    """Wait for number 1 of the namespace, and end it where all inside have taken too much memory. Never returns."""
    with contextlib.suppress(OSError):
        waiting = os.pidfd_open(child)
        limit = int(job["memory_bytes"])
        while not select.select([waiting], [], [], _LOOK_MS / 1000)[0]:
            if _held(child, limit) + _folder_bytes(job["root"] + _WORK) > limit:
                _say(status, {"failed": "out of memory"})
                os.kill(child, signal.SIGKILL)
                break
    _leave(child)


def _held(ancestor: int, enough: int) -> int:
    """Bytes of memory of a process and all below it; shared ones count once where the sum would be more than enough."""
    processes = [ancestor, *_below(ancestor)]
    resident = 0
    for process in processes:
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{process}/statm", encoding="ascii") as file:
            resident += int(file.read().split()[1]) * resource.getpagesize()
    return resident if resident <= enough else sum(map(_proportional, processes))


def _proportional(process: int) -> int:
    with contextlib.suppress(OSError), open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def _below(ancestor: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{ancestor}/task"):
            with open(f"/proc/{ancestor}/task/{thread}/children", encoding="ascii") as file:
                children = [int(child) for child in file.read().split()]
            for child in children:
                yield child
                yield from _below(child)


def _folder_bytes(folder: str) -> int:
    with contextlib.suppress(OSError):  # not there yet
        found = os.statvfs(folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize
    return 0


def _leave(child: int) -> None:
    """Wait for the child and end as it did."""
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _say(out: int, what: dict[str, Any]) -> None:
    os.write(out, (json.dumps(what) + "\n").encode())


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    done = _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None)
    _check(done, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise RefusedError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
