"""Copies of whole shard objects of remote stores on the local disk: bounded, and shared by all processes of a machine.

A missing object is fetched once, even if many processes and threads want it: the first one writes it, and the others
wait. The file's name is a hash of the object's URL, size and sha256, so that a recreated shard gets a new file.
`storage.reading.shard_folder` keeps the folder within its capacity.

If the disk is full or not writable, nothing is added for a minute, a warning says so once, and `obtain` returns None;
its caller then reads remotely what it needs.

Set by the environment, which is read when a store is opened:

    DDK_SHARD_CACHE_MIB     capacity; 2048 by default, 0 for no cache
    DDK_SHARD_CACHE_DIR     folder; `ddk-shards-<user id>` in the folder for temporary files by default
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass

from storage.errors import StoreError
from storage.files import uri
from storage.reading.shard_folder import CannotKeepError, ShardFolder, VanishedError, is_at

DEFAULT_MIB = 2048
_TOUCH_S = 5.0
"""A file in use has its mtime set as often as this, not at every read."""
_PAUSE_S = 60.0
"""Nothing is added for so long after the disk was full."""
_AHEAD_S = 600.0
"""What was fetched ahead and is not read for so long is spared no more."""
_LEAST_USE = 8
"""One of so many fetched bytes must be read."""
_TRIES = 5
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
OTHER_BYTES = "its bytes are not those that were written (sha256 differs)"
_log = logging.getLogger("ddk")


@dataclass(frozen=True, slots=True)
class ShardObject:
    """One object as the manifest describes it."""

    url: str
    size: int
    """Bytes."""
    sha256: str

    @property
    def name(self) -> str:
        """Of its file."""
        key = "\0".join([self.url, str(self.size), self.sha256])
        return f"{hashlib.sha256(key.encode()).hexdigest()[:40]}-{self.size}"


@dataclass(frozen=True, slots=True)
class Held:
    """An object's file, open for reading; the caller closes it."""

    descriptor: int
    fetched: bool
    """Whether it was fetched for this, rather than found."""


class NotWhatWasWrittenError(Exception):
    """The object at the URL does not match the manifest."""


def shared() -> ShardCache | None:
    """The cache that the environment names; None where it is turned off.

    Raises:
        StoreError: DDK_SHARD_CACHE_MIB is no whole number.
    """
    text = os.environ.get("DDK_SHARD_CACHE_MIB", "").strip() or str(DEFAULT_MIB)
    if not text.isdecimal():
        raise StoreError(f"DDK_SHARD_CACHE_MIB is '{text}'; it must be a whole number of MiB, or 0 for no cache")
    if int(text) == 0:
        return None
    named = os.environ.get("DDK_SHARD_CACHE_DIR", "").strip()
    default = os.path.join(tempfile.gettempdir(), f"ddk-shards-{os.getuid()}")
    return _cache(os.path.realpath(os.path.expanduser(named)) if named else default, int(text) * 2**20)


@functools.cache
def _cache(folder: str, capacity: int) -> ShardCache:
    return ShardCache(folder, capacity)


