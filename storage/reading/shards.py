"""Reads blocks out of shard objects: Zarr's sharding codec, one block an inner chunk, as `stores.layout` writes it.

A shard object is its inner chunks, in any order, then its index (offset and length of each chunk, 16 bytes) and the
index's crc32c. Zarr itself reads all this too (tested); reading it here costs a tenth of the time a block, and every
array of a batch is fetched in one go:

    local        the index and the chunks that are wanted, from the file
    remote       the same from a copy of the whole shard on the local disk (`shard_cache`), one request a shard
    by ranges    the index of a shard once, then the wanted chunks by their ranges, all at the same time: where copies
                 cannot be kept, or are not worth it

Copies are not worth it where hardly three shards fit the cache, or where little of what is fetched is read before it
has to make room (`ShardCache.is_worth_it`): blocks drawn at random from stores far larger than the cache, or shared out
among more than eight machines.

Each chunk is checked against its crc32c, and each object as a whole against its sha256: a local one when this process
first reads of it (and again where the file has changed since), a copy when it is fetched. So an intact shard in the
place of another is found as well; by ranges it is not. What is missing or damaged is read once more from where it lies,
since the copy may be bad or the shard repaired; then `ShardDamagedError` names it.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from typing import Any, cast

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc

from ddk.values import Split
from storage.files import uri
from storage.reading import shard_cache
from storage.reading.shard_cache import OTHER_BYTES, NotWhatWasWrittenError, ShardObject
from storage.stores.layout import ArraySpec, shard_key
from storage.stores.schema import ShardRecord

Array = np.ndarray[Any, Any]
_AT_ONCE = 16
_INDICES_KEPT = 4096
_LEAST_SHARDS = 3
"""That the cache must hold: one that is read, one that is fetched, one to choose from."""
_MISSING = 2**64 - 1
"""In a shard's index: there is no such chunk."""


