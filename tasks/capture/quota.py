"""How many bytes a configuration's targets may take: `teacher.max_bytes`.

All domains' stores count, whoever has written to them. They are listed again only when half of what was left may be
used up, so that a capture of a terabyte lists them a few dozen times. Processes that capture together may exceed the
limit by the shards that they have in hand.
"""

from __future__ import annotations

from collections.abc import Iterable

from ddk.errors import UserError
from storage.files.below import bytes_of, files_below
from storage.stores.schema import ShardRecord


class Quota:
    """Bytes that may still be written.

    Args:
        limit: bytes that all stores together may take; None: no limit.
        urls: of the stores.
        writers: processes that write to them at once.
    """

    def __init__(self, limit: int | None, urls: Iterable[str], writers: int = 1) -> None:
        self._limit = limit
        self._urls = tuple(urls)
        self._writers = writers
        self._stored: int | None = None
        self._written = 0
        self._largest = 0

    def add(self, shard: ShardRecord) -> None:
        """Count a shard that this process has written."""
        size = sum(one.bytes for one in shard.objects.values())
        self._written += size
        self._largest = max(self._largest, size)

    def check(self) -> None:
        """That one shard more has room.

        Raises:
            UserError: it has not; nothing is lost.
        """
        if self._limit is None:
            return
        if self._stored is None or self._written * 2 * self._writers >= self._limit - self._stored:
            self._stored, self._written = sum(bytes_of(files_below(url)) for url in self._urls), 0
        if self._stored + self._written + self._largest > self._limit or self._stored >= self._limit:
            raise UserError(
                f"the capture has stopped: the targets take {self._stored + self._written:,} bytes, and "
                f"teacher.max_bytes is {self._limit:,}; every shard so far is kept. Raise the limit, or ask for less "
                f"(teacher.k, max_blocks of a domain); the same command then goes on"
            )
