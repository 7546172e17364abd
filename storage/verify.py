"""Whether a complete store still is what was written, and how its damaged shards come to be made again.

    fast   every object is there and has the size that the manifest says; the metadata of Zarr too
    full   besides, every object has the sha256 that the manifest says: any flipped byte is found, and so is an
           intact shard that belongs elsewhere

Repair needs no teacher and no corpus: it takes the damaged shards out of the manifest, so that the store is
unfinished, and the stage that wrote it (`ddk pack`, `ddk cache`) makes exactly these again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from ddk.types import SPLITS, Split
from storage import uri
from storage.layout import array_specs, group_metadata, shard_key
from storage.manifest import Manifest, ObjectRecord, ShardRecord, store_attributes, write_commit

_AT_ONCE = 16
"""Objects that are read concurrently; bounds memory to so many shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One object that is not what was written."""

    split: Split | None
    """None for Zarr's own metadata."""
    shard: int | None
    path: str
    """Below the store."""
    what: str

    def __str__(self) -> str:
        where = f"{self.split} shard {self.shard}, " if self.split is not None else ""
        return f"{where}{self.path}: {self.what}"


def verify(
    url: str, manifest: Manifest, *, full: bool, on_object: Callable[[int], None] = lambda size: None
) -> list[Damage]:
    """Everything that is wrong with a complete store.

    Args:
        manifest: the store's, complete.
        full: read every byte, not only the sizes.
        on_object: hears the bytes of each object that was checked.
    """
    damages = _metadata_damages(url, manifest)
    objects = _objects(manifest)
    with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="ddk-verify") as executor:
        # In portions: a store of 100,000 shards must not become as many waiting futures.
        while portion := list(islice(objects, 64 * _AT_ONCE)):
            checks = executor.map(lambda entry: _check(uri.join(url, entry[2]), entry[3], full=full), portion)
            for (split, shard, path, record), what in zip(portion, checks, strict=True):
                on_object(record.bytes)
                if what is not None:
                    damages.append(Damage(split=split, shard=shard, path=path, what=what))
    return damages


def uncommit(url: str, manifest: Manifest, damages: Sequence[Damage]) -> dict[Split, list[int]]:
    """Make a complete store unfinished by its damaged shards.

    In this order, so that a kill between any two steps leaves a store that is either complete as before or
    unfinished with every good shard committed: commit records of the good shards, the manifest, the damaged objects.

    Returns:
        The shards that the stage will make again, by split. Of token blocks these are all from the first damaged one
        on: each shard says where in the corpus the next one begins.
    """
    redone: dict[Split, list[int]] = {}
    for split in SPLITS:
        shards = manifest.splits[split].shards
        damaged = sorted({d.shard for d in damages if d.split == split and d.shard is not None})
        if damaged and manifest.kind == "blocks":
            damaged = list(range(damaged[0], len(shards)))
        for number, record in enumerate(shards):
            if number not in damaged:
                write_commit(url, split, number, record)
        if damaged:
            redone[split] = damaged
    unfinished = manifest.model_copy(update={"complete": False, "splits": {}, "facts": {}})
    uri.write_json(uri.join(url, "manifest.json"), unfinished.as_json())
    for split, numbers in redone.items():
        for number in numbers:
            for name in manifest.splits[split].shards[number].objects:
                uri.remove_file(uri.join(url, _shard_path(manifest, split, name, number)))
    return redone


def total_bytes(manifest: Manifest) -> int:
    """Of all shard objects."""
    return sum(record.bytes for *_, record in _objects(manifest))


def _objects(manifest: Manifest) -> Iterator[tuple[Split, int, str, ObjectRecord]]:
    for split in SPLITS:
        shards: Sequence[ShardRecord] = manifest.splits[split].shards
        for number, shard in enumerate(shards):
            for name, record in shard.objects.items():
                yield split, number, _shard_path(manifest, split, name, number), record


def _shard_path(manifest: Manifest, split: Split, name: str, shard: int) -> str:
    specs = array_specs(manifest.kind, manifest.dims, manifest.form)
    spec = next(spec for spec in specs if spec.name == name)
    return f"{split}/{name}/{shard_key(spec, shard)}"


def _metadata_damages(url: str, manifest: Manifest) -> list[Damage]:
    specs = array_specs(manifest.kind, manifest.dims, manifest.form)
    counts = {split: manifest.splits[split].blocks for split in SPLITS}
    wanted = group_metadata(specs, counts, manifest.dims["shard_blocks"], store_attributes(manifest))
    return [
        Damage(split=None, shard=None, path=path, what="missing" if found is None else "not what was written")
        for path, content in wanted.items()
        if (found := uri.read_bytes(uri.join(url, path))) != content
    ]


def _check(place: str, record: ObjectRecord, *, full: bool) -> str | None:
    """What is wrong with one object; None where nothing is."""
    if not full:
        size = uri.size_of(place)
        if size is None:
            return "missing"
        return None if size == record.bytes else f"{size:,} bytes instead of {record.bytes:,}"
    content = uri.read_bytes(place)
    if content is None:
        return "missing"
    if len(content) != record.bytes:
        return f"{len(content):,} bytes instead of {record.bytes:,}"
    digest = hashlib.sha256(content).hexdigest()
    return None if digest == record.sha256 else "its bytes are not those that were written (sha256 differs)"