class ShardDamagedError(Exception):
    """Some shards of an array cannot be read."""

    def __init__(self, name: str, why: Mapping[int, str]) -> None:
        super().__init__("; ".join(sorted(set(why.values()))))
        self.name = name
        self.shards = sorted(why)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Some blocks of one shard of one array."""

    spec: ArraySpec
    shard: int
    object: ShardObject
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
        self._cache = None if self._local else shard_cache.shared()
        sizes = [sum(record.bytes for record in shard.objects.values()) for shard in records]
        if self._cache is not None and self._cache.capacity < _LEAST_SHARDS * max(sizes, default=0):
            self._cache = None
        self._indices: OrderedDict[str, Array] = OrderedDict()
        self._seen: dict[str, tuple[int, int, int]] = {}
        """Of the local objects that are what was written, by URL: inode, size and time of the last change."""
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
        damaged = self._fill(results, wanted)
        if damaged and not self._local:
            self._forget(part for part, _ in damaged)
            damaged = self._fill(results, [part for part, _ in damaged])
        if damaged:
            # Read it anew when asked again: it may have been repaired.
            self._forget(part for part, _ in damaged)
            name = damaged[0][0].spec.name
            raise ShardDamagedError(name, {part.shard: why for part, why in damaged if part.spec.name == name})
        return results

    def fetch(self, names: Sequence[str], blocks: npt.NDArray[np.int64]) -> bool:
        """Copy the shards of the given blocks to the local disk, for a later `read`; nothing is decoded.

        Returns:
            False where there is no room for all of them before more of what was fetched so has been read. True where
            shards are not copied at all.
        """
        shards = self._shards(blocks) if self._cache is not None else []
        return all(self._fetch(self._object(self._specs[name], shard)) for shard in shards for name in names)

    def _fetch(self, wanted: ShardObject) -> bool:
        cache = self._cache
        if cache is None or cache.has(wanted):
            return True
        if not cache.has_room_ahead(wanted.size):
            return False
        held = cache.obtain(wanted, ahead=True)
        if held is not None:
            os.close(held.descriptor)
            self._account(wanted.size if held.fetched else 0, 0)
        return True

    def _fill(self, results: Mapping[str, Array], wanted: Sequence[_Wanted]) -> list[tuple[_Wanted, str]]:
        """Read and decode; returns what could not be, and why."""
        damaged: list[tuple[_Wanted, str]] = []
        chunks = self._from_disk(wanted) if self._local else self._from_afar(wanted)
        for part, found in zip(wanted, chunks, strict=True):
            problem = found if isinstance(found, str) else _decode(part, found, results[part.spec.name])
            if problem is not None:
                damaged.append((part, problem))
        return damaged

    def _forget(self, parts: Iterable[_Wanted]) -> None:
        for part in parts:
            if self._cache is not None:
                self._cache.drop(part.object)
            with self._lock:
                self._indices.pop(part.object.url, None)

    def _shards(self, blocks: npt.NDArray[np.int64]) -> list[int]:
        return [int(shard) for shard in np.unique(blocks // self._shard_blocks)]

    def _wanted(self, spec: ArraySpec, shard: int, blocks: npt.NDArray[np.int64]) -> _Wanted:
        places = np.flatnonzero(blocks // self._shard_blocks == shard)
        return _Wanted(
            spec=spec,
            shard=shard,
            object=self._object(spec, shard),
            rows=blocks[places] % self._shard_blocks,
            places=places,
        )

    def _object(self, spec: ArraySpec, shard: int) -> ShardObject:
        record = self._records[shard].objects[spec.name]
        url = uri.join(self._url, self._split, spec.name, shard_key(spec, shard))
        return ShardObject(url=url, size=record.bytes, sha256=record.sha256)

    def _from_disk(self, wanted: Sequence[_Wanted]) -> list[list[bytes] | str]:
        found: list[list[bytes] | str] = []
        for part in wanted:
            try:
                with open(uri.open_fs(part.object.url)[1], "rb", buffering=0) as file:
                    wrong = self._wrong_as_a_whole(part.object, file)
                    found.append(wrong or self._chunks(part, _reader_of_file(file.fileno())))
            except (FileNotFoundError, NotADirectoryError):
                found.append("never written, or lost")
        return found

    def _wrong_as_a_whole(self, wanted: ShardObject, file: FileIO) -> str | None:
        state = os.fstat(file.fileno())
        if state.st_size != wanted.size:
            return f"{state.st_size:,} bytes instead of {wanted.size:,}"
        stamp = (state.st_ino, state.st_size, state.st_mtime_ns)
        if self._seen.get(wanted.url) != stamp:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted.sha256:
                return OTHER_BYTES
            self._seen[wanted.url] = stamp
        return None

    def _chunks(self, part: _Wanted, read: Read) -> list[bytes] | str:
        index = self._index(read(*self._index_range(part)))
        if isinstance(index, str):
            return index
        ranges = _ranges(part, index)
        return ranges if isinstance(ranges, str) else [read(start, count) for start, count in ranges]

    def _index_range(self, part: _Wanted) -> tuple[int, int]:
        length = 16 * self._shard_blocks + 4
        return max(part.object.size - length, 0), length

    def _index(self, content: bytes) -> Array | str:
        """[shard_blocks, 2] offsets and lengths, or what is wrong."""
        if len(content) != 16 * self._shard_blocks + 4 or not _crc_holds(content):
            return "its index is not what was written"
        return np.frombuffer(content[:-4], dtype="<u8").reshape(-1, 2)

    def _from_afar(self, wanted: Sequence[_Wanted]) -> list[list[bytes] | str]:
        found = [self._from_copy(part) for part in wanted]
        missing = [place for place, chunks in enumerate(found) if chunks is None]
        if missing:
            with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="ddk-shards") as executor:
                fetched = executor.map(self._fetched_chunks, [wanted[place] for place in missing])
                for place, chunks in zip(missing, fetched, strict=True):
                    found[place] = chunks
        return cast("list[list[bytes] | str]", found)

    def _from_copy(self, part: _Wanted) -> list[bytes] | str | None:
        """None where there is none."""
        descriptor = None if self._cache is None else self._cache.open(part.object)
        return None if descriptor is None else self._from_descriptor(part, descriptor, fetched=False)

    def _fetched_chunks(self, part: _Wanted) -> list[bytes] | str:
        try:
            held = None if self._cache is None else self._cache.obtain(part.object)
        except FileNotFoundError:
            return "never written, or lost"
        except NotWhatWasWrittenError as error:
            return str(error)
        if held is None:
            return self._by_range(part)
        return self._from_descriptor(part, held.descriptor, fetched=held.fetched)

    def _from_descriptor(self, part: _Wanted, descriptor: int, *, fetched: bool) -> list[bytes] | str:
        try:
            chunks = self._chunks(part, _reader_of_file(descriptor))
        finally:
            os.close(descriptor)
        used = 0 if isinstance(chunks, str) else sum(map(len, chunks))
        self._account(part.object.size if fetched else 0, used)
        return chunks

    def _account(self, fetched: int, used: int) -> None:
        cache = self._cache
        if cache is not None and not cache.is_worth_it(f"{self._url} ({self._split})", fetched, used):
            self._cache = None

    def _by_range(self, part: _Wanted) -> list[bytes] | str:
        try:
            index = self._remote_index(part)
            ranges = index if isinstance(index, str) else _ranges(part, index)
            return ranges if isinstance(ranges, str) else uri.read_ranges(part.object.url, ranges)
        except FileNotFoundError:
            return "never written, or lost"

    def _remote_index(self, part: _Wanted) -> Array | str:
        with self._lock:
            if part.object.url in self._indices:
                return self._indices[part.object.url]
        index = self._index(uri.read_range(part.object.url, *self._index_range(part)))
        if not isinstance(index, str):
            with self._lock:
                self._indices[part.object.url] = index
                while len(self._indices) > _INDICES_KEPT:
                    self._indices.popitem(last=False)
        return index


def _reader_of_file(descriptor: int) -> Read:
    return lambda start, count: os.pread(descriptor, count, start)


def _ranges(part: _Wanted, index: Array) -> list[tuple[int, int]] | str:
    """(offset, length) of the wanted chunks, or what is wrong."""
    chosen = index[part.rows]
    if (chosen == _MISSING).any():
        return "never written, or lost"
    if (chosen.sum(-1) > part.object.size).any():
        return "its index is not what was written"
    return [(int(offset), int(length)) for offset, length in chosen]


def _decode(part: _Wanted, chunks: Sequence[bytes], result: Array) -> str | None:
    """Into the result's rows; returns what is wrong, or None."""
    for place, chunk in zip(part.places, chunks, strict=True):
        if len(chunk) < 4 or not _crc_holds(chunk):
            return "its checksum does not hold"
        try:
            # A slice: where a block's part is one number, `result[place]` would be a copy of it.
            blosc.decompress(chunk[:-4], result[place : place + 1])
        except (ValueError, RuntimeError) as error:
            return str(error)
    return None


def _crc_holds(content: bytes) -> bool:
    return bool(google_crc32c.value(content[:-4]) == int.from_bytes(content[-4:], "little"))
