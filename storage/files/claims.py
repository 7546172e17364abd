"""Claims: which process works on what, if several processes or machines work on one store.

    <store>/claims/owners/<id>.json            a sign of life of one process, written anew every few seconds
    <store>/claims/<what>.<generation>.json    what it has taken on: a shard, or the whole; never changed

A claim is created exclusively, so only one of several processes gets it. Nobody waits for a dead owner. An owner counts
as dead if its sign of life is gone, if its process is gone (on this machine), or if its sign of life has not changed
for `PATIENCE` seconds of the observer's own clock (on another machine). Any process that wants the work then takes the
next generation of the claim. Clocks of different machines are never compared.

Claims only save work. A store is kept consistent by the order of writes (`storage.stores.manifest`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self, TypeGuard, TypeVar

import psutil

from storage.errors import StoreDamagedError
from storage.files import uri

SECONDS_BETWEEN_SIGNS = 10.0
PATIENCE = 60.0
"""Seconds without a new sign of life after which an owner on another machine counts as dead: six signs."""
_SECONDS_BETWEEN_LOOKS = 1.0
_T = TypeVar("_T")
Life = Literal["alive", "dead", "unknown"]


class Claims:
    """This process's claims in one store. They end with the `with`, or with the process.

    Args:
        url: the store's folder (or a run's).
    """

    def __init__(self, url: str) -> None:
        self._url = uri.join(url, "claims")
        self._id = uuid.uuid4().hex
        self._held: dict[str, int] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        """By owner: the sign that was seen last, and when it was new."""
        self._ended = threading.Event()
        self._signs: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._signs is not None:
            self._signs.join()
            with contextlib.suppress(OSError):  # then its claims last as long as this process does
                uri.remove_file(self._owner_url(self._id))
                uri.remove_empty_folders(self._url)

    def take(self, what: str) -> bool:
        """Whether it is ours from now on; not where it is another's who lives, which is found without waiting.

        Args:
            what: letters, digits and dashes.
        """
        if what in self._held:
            return True
        generation = self._newest(what)
        if generation is not None:
            claim = _read(self._claim_url(what, generation))
            # One that cannot be read is nobody's. That saves nothing, and stops nobody.
            if claim is not None and _is_owner(owner := claim.get("owner")) and self._lives(owner):
                return False
        self._begin_signs()
        following = 0 if generation is None else generation + 1
        if not _despite_removal(uri.create_json, self._claim_url(what, following), {"owner": self._id}):
            return False
        self._held[what] = following
        return True

    def wait_for(self, what: str, on_wait: Callable[[], None] = lambda: None) -> None:
        """Until it is ours.

        Args:
            on_wait: called once where another has it.
        """
        if self.take(what):
            return
        on_wait()
        while not self.take(what):
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def holds(self, what: str) -> bool:
        """Whether nobody has taken it from us, because we seemed dead."""
        return what in self._held and self._newest(what) == self._held[what]

    def _newest(self, what: str) -> int | None:
        """Its highest generation. Counted up, not listed: there may be as many claims as shards."""
        generation = self._held.get(what, 0)
        if uri.size_of(self._claim_url(what, generation)) is None:
            return None
        while uri.size_of(self._claim_url(what, generation + 1)) is not None:
            generation += 1
        return generation

    def _lives(self, owner: str) -> bool:
        sign = _read(self._owner_url(owner))
        if sign is None:
            return False
        if (here := _lives_here(sign)) is not None:
            return here
        # A sign that cannot be read is the same each time: its owner, where it lives, will write another.
        number, now = str(sign.get("sign")), time.monotonic()
        if self._seen.get(owner, (None, 0.0))[0] != number:
            self._seen[owner] = (number, now)
        return now - self._seen[owner][1] < PATIENCE

    def _begin_signs(self) -> None:
        if self._signs is None:
            self._write_sign(0)
            self._signs = threading.Thread(target=self._keep_signing, name="ddk-claims", daemon=True)
            self._signs.start()

    def _keep_signing(self) -> None:
        number = 0
        while not self._ended.wait(SECONDS_BETWEEN_SIGNS):
            number += 1
            with contextlib.suppress(Exception):  # the next one may get through; else others take over, and may
                self._write_sign(number)

    def _write_sign(self, number: int) -> None:
        sign = {"machine": _machine(), "process": os.getpid(), "started": _started(os.getpid()), "sign": number}
        _despite_removal(uri.write_json, self._owner_url(self._id), sign)

    def _owner_url(self, owner: str) -> str:
        return uri.join(self._url, "owners", f"{owner}.json")

    def _claim_url(self, what: str, generation: int) -> str:
        return uri.join(self._url, f"{what}.{generation:04d}.json")


class Watch:
    """Whether somebody who lives is at work in a store or run, as one who takes no part sees it.

    An owner on another machine is known to live, or to be dead, only after a while: `look` says 'unknown' until its
    sign of life has changed, or has stayed the same for `PATIENCE` seconds of this watch.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, float]] = {}

    def look(self, url: str) -> Life:
        """The liveliest of all owners of claims there; 'dead' where there are none.

        Args:
            url: the store's folder (or a run's).
        """
        owners = uri.join(url, "claims", "owners")
        lives = {self._life(uri.join(owners, name)) for name in uri.list_names(owners)}
        return next((life for life in ("alive", "unknown") if life in lives), "dead")

    def _life(self, place: str) -> Life:
        sign = _read(place)
        if sign is None:
            return "dead"
        if (here := _lives_here(sign)) is not None:
            return "alive" if here else "dead"
        number, now = str(sign.get("sign")), time.monotonic()
        first, since = self._seen.setdefault(place, (number, now))
        if first != number:
            return "alive"
        return "unknown" if now - since < PATIENCE else "dead"


