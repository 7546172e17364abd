"""Removes what an engine leaves behind if it is killed together with its front end: sockets and shared memory.

Each engine has its own folder for its sockets and a list of its shared memory. (A shard's results and vLLM's message
queues take 160 MiB and more.) The front end holds a lock on that folder, which the kernel releases when the process
ends in any way. The next engine that starts on this machine thus finds the folders whose owners are gone, and removes
them with everything that they list.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import shutil
import tempfile

import psutil

SHARED_MEMORY = "/dev/shm"  # noqa: S108 (shared memory is what is meant)
_PREFIX = "ddk-engine-"
_LOCK, _LIST = "lock", "shared-memory"
_ENGINES_OWN = re.compile(rf"{SHARED_MEMORY}/(psm_|nccl-|vllm|sem\.(loky|mp)-|ddk-capture-)[^/ ]*")
"""Python's shared memory, NCCL's, vLLM's and ours. Weights may lie in shared memory too, and are their owner's."""
_LONGEST = 60
"""Of the folder's path. A socket's may have 107 characters, and vLLM adds 37."""


class EngineFolder:
    """A folder for one engine, until `remove`. Creating one removes the folders of dead engines."""

    def __init__(self) -> None:
        place = _short_place()
        clear_away(place)
        made = tempfile.mkdtemp(prefix="ddk-", dir=place)
        self._lock = os.open(os.path.join(made, _LOCK), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Under its name only now: nobody takes it for a dead one's in the moment before it is locked.
        self.path = os.path.join(place, _PREFIX + os.path.basename(made).removeprefix("ddk-"))
        os.rename(made, self.path)
        self._listed: set[str] = set()

    def list_file(self, path: str, inode: int = 0) -> None:
        """Have this file removed once we are gone.

        Args:
            inode: it must still have then; 0 where its name says enough.
        """
        if path not in self._listed:
            self._listed.add(path)
            with open(os.path.join(self.path, _LIST), "a", encoding="utf-8") as file:
                file.write(f"{inode} {path}\n")

    def list_shared_memory(self, processes: list[int]) -> None:
        """Likewise all shared memory that these processes and their children have mapped."""
        for number in processes:
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(number)
                for each in (process, *process.children(recursive=True)):
                    for path, inode in _mapped(each.pid):
                        self.list_file(path, inode)

    def remove(self) -> None:
        """Can be called twice. The listed shared memory is left to the process that made it, which is still alive."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def clear_away(place: str | None = None) -> None:
    """Remove the folders of engines whose front end is gone, and the shared memory that they list.

    Args:
        place: folder for temporary files; by default where `EngineFolder` makes its own.
    """
    for folder in glob.glob(os.path.join(place or _short_place(), f"{_PREFIX}*")):
        with contextlib.suppress(OSError):  # another user's, or just being removed by its owner
            if os.lstat(folder).st_uid == os.getuid():
                _clear_away_one(folder)


def _clear_away_one(folder: str) -> None:
    lock = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path, inode in _listed(folder):
                with contextlib.suppress(OSError):
                    if inode in (0, os.lstat(path).st_ino):
                        os.unlink(path)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _listed(folder: str) -> list[tuple[str, int]]:
    try:
        with open(os.path.join(folder, _LIST), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    found = (re.fullmatch(r"(\d+) (.+)", line) for line in lines)
    return [(match[2], int(match[1])) for match in found if match and _ENGINES_OWN.fullmatch(match[2])]


def _mapped(process: int) -> list[tuple[str, int]]:
    """Files of shared memory, and their inodes, from lines as `7f…-7f… rw-s 00000000 00:19 523 /dev/shm/psm_12ab`."""
    with open(f"/proc/{process}/maps", encoding="utf-8", errors="replace") as file:
        parts = [line.split(maxsplit=5) for line in file if f" {SHARED_MEMORY}/" in line]
    found = {(part[5].rstrip("\n"), int(part[4])) for part in parts if len(part) == 6}
    return sorted((path, inode) for path, inode in found if _ENGINES_OWN.fullmatch(path))


def _short_place() -> str:
    """The folder for temporary files, or `/tmp` where that one's path is too long for a socket's."""
    place = tempfile.gettempdir()
    usual = "/tmp"  # noqa: S108 (a folder of its own is made there)
    return place if len(os.path.join(place, f"{_PREFIX}12345678")) <= _LONGEST or not os.path.isdir(usual) else usual
