"""Which shards of a store are valid, and how a store becomes complete.

Written in this order, each file in one atomic step:

1. `manifest.json` with `"complete": false`: what the store is (its inputs and dimensions).
2. For each shard: its objects (one an array), then `commits/<split>-<shard>.json` with their sizes and digests.
      A shard is valid once its commit record exists, so after a kill only the shards in flight must be redone.
3. Zarr's own metadata, then `manifest.json` with `"complete": true` and all the records folded in, after a copy of it
   (`copy/manifest.json`); `commits/` is then removed.

A complete store is therefore opened with one read, regardless of its number of shards, and an incomplete one is resumed
with one listing. Writers of different shards do not conflict, because they write different files;
`storage.files.claims` decides who writes which shard.

Manifest and records are sealed (`storage.files.sealed`), and `storage.stores.schema` bounds their values. A manifest's
fingerprint must match the inputs in it and the name of its folder. If `manifest.json` is lost or damaged, `ddk verify
--repair` restores it from its copy, so that hours of GPU time do not depend on one small file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from ddk.values import SPLITS, Split
from storage.errors import StoreDamagedError, StoreMissingError
from storage.files import uri
from storage.files.claims import remove_claims
from storage.files.fields import first_problem
from storage.files.sealed import Sealed
from storage.fingerprint import differences, fingerprint
from storage.stores.codec import PLAIN, TargetFormat
from storage.stores.layout import FORMAT_VERSION, Kind, array_specs, encode_shard, group_metadata, shard_key
from storage.stores.schema import (
    Manifest,
    ObjectRecord,
    ShardRecord,
    SplitManifest,
    array_names,
    belonging,
    check_shard,
)

MANIFEST, COPY = "manifest.json", "copy/manifest.json"
STAGE: dict[Kind, str] = {
    "blocks": "ddk pack",
    "targets": "ddk cache",
    "scores": "ddk select",
    "selections": "ddk select",
}
"""The command that makes a store."""
_MANIFEST = Sealed(
    what="manifest",
    version=FORMAT_VERSION,
    remedy="`ddk verify {folder} --repair` restores it if possible; otherwise remove {folder} and run the stage again",
)
_COMMIT = Sealed(
    what="commit record",
    version=FORMAT_VERSION,
    remedy="remove it and run the stage again: only this shard is recreated",
)


def read_manifest(url: str) -> Manifest | None:
    """The manifest of the store at `url`, complete or not; None where there is none.

    Raises:
        FormatVersionError: written by another version.
        StoreDamagedError: there, but not what was written, or of another store; or lost, where its copy is there.
    """
    found = stored_manifest(url, MANIFEST)
    if found is None and uri.size_of(uri.join(url, COPY)) is not None:
        raise _MANIFEST.damaged(uri.join(url, MANIFEST), "it is missing, and its copy is there")
    return found


def stored_manifest(url: str, name: str) -> Manifest | None:
    """The manifest at one of the two places, `MANIFEST` or `COPY`; None if there is none.

    Raises:
        FormatVersionError, StoreDamagedError: as `read_manifest`.
    """
    place = uri.join(url, name)
    content = _MANIFEST.read(place)
    if content is None:
        return None
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise _MANIFEST.damaged(place, first_problem(error)) from None
    if (why := belonging(manifest, url)) is not None:
        raise _MANIFEST.damaged(place, why)
    return manifest


def sound_copy(url: str) -> Manifest | None:
    """The manifest of a complete store, read from its copy; None if the copy is missing or damaged."""
    try:
        copy = stored_manifest(url, COPY)
    except StoreDamagedError:
        return None
    return copy if copy is not None and copy.complete else None


def write_manifest(url: str, manifest: Manifest) -> None:
    """The copy first, where the store is complete; an unfinished one has none."""
    content, of = manifest.model_dump(), f"{manifest.kind} {manifest.fingerprint}/{manifest.name}"
    if manifest.complete:
        _MANIFEST.write(uri.join(url, COPY), content, of)
    _MANIFEST.write(uri.join(url, MANIFEST), content, of)


def require_complete(url: str, kind: Kind) -> Manifest:
    """The manifest of a complete store of this kind.

    Raises:
        StoreMissingError: none there, not finished, or of the other kind.
    """
    stage = STAGE[kind]
    manifest = read_manifest(url)
    if manifest is None:
        raise StoreMissingError(f"there is no store at {url}; run `{stage}` first, or correct the URL")
    if manifest.kind != kind:
        raise StoreMissingError(f"the store at {url} holds {manifest.kind}, not {kind}; correct the URL")
    if not manifest.complete:
        raise StoreMissingError(f"the store at {url} is not finished; run `{stage}` again, it resumes where it stopped")
    return manifest


def store_attributes(manifest: Manifest) -> dict[str, Any]:
    """The attributes of the root group, which describe the store to readers that do not know the manifest."""
    # Sorted: the dimensions of a store that was resumed come in the order in which JSON had them.
    dims = dict(sorted(manifest.dims.items()))
    return {"ddk": {"format_version": manifest.format_version, "kind": manifest.kind, "dims": dims}}


def write_commit(url: str, manifest: Manifest, split: Split, shard: int, record: ShardRecord) -> None:
    """From here on the shard counts."""
    _COMMIT.write(_commit_url(url, split, shard), record.model_dump(), _commit_of(manifest, split, shard))


def read_commits(url: str, manifest: Manifest, split: Split, shards: list[int]) -> dict[int, ShardRecord]:
    """The commit records of the shards, where they are there.

    Raises:
        StoreDamagedError: one is not what was written, or of another shard or store.
    """
    places = [_commit_url(url, split, shard) for shard in shards]
    contents = _COMMIT.read_many(places, [_commit_of(manifest, split, shard) for shard in shards])
    names = array_names(manifest)
    found: dict[int, ShardRecord] = {}
    for shard, place, content in zip(shards, places, contents, strict=True):
        if content is None:
            continue
        content.pop("format_version")
        try:
            record = ShardRecord.model_validate(content)
            check_shard(record, manifest.dims, names)
        except (ValidationError, ValueError) as error:
            raise _COMMIT.damaged(place, first_problem(error)) from None
        found[shard] = record
    return found


def committed_numbers(url: str, split: Split) -> list[int]:
    """The shards whose commit records are there, by their files' names."""
    names = uri.list_names(uri.join(url, "commits"))
    numbers = (name.removeprefix(f"{split}-").removesuffix(".json") for name in names if name.startswith(f"{split}-"))
    return [int(number) for number in numbers if number.isdecimal()]