def _lives_here(sign: dict[str, Any]) -> bool | None:
    """Whether the owner is a process that runs on this machine; None where it is not of this machine."""
    process, started = sign.get("process"), sign.get("started")
    if sign.get("machine") == _machine() and _is_process(process) and isinstance(started, int | float):
        return _runs(process, started)
    return None


def _read(url: str) -> dict[str, Any] | None:
    """What one file holds; nothing where it is damaged, and None where there is none."""
    try:
        content = uri.read_json(url)
    except StoreDamagedError:
        return {}
    return content if content is None or isinstance(content, dict) else {}


def _is_owner(owner: Any) -> TypeGuard[str]:
    return isinstance(owner, str) and re.fullmatch(r"[0-9a-f]{32}", owner) is not None


def _is_process(process: Any) -> TypeGuard[int]:
    return isinstance(process, int) and not isinstance(process, bool) and 0 < process < 2**31


def _despite_removal(write: Callable[[str, Any], _T], url: str, value: Any) -> _T:
    """Again where the folder was removed under our hands, by who has completed the store."""
    for _ in range(9):
        with contextlib.suppress(FileNotFoundError):
            return write(url, value)
    return write(url, value)


def remove_claims(url: str) -> None:
    """All claims on a store that is complete: there is nothing to work on any more."""
    for _ in range(9):
        with contextlib.suppress(OSError):  # who came too late may be writing there; it removes its own again
            uri.remove_tree(uri.join(url, "claims"))
            break


def _machine() -> str:
    """This boot of this machine and, in a container, its view of the processes: where process ids mean the same."""
    parts = [platform.node()]
    for place, read in (("/proc/sys/kernel/random/boot_id", _content), ("/proc/self/ns/pid", os.readlink)):
        with contextlib.suppress(OSError):
            parts.append(read(place))
    return "/".join(parts)


def _content(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _started(process: int) -> float:
    return float(psutil.Process(process).create_time())


def _runs(process: int, started: Any) -> bool:
    """Whether this very process is there, and not a later one of the same number."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE and abs(_started(process) - started) < 1.0)
    except psutil.NoSuchProcess:
        return False
