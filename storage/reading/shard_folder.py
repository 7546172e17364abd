"""A folder of files with a limited total size, even if several processes and threads write to it.

    <hash>-<bytes>          a file that is whole
    <hash>-<bytes>.part     one that is being written, locked by whoever writes it
    usage                   the sum of all bytes above, and the lock under which it changes

Before a file is written, the least recently used files (by mtime) are removed to make room. A process that has such a
file open can continue to read it.

A killed process leaves a `.part` file without a lock. The next process that wants this file takes it over, and a
process that makes room removes it. `usage` may then be too large, never too small; the next process that makes room
counts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from storage.errors import StoreError

_LOOK_S = 0.02
"""How often it is looked whether another process has come to an end with a file."""
_WAIT_S = 600.0
"""For another process that is writing the same file."""


class CannotKeepError(OSError):
    """The folder cannot be written."""


class VanishedError(OSError):
    """Someone has removed the folder, or a file of it that is being written."""


@dataclass(slots=True)
class _Usage:
    total: int | None
    """Bytes; None where nobody has counted them yet."""

    def add(self, size: int) -> None:
        if self.total is not None:
            self.total += size


class ShardFolder:
    """See the module. Names are `<hash>-<bytes>`.

    Args:
        path: of the folder.
        capacity: bytes.
    """

    def __init__(self, path: str, capacity: int) -> None:
        self.path = path
        self.capacity = capacity
        self._ready = False

    def prepare(self) -> None:
        """Make the folder, where that has not been done.

        Raises:
            StoreError: it belongs to someone else.
            CannotKeepError: it cannot be made.
        """
        if self._ready:
            return
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            found = os.lstat(self.path)
        except OSError as error:
            raise CannotKeepError(str(error)) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise StoreError(
                f"{self.path}, where shards of remote stores are kept, is not a folder of this user, so others could "
                f"change what is read from it; set DDK_SHARD_CACHE_DIR to one of your own, or DDK_SHARD_CACHE_MIB to 0"
            )
        self._ready = True

    def forget(self) -> None:
        """The folder is made again when it is needed."""
        self._ready = False

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def part(self, name: str) -> str:
        return self.file(name) + ".part"

    def locked_part(self, name: str) -> int | None:
        """The `.part` of this name, made where it is missing, open and locked; None once the file itself is there.

        Raises:
            VanishedError, CannotKeepError
        """
        file, part, deadline = self.file(name), self.part(name), time.monotonic() + _WAIT_S
        while not os.path.exists(file):
            descriptor = self._open(part)
            # It may be renamed or removed between opening and locking: the lock is then that of nothing.
            if _try_lock(descriptor) and is_at(descriptor, part):
                if not os.path.exists(file):
                    return descriptor
                os.unlink(part)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise CannotKeepError(f"another process has been writing {part} for {_WAIT_S / 60:.0f} minutes")
            time.sleep(_LOOK_S)
        return None

    def reserve(self, name: str, size: int, spared: Collection[str]) -> bool:
        """Make room for a file whose `.part` this thread has locked; False where what may go is not enough.

        Args:
            spared: names of the files that go last.

        Raises:
            VanishedError, CannotKeepError
        """
        with self._usage() as usage:
            if usage.total is None or usage.total + size > self.capacity:
                # A little more than needed, so that the folder is not gone through for every file.
                usage.total = self._evict(self.capacity - self.capacity // 16 - size, name, spared)
            if usage.total + size > self.capacity:
                return False
            usage.add(size)
            return True

    def finish(self, name: str) -> None:
        """The `.part` that this thread has locked and filled becomes the file."""
        with self._usage():  # so that whoever counts sees one of the two
            os.rename(self.part(name), self.file(name))

    def give_up(self, name: str, reserved: int) -> None:
        """Remove the `.part` that this thread has locked, and give back so many bytes."""
        with contextlib.suppress(OSError):
            os.unlink(self.part(name))
        with contextlib.suppress(OSError), self._usage() as usage:
            usage.add(-reserved)

    def remove(self, name: str, size: int) -> None:
        """A file; nothing where there is none."""
        with contextlib.suppress(OSError), self._usage() as usage:
            os.unlink(self.file(name))
            usage.add(-size)

    def _evict(self, goal: int, but: str, spared: Collection[str]) -> int:
        """Remove files, those used longest ago first, until no more than `goal` bytes are left; returns what is."""
        total, files = self._held(but)
        for _, _, size, name in sorted((name in spared, used, size, name) for name, used, size in files):
            if total <= goal:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.file(name))
            total -= size
        return total

    def _held(self, but: str) -> tuple[int, list[tuple[str, int, int]]]:
        """The bytes of all that is here or being written, except for one name; and name, time of the last use and
        bytes of each whole file. What a killed process left is removed."""
        total, files = 0, []
        try:
            with os.scandir(self.path) as entries:
                for entry in entries:
                    name, _, kind = entry.name.partition(".")
                    size = name.partition("-")[2]
                    if not size.isdecimal() or name == but:
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        if kind and _is_left_behind(entry.path):
                            continue
                        if not kind:
                            files.append((name, entry.stat().st_mtime_ns, int(size)))
                        total += int(size)
        except FileNotFoundError:
            raise VanishedError from None
        return total, files

    @contextlib.contextmanager
    def _usage(self) -> Iterator[_Usage]:
        """The sum of all bytes, which is stored when the context ends; nobody else has it meanwhile."""
        descriptor = self._open(self.file("usage"))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 64, 0).strip()
            usage = _Usage(int(text) if text.isdigit() else None)
            yield usage
            if usage.total is not None:
                # Of a fixed width, so that one write replaces what was there.
                with _cannot_keep():
                    os.pwrite(descriptor, b"%20d" % max(usage.total, 0), 0)
        finally:
            os.close(descriptor)

    def _open(self, path: str) -> int:
        try:
            with _cannot_keep():
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:
            raise VanishedError from None


@contextlib.contextmanager
def _cannot_keep() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CannotKeepError(str(error)) from None


def is_at(descriptor: int, path: str) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_left_behind(part: str) -> bool:
    """Whether nobody is writing this file; it is then removed.

    Raises:
        FileNotFoundError: it is gone.
    """
    descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if not _try_lock(descriptor):
            return False
        if is_at(descriptor, part):
            os.unlink(part)
        return True
    finally:
        os.close(descriptor)
