"""Reads blocks out of shard objects: Zarr's sharding codec, one block an inner chunk, as `storage.layout` writes it.

A shard object is its inner chunks, in any order, then its index (offset and length of each chunk, 16 bytes) and the
index's crc32c. Zarr itself reads all this too (tested); reading it here costs a tenth of the time a block, and every
array of a batch is fetched in one go:

    local        the index and the chunks that are wanted, from the file
    remote       where the whole store fits the cache: every shard is fetched once, whole, and kept (`CACHE`)
                 else: the index of a shard once, then the wanted chunks by their ranges, all at the same time

Each chunk is checked against its crc32c. What is missing or damaged is named by `ShardDamagedError`.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from ddk.types import Split
from storage import uri
from storage.layout import ArraySpec, shard_key
from storage.manifest import ShardRecord

Array = np.ndarray[Any, Any]
_AT_ONCE = 16
_INDICES_KEPT = 4096
_MISSING = 2**64 - 1
"""In a shard's index: there is no such chunk."""


class ShardDamagedError(Exception):
    """Some shards of an array cannot be read."""

    def __init__(self, name: str, why: Mapping[int, str]) -> None:
        super().__init__("; ".join(sorted(set(why.values()))))
        self.name = name
        self.shards = sorted(why)


class ByteCache:
    """Whole objects by their URL, the least recently used ones dropped beyond `capacity` bytes. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def get(self, url: str) -> bytes | None:
        with self._lock:
            if url in self._held:
                self._held.move_to_end(url)
            return self._held.get(url)

    def put(self, url: str, content: bytes) -> None:
        with self._lock:
            self._size += len(content) - len(self._held.pop(url, b""))
            self._held[url] = content
            while self._size > self.capacity and len(self._held) > 1:
                self._size -= len(self._held.popitem(last=False)[1])

    def drop(self, urls: Iterable[str]) -> None:
        with self._lock:
            for url in urls:
                self._size -= len(self._held.pop(url, b""))


CACHE = ByteCache(int(os.environ.get("DDK_SHARD_CACHE_MIB", "2048")) * 2**20)
"""Of this process, for all remote stores together."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Some blocks of one shard of one array."""

    spec: ArraySpec
    shard: int
    url: str
    size: int
    rows: npt.NDArray[np.int64]
    """Of the shard."""
    places: npt.NDArray[np.int64]
    """Of the result."""


Read = Callable[[int, int], bytes]
"""Bytes of an object from a start, so many."""