def remove_commit(url: str, split: Split, shard: int) -> None:
    """From here on the shard does not count."""
    uri.remove_file(_commit_url(url, split, shard))


def _commit_of(manifest: Manifest, split: Split, shard: int) -> str:
    return f"{split} shard {shard} of {manifest.kind} {manifest.fingerprint}/{manifest.name}"


def _commit_url(url: str, split: Split, shard: int) -> str:
    return uri.join(url, "commits", f"{split}-{shard:08d}.json")


class StoreWriter:
    """Writes one store, or completes one that was left unfinished.

    Args:
        url: the store's folder.
        inputs: everything that determines the store's bytes; see `storage.fingerprint`.
        dims: see `Manifest.dims`.
        form: of targets; None keeps the top k as they are (`storage.stores.codec.PLAIN`).
    """

    def __init__(
        self,
        url: str,
        kind: Kind,
        inputs: Mapping[str, Any],
        dims: Mapping[str, int],
        form: TargetFormat | None = None,
    ) -> None:
        self.url = url
        self._specs = array_specs(kind, dims, form)
        self._own: dict[tuple[Split, int], ShardRecord] = {}
        self._shard_blocks = dims["shard_blocks"]
        header = Manifest(
            format_version=FORMAT_VERSION,
            kind=kind,
            name=uri.name_of(url),
            fingerprint=fingerprint(inputs),
            inputs=dict(inputs),
            dims=dict(dims),
            targets=(form or PLAIN) if kind == "targets" else None,
            complete=False,
        )
        found = read_manifest(url)
        if found is None:
            write_manifest(url, header)
            found = header
        # A store's folder is named by its fingerprint: the same inputs, and yet something else is to be made of them.
        what = {"kind", "fingerprint", "inputs", "dims", "targets"}
        # Both as JSON, where a tuple is a list.
        stored, wanted = (m.model_dump(mode="json", include=what) for m in (found, header))
        if differing := differences(stored, wanted):
            raise StoreDamagedError(f"{url} holds another store ({'; '.join(differing)}); remove that folder")
        self.manifest = found

    def committed(self, split: Split) -> dict[int, ShardRecord]:
        """The shards that count, by number.

        Raises:
            StoreDamagedError: a commit record is not what was written.
        """
        if self.manifest.complete:
            return dict(enumerate(self.manifest.splits[split].shards))
        numbers = committed_numbers(self.url, split)
        # What this writer has committed itself it need not read again: a large store has many records.
        foreign = [number for number in numbers if (split, number) not in self._own]
        # One is missing where another writer has completed the store meanwhile, and removed the records.
        read = read_commits(self.url, self.manifest, split, foreign)
        return {n: read.get(n) or self._own[split, n] for n in numbers if n in read or (split, n) in self._own}

    def is_missing(self, split: Split, shard: int) -> bool:
        """Whether nobody has committed the shard, nor completed the store, up to now."""
        if uri.size_of(_commit_url(self.url, split, shard)) is not None:
            return False
        return not self.completed_by_another()

    def completed_by_another(self) -> bool:
        """Whether the store is complete by now; looks again."""
        if not self.manifest.complete:
            found = read_manifest(self.url)
            if found is not None and found.complete:
                self.manifest = found
        return self.manifest.complete

    def write_shard(
        self,
        split: Split,
        shard: int,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        facts: Mapping[str, Any] | None = None,
    ) -> ShardRecord:
        """Encode, write and commit one shard.

        Args:
            arrays: for each array of the store, its blocks [n, …] of this shard.

        Raises:
            ValueError: the arrays are not those of the store, or the store is complete.
        """
        if self.manifest.complete:
            raise ValueError(f"{self.url} is complete; its shards are never written again")
        objects: dict[str, ObjectRecord] = {}
        blocks = {len(data) for data in arrays.values()}
        if set(arrays) != {spec.name for spec in self._specs} or len(blocks) != 1:
            raise ValueError(f"a shard takes {[s.name for s in self._specs]}, all of equal length; got {list(arrays)}")
        for spec in self._specs:
            content = encode_shard(spec, arrays[spec.name], self._shard_blocks)
            uri.write_bytes(uri.join(self.url, split, spec.name, shard_key(spec, shard)), content)
            objects[spec.name] = ObjectRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        record = ShardRecord(blocks=blocks.pop(), objects=objects, facts=dict(facts or {}))
        write_commit(self.url, self.manifest, split, shard, record)
        self._own[split, shard] = record
        return record

    def finish(self, facts: Mapping[str, Any] | None = None) -> Manifest:
        """Declare the store complete; every shard from 0 to the last must be committed, full but for the last.

        Where another writer has done so meanwhile, its manifest is returned unchanged. One at a time: see
        `storage.files.claims`.

        Raises:
            ValueError: one is not.
        """
        committed = {split: self.committed(split) for split in SPLITS}
        if self.completed_by_another():  # looked at after the records, which go once the store is complete
            remove_claims(self.url)  # those of who came too late
            return self.manifest
        splits: dict[Split, SplitManifest] = {}
        for split, records in committed.items():
            shards = tuple(records[i] for i in sorted(records))
            if sorted(records) != list(range(len(records))) or any(s.blocks != self._shard_blocks for s in shards[:-1]):
                raise ValueError(f"{self.url} lacks shards of '{split}'; committed are {sorted(records)}")
            splits[split] = SplitManifest(blocks=sum(s.blocks for s in shards), shards=shards)
        manifest = self.manifest.model_copy(update={"complete": True, "splits": splits, "facts": dict(facts or {})})
        counts = {split: splits[split].blocks for split in SPLITS}
        metadata = group_metadata(self._specs, counts, self._shard_blocks, store_attributes(manifest))
        for key, content in metadata.items():
            uri.write_bytes(uri.join(self.url, key), content)
        uri.remove_temporaries(self.url)
        write_manifest(self.url, manifest)
        uri.remove_tree(uri.join(self.url, "commits"))
        remove_claims(self.url)
        self.manifest = manifest
        return manifest