class ShardCache:
    """See the module. Any number of threads and processes may use one folder.

    Args:
        folder: made when the first object is wanted.
        capacity: bytes.
    """

    def __init__(self, folder: str, capacity: int) -> None:
        self.folder = folder
        self.capacity = capacity
        self._files = ShardFolder(folder, capacity)
        self._lock = threading.Lock()
        self._ahead: dict[str, tuple[int, float]] = {}
        """Fetched ahead by this process and not read since: bytes, and when that was (monotonic)."""
        self._use: dict[str, tuple[int, int]] = {}
        """By store, since it was last judged: bytes fetched by this process, and bytes read."""
        self._not_worth_it: set[str] = set()
        self._paused_until = 0.0
        self._warned = False

    def open(self, wanted: ShardObject) -> int | None:
        """The object's file, open for reading; None where it is not here."""
        self._spare(wanted, ahead=False)
        return self._open(wanted)

    def has(self, wanted: ShardObject) -> bool:
        """Whether the object is here. It then counts as used just now."""
        descriptor = self._open(wanted)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def obtain(self, wanted: ShardObject, *, ahead: bool = False) -> Held | None:
        """The object's file, fetched where it is not here.

        Args:
            ahead: it is wanted for later, and spared until it is read.

        Returns:
            None where it cannot be kept: the disk is full, or there is no room beside what is being fetched.

        Raises:
            FileNotFoundError: there is no such object.
            NotWhatWasWrittenError: it has another size, or other bytes.
            UnreachableError: the storage service refused, or did not answer.
            StoreError: the folder belongs to someone else.
        """
        self._spare(wanted, ahead=ahead)
        try:
            if time.monotonic() < self._paused_until:
                return self._found(wanted)
            return self._obtain(wanted)
        except CannotKeepError as error:
            self._pause(error)
            return None

    def has_room_ahead(self, size: int) -> bool:
        """Whether so many bytes more may be fetched ahead.

        What this process has fetched ahead and not read yet takes half of the capacity at most: more would drive out
        what is needed sooner.
        """
        now = time.monotonic()
        with self._lock:
            self._ahead = {name: entry for name, entry in self._ahead.items() if now - entry[1] < _AHEAD_S}
            return sum(held for held, _ in self._ahead.values()) + size <= self.capacity // 2

    def is_worth_it(self, store: str, fetched: int, used: int) -> bool:
        """Whether a store's shards should still be copied: notes how many bytes of it were fetched, and how many read.

        Judged for all stores together each time that the capacity could have been filled twice. Where less than an
        eighth of all that was fetched has been read, the stores of which that is true are to be read by ranges.
        """
        with self._lock:
            before = self._use.get(store, (0, 0))
            self._use[store] = before[0] + fetched, before[1] + used
            all_fetched, all_used = (sum(numbers) for numbers in zip(*self._use.values(), strict=True))
            wasted = set()
            if all_fetched >= 2 * self.capacity:
                if all_used * _LEAST_USE < all_fetched:
                    wasted = {name for name, (came, read) in self._use.items() if read * _LEAST_USE < came}
                self._use.clear()
                self._not_worth_it |= wasted
        if wasted:
            _log.warning(
                "of %d MiB of shards that were copied to %s, only %d MiB were read before the copies were removed to "
                "make room; from now on, single blocks of these stores are read remotely: %s. Raise "
                "DDK_SHARD_CACHE_MIB (now %d), or let fewer "
                "shards be shuffled together",
                *(all_fetched >> 20, self.folder, all_used >> 20, ", ".join(sorted(wasted)), self.capacity >> 20),
            )
        return store not in self._not_worth_it

    def drop(self, wanted: ShardObject) -> None:
        """Forget the object, so that it is fetched again when it is needed next."""
        self._files.remove(wanted.name, wanted.size)

    def _spare(self, wanted: ShardObject, *, ahead: bool) -> None:
        with self._lock:
            if ahead:
                self._ahead[wanted.name] = wanted.size, time.monotonic()
            else:
                self._ahead.pop(wanted.name, None)

    def _open(self, wanted: ShardObject) -> int | None:
        try:
            descriptor = os.open(self._files.file(wanted.name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        found = os.fstat(descriptor)
        if found.st_size != wanted.size:
            os.close(descriptor)
            self.drop(wanted)
            return None
        if time.time() - found.st_mtime > _TOUCH_S:
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        return descriptor

    def _found(self, wanted: ShardObject) -> Held | None:
        descriptor = self._open(wanted)
        return None if descriptor is None else Held(descriptor, fetched=False)

    def _obtain(self, wanted: ShardObject) -> Held | None:
        for _ in range(_TRIES):
            self._files.prepare()
            if (found := self._found(wanted)) is not None:
                return found
            try:
                descriptor = self._files.locked_part(wanted.name)
                if descriptor is not None:  # else it has come meanwhile
                    return self._fetched(wanted, descriptor)
            except VanishedError:
                self._files.forget()
        return None

    def _fetched(self, wanted: ShardObject, descriptor: int) -> Held | None:
        """Fetch the object to its locked `.part`, of which this is the descriptor, and rename that."""
        part = self._files.part(wanted.name)
        try:
            with self._lock:
                spared = set(self._ahead)
            if not self._files.reserve(wanted.name, wanted.size, spared):
                self._files.give_up(wanted.name, 0)
                os.close(descriptor)
                return None
            try:
                _download(wanted, part, descriptor)
                self._files.finish(wanted.name)
            except BaseException as error:
                vanished = isinstance(error, FileNotFoundError) and not is_at(descriptor, part)
                self._files.give_up(wanted.name, wanted.size)
                if vanished:
                    raise VanishedError from None  # it is the file here that was not found
                raise
        except BaseException:
            os.close(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return Held(descriptor, fetched=True)

    def _pause(self, why: Exception) -> None:
        with self._lock:
            self._paused_until = time.monotonic() + _PAUSE_S
            first, self._warned = not self._warned, True
        if first:
            _log.warning(
                "shards cannot be copied to %s (%s), so they are read remotely, block by block; free some space "
                "there, set DDK_SHARD_CACHE_DIR to a folder with more space, or lower DDK_SHARD_CACHE_MIB",
                self.folder,
                why,
            )


def _download(wanted: ShardObject, part: str, descriptor: int) -> None:
    """One request, straight to the disk."""
    fs, remote = uri.open_fs(wanted.url)
    with uri.reaching(wanted.url):
        try:
            fs.get_file(remote, part)
            full = None
        except OSError as error:
            if error.errno not in _FULL:
                raise
            full = str(error)
    if full is not None:
        raise CannotKeepError(full)
    if not is_at(descriptor, part):
        raise VanishedError
    size = os.fstat(descriptor).st_size
    if size != wanted.size:
        raise NotWhatWasWrittenError(f"{size:,} bytes instead of {wanted.size:,}")
    with open(part, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
            raise NotWhatWasWrittenError(OTHER_BYTES)