class ShardReader:
    """Reads blocks of one split of one complete store.

    Args:
        records: of the split's shards.
    """

    def __init__(
        self, url: str, split: Split, specs: Sequence[ArraySpec], records: Sequence[ShardRecord], shard_blocks: int
    ) -> None:
        self._url, self._split, self._records = url, split, records
        self._specs = {spec.name: spec for spec in specs}
        self._shard_blocks = shard_blocks
        self._local = uri.is_local(url)
        total = sum(record.bytes for shard in records for record in shard.objects.values())
        self._whole = total <= CACHE.capacity // 2
        self._indices: OrderedDict[str, Array] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, names: Sequence[str], blocks: npt.NDArray[np.int64]) -> dict[str, Array]:
        """The given blocks of the named arrays, in the given order.

        Raises:
            ShardDamagedError: a chunk is missing, or its checksum does not hold.
        """
        results = {
            name: np.empty((len(blocks), *self._specs[name].block_shape), self._specs[name].dtype) for name in names
        }
        wanted = [self._wanted(self._specs[name], shard, blocks) for name in names for shard in self._shards(blocks)]
        chunks = self._from_disk(wanted) if self._local else self._from_afar(wanted)
        for name in names:
            why: dict[int, str] = {}
            for part, found in zip(wanted, chunks, strict=True):
                if part.spec.name == name:
                    problem = found if isinstance(found, str) else _decode(part, found, results[name])
                    if problem is not None:
                        why[part.shard] = problem
            if why:
                # Read it anew when asked again: it may have been repaired.
                CACHE.drop(part.url for part in wanted)
                raise ShardDamagedError(name, why)
        return results

    def _shards(self, blocks: npt.NDArray[np.int64]) -> list[int]:
        return [int(shard) for shard in np.unique(blocks // self._shard_blocks)]

    def _wanted(self, spec: ArraySpec, shard: int, blocks: npt.NDArray[np.int64]) -> _Wanted:
        places = np.flatnonzero(blocks // self._shard_blocks == shard)
        return _Wanted(
            spec=spec,
            shard=shard,
            url=uri.join(self._url, self._split, spec.name, shard_key(spec, shard)),
            size=self._records[shard].objects[spec.name].bytes,
            rows=blocks[places] % self._shard_blocks,
            places=places,
        )

    def _from_disk(self, wanted: Sequence[_Wanted]) -> list[list[bytes] | str]:
        found: list[list[bytes] | str] = []
        for part in wanted:
            try:
                with open(uri.open_fs(part.url)[1], "rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    if size != part.size:
                        found.append(f"{size:,} bytes instead of {part.size:,}")
                        continue
                    found.append(self._chunks(part, _reader_of_file(file.fileno())))
            except (FileNotFoundError, NotADirectoryError):
                found.append("never written, or lost")
        return found

    def _chunks(self, part: _Wanted, read: Read) -> list[bytes] | str:
        index = self._index(read(*self._index_range(part)))
        if isinstance(index, str):
            return index
        ranges = _ranges(part, index)
        return ranges if isinstance(ranges, str) else [read(start, count) for start, count in ranges]

    def _index_range(self, part: _Wanted) -> tuple[int, int]:
        length = 16 * self._shard_blocks + 4
        return max(part.size - length, 0), length

    def _index(self, content: bytes) -> Array | str:
        """[shard_blocks, 2] offsets and lengths, or what is wrong."""
        if len(content) != 16 * self._shard_blocks + 4 or not _crc_holds(content):
            return "its index is not what was written"
        return np.frombuffer(content[:-4], dtype="<u8").reshape(-1, 2)

    def _from_afar(self, wanted: Sequence[_Wanted]) -> list[list[bytes] | str]:
        return self._from_whole_objects(wanted) if self._whole else self._by_ranges(wanted)

    def _from_whole_objects(self, wanted: Sequence[_Wanted]) -> list[list[bytes] | str]:
        sizes = {part.url: part.size for part in wanted}
        held = {url: CACHE.get(url) for url in sizes}
        missing = [url for url, content in held.items() if content is None]
        for url, content in zip(missing, uri.read_whole_many(missing), strict=True):
            held[url] = content
            if content is not None and len(content) == sizes[url]:
                CACHE.put(url, content)
        found: list[list[bytes] | str] = []
        for part in wanted:
            content = held[part.url]
            if content is None or len(content) != part.size:
                lost = content is None
                found.append("never written, or lost" if lost else f"{len(content or b''):,} bytes of {part.size:,}")
            else:
                found.append(self._chunks(part, _reader_of_bytes(content)))
        return found

    def _by_ranges(self, wanted: Sequence[_Wanted]) -> list[list[bytes] | str]:
        with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="ddk-ranges") as executor:
            return list(executor.map(self._by_range, wanted))

    def _by_range(self, part: _Wanted) -> list[bytes] | str:
        try:
            index = self._remote_index(part)
            ranges = index if isinstance(index, str) else _ranges(part, index)
            return ranges if isinstance(ranges, str) else uri.read_ranges(part.url, ranges)
        except FileNotFoundError:
            return "never written, or lost"

    def _remote_index(self, part: _Wanted) -> Array | str:
        with self._lock:
            if part.url in self._indices:
                return self._indices[part.url]
        index = self._index(uri.read_range(part.url, *self._index_range(part)))
        if not isinstance(index, str):
            with self._lock:
                self._indices[part.url] = index
                while len(self._indices) > _INDICES_KEPT:
                    self._indices.popitem(last=False)
        return index


def _reader_of_file(descriptor: int) -> Read:
    return lambda start, count: os.pread(descriptor, count, start)


def _reader_of_bytes(content: bytes) -> Read:
    return lambda start, count: content[start : start + count]


def _ranges(part: _Wanted, index: Array) -> list[tuple[int, int]] | str:
    """(offset, length) of the wanted chunks, or what is wrong."""
    chosen = index[part.rows]
    if (chosen == _MISSING).any():
        return "never written, or lost"
    if (chosen.sum(-1) > part.size).any():
        return "its index is not what was written"
    return [(int(offset), int(length)) for offset, length in chosen]


def _decode(part: _Wanted, chunks: Sequence[bytes], result: Array) -> str | None:
    """Into the result's rows; returns what is wrong, or None."""
    for place, chunk in zip(part.places, chunks, strict=True):
        if len(chunk) < 4 or not _crc_holds(chunk):
            return "its checksum does not hold"
        try:
            blosc.decompress(chunk[:-4], result[place])
        except (ValueError, RuntimeError) as error:
            return str(error)
    return None


def _crc_holds(content: bytes) -> bool:
    return bool(google_crc32c.value(content[:-4]) == int.from_bytes(content[-4:], "little"))
