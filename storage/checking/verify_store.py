"""Checks whether a store is unchanged, and prepares its damaged shards to be recreated.

    fast   every object, including Zarr's metadata, exists and has the size in the manifest
    full   in addition, every object has the sha256 in the manifest; this finds any flipped byte, and an intact shard
           that belongs elsewhere

In an unfinished store, the committed shards are checked in the same way.

Repair needs no teacher and no corpus. It removes the damaged shards from the manifest, so that the store is unfinished
and the stage that wrote it (`ddk pack`, `ddk cache`) recreates exactly these shards. If either the manifest or its copy
is lost or damaged, it is restored from the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from ddk.values import SPLITS, Split
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.stores.layout import array_specs, group_metadata, shard_key
from storage.stores.manifest import (
    COPY,
    MANIFEST,
    committed_numbers,
    read_commits,
    remove_commit,
    store_attributes,
    stored_manifest,
    write_commit,
    write_manifest,
)
from storage.stores.schema import Manifest, ObjectRecord, ShardRecord

_AT_ONCE = 16
"""Objects that are read concurrently; bounds memory to so many shards."""

Shards = Mapping[Split, Mapping[int, ShardRecord]]
"""The shards that count, by split and number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One object that is not what was written."""

    split: Split | None
    """None for Zarr's own metadata, and for the manifest."""
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
    """Everything that is wrong with a store.

    Args:
        manifest: the store's, as `storage.stores.manifest.read_manifest` has it.
        full: read every byte, not only the sizes.
        on_object: hears the bytes of each object that was checked.
    """
    shards, damages = shards_that_count(url, manifest)
    if manifest.complete:
        damages += [*_manifest_damages(url), *_metadata_damages(url, manifest)]
    objects = _objects(manifest, shards)
    with ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="ddk-verify") as executor:
        # In portions: a store of 100,000 shards must not become as many waiting futures.
        while portion := list(islice(objects, 64 * _AT_ONCE)):
            checks = executor.map(lambda entry: _check(uri.join(url, entry[2]), entry[3], full=full), portion)
            for (split, shard, path, record), what in zip(portion, checks, strict=True):
                on_object(record.bytes)
                if what is not None:
                    damages.append(Damage(split=split, shard=shard, path=path, what=what))
    return damages


def shards_that_count(url: str, manifest: Manifest) -> tuple[Shards, list[Damage]]:
    """The valid shards of a store, finished or not, and the commit records that are damaged."""
    if manifest.complete:
        return {split: dict(enumerate(manifest.splits[split].shards)) for split in SPLITS}, []
    shards: dict[Split, dict[int, ShardRecord]] = {split: {} for split in SPLITS}
    damages: list[Damage] = []
    for split in SPLITS:
        for number in committed_numbers(url, split):
            try:
                shards[split] |= read_commits(url, manifest, split, [number])
            except StoreDamagedError as error:
                path = f"commits/{split}-{number:08d}.json"
                damages.append(Damage(split=split, shard=number, path=path, what=str(error)))
    return shards, damages


def uncommit(url: str, manifest: Manifest, damages: Sequence[Damage]) -> dict[Split, list[int]]:
    """Remove the damaged shards of a store, so that the stage recreates them, and write the manifest again.

    In this order, so that a kill between any two steps leaves a store that is either complete as before or
    unfinished with every good shard committed: commit records of the good shards, the manifest, the damaged objects.

    Returns:
        The shards that the stage will make again, by split. Of token blocks these are all from the first damaged one
        on: each shard says where in the corpus the next one begins.

    Raises:
        StoreDamagedError: an object lies outside the store, behind a symbolic link; it is not touched.
    """
    shards, _ = shards_that_count(url, manifest)
    redone = _to_be_redone(manifest, shards, damages)
    objects = _objects_of(url, manifest, redone)
    if manifest.complete and not redone and not any(_is_metadata(damage) for damage in damages):
        write_manifest(url, manifest)  # it, or its copy, was all that was wrong
        return {}
    if manifest.complete:
        for split in SPLITS:
            for number, record in shards[split].items():
                if number not in redone.get(split, []):
                    write_commit(url, manifest, split, number, record)
        uri.remove_file(uri.join(url, COPY))
        write_manifest(url, manifest.model_copy(update={"complete": False, "splits": {}, "facts": {}}))
    else:
        for split, numbers in redone.items():
            for number in numbers:
                remove_commit(url, split, number)
    for place in objects:
        uri.remove_file(place)
    return redone


def _to_be_redone(manifest: Manifest, shards: Shards, damages: Sequence[Damage]) -> dict[Split, list[int]]:
    redone: dict[Split, list[int]] = {}
    for split in SPLITS:
        damaged = sorted({d.shard for d in damages if d.split == split and d.shard is not None})
        if damaged and manifest.kind == "blocks":
            damaged = [number for number in sorted({*shards[split], *damaged}) if number >= damaged[0]]
        if damaged:
            redone[split] = damaged
    return redone


def _objects_of(url: str, manifest: Manifest, shards: Mapping[Split, Sequence[int]]) -> list[str]:
    """URLs of the shards' objects, all of them below the store's folder."""
    objects = [
        uri.join(url, shard_path(manifest, split, spec.name, number))
        for split, numbers in shards.items()
        for number in numbers
        for spec in array_specs(manifest.kind, manifest.dims, manifest.targets)
    ]
    for place in objects:
        if not uri.lies_below(place, url):
            raise StoreDamagedError(
                f"{place} lies outside {url}, behind a symbolic link, and is not touched; put the real folder in the "
                f"link's place"
            )
    return objects


def total_bytes(url: str, manifest: Manifest) -> int:
    """Of all shard objects that count."""
    return sum(record.bytes for *_, record in _objects(manifest, shards_that_count(url, manifest)[0]))


def shard_path(manifest: Manifest, split: Split, name: str, shard: int) -> str:
    """Of one array's object, below the store."""
    specs = array_specs(manifest.kind, manifest.dims, manifest.targets)
    spec = next(spec for spec in specs if spec.name == name)
    return f"{split}/{name}/{shard_key(spec, shard)}"


def _objects(manifest: Manifest, shards: Shards) -> Iterator[tuple[Split, int, str, ObjectRecord]]:
    for split in SPLITS:
        for number, shard in sorted(shards[split].items()):
            for name, record in shard.objects.items():
                yield split, number, shard_path(manifest, split, name, number), record


def _manifest_damages(url: str) -> list[Damage]:
    """Of a complete store whose manifest could be read: from one of the two places, at least."""
    damages, found = [], []
    for name in (MANIFEST, COPY):
        what = None
        try:
            found.append(stored_manifest(url, name))
            if found[-1] is None:
                what = "missing"
        except StoreDamagedError as error:
            what = str(error)
        if what is not None:
            damages.append(Damage(split=None, shard=None, path=name, what=what))
    if not damages and found[0] != found[1]:
        damages.append(Damage(split=None, shard=None, path=COPY, what="not the same as the manifest"))
    return damages


def _is_metadata(damage: Damage) -> bool:
    return damage.split is None and damage.path not in (MANIFEST, COPY)


def _metadata_damages(url: str, manifest: Manifest) -> list[Damage]:
    specs = array_specs(manifest.kind, manifest.dims, manifest.targets)
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
