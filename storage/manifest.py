"""Which shards of a store count, and how a store comes to be complete.

Written in this order, each file in one atomic step:

1. `manifest.json` with `"complete": false`: what the store is (its inputs and dimensions).
2. For each shard: its objects (one an array), then `commits/<split>-<shard>.json` with their sizes and digests.
   A shard counts when its commit record is there, so a kill leaves at most the shards in flight to redo.
3. Zarr's own metadata, then `manifest.json` with `"complete": true` and all the records folded in; `commits/` goes.

So a complete store is opened with one read, however many shards it has, and an incomplete one is resumed with one
listing. Writers of different shards do not meet: they write different files. Who writes which is agreed in
`storage.claims`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from ddk.types import SPLITS, Split
from storage import uri
from storage.claims import remove_claims
from storage.codec import FORMAT_1, TargetFormat
from storage.errors import FormatVersionError, StoreDamagedError, StoreMissingError
from storage.fingerprint import differences, fingerprint
from storage.layout import (
    FORMAT_VERSION,
    Kind,
    array_specs,
    encode_shard,
    format_version,
    group_metadata,
    is_marked,
    shard_key,
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ObjectRecord(_Frozen):
    """One written object: how large it is and what it must hash to."""

    bytes: int
    sha256: str


class ShardRecord(_Frozen):
    """One committed shard."""

    blocks: int
    objects: dict[str, ObjectRecord]
    """By the array's name."""
    facts: dict[str, Any] = {}
    """What else its writer wants to find again, e.g. where in the corpus the next shard starts."""


class SplitManifest(_Frozen):
    blocks: int
    shards: tuple[ShardRecord, ...]


class Manifest(_Frozen):
    """The content of `manifest.json`."""

    format_version: int
    kind: Kind
    fingerprint: str
    inputs: dict[str, Any]
    """Everything that the fingerprint covers."""
    dims: dict[str, int]
    """`seq_len`, `vocab_size`, `shard_blocks`; for targets also `k`, for blocks with marked prompts also `marked`."""
    targets: TargetFormat | None = None
    """What is kept of a position, and how; None for token blocks, and for targets of format 1."""
    complete: bool
    splits: dict[Split, SplitManifest] = {}
    facts: dict[str, Any] = {}
    """Measured while writing, and no part of the fingerprint: documents read, tokens, seconds."""

    @property
    def form(self) -> TargetFormat | None:
        """`targets`, with format 1 spelt out; None for token blocks."""
        return (self.targets or FORMAT_1) if self.kind == "targets" else None

    def as_json(self) -> dict[str, Any]:
        """What is stored. Format 1 has no word of a form, and its readers would refuse one."""
        return self.model_dump(exclude={"targets"} if self.targets is None else None)

    def positions(self, split: Split) -> int:
        """Of a complete store of blocks: how many positions of a split carry loss."""
        if is_marked(self.dims):
            return int(self.total("with_loss", split))
        return self.splits[split].blocks * self.dims["seq_len"]

    def total(self, fact: str, split: Split | None = None) -> float:
        """Sum of a number that every shard has among its facts, over one split or all."""
        chosen = self.splits.values() if split is None else [self.splits[split]]
        return float(sum(shard.facts[fact] for part in chosen for shard in part.shards))


def read_manifest(url: str) -> Manifest | None:
    """The manifest of the store at `url`, complete or not; None where there is none.

    Raises:
        FormatVersionError: written by a newer version.
        StoreDamagedError: there, but not readable.
    """
    place = uri.join(url, "manifest.json")
    try:
        content = uri.read_json(place)
    except StoreDamagedError as error:
        raise StoreDamagedError(f"{error}; remove the folder {url} and run the stage again") from None
    if content is None:
        return None
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{place} has format version {version}, and this version of ddk reads up to {FORMAT_VERSION}; update ddk"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StoreDamagedError(
            f"{place} is not a manifest ({where}: {first['msg']}); remove the folder {url} and run the stage again"
        ) from None


def require_complete(url: str, kind: Kind) -> Manifest:
    """The manifest of a complete store of this kind.

    Raises:
        StoreMissingError: none there, not finished, or of the other kind.
    """
    stage = {"blocks": "ddk pack", "targets": "ddk cache"}[kind]
    manifest = read_manifest(url)
    if manifest is None:
        raise StoreMissingError(f"there is no store at {url}; run `{stage}` first, or correct the URL")
    if manifest.kind != kind:
        raise StoreMissingError(f"the store at {url} holds {manifest.kind}, not {kind}; correct the URL")
    if not manifest.complete:
        raise StoreMissingError(f"the store at {url} is not finished; run `{stage}` again, it resumes where it stopped")
    return manifest


def store_attributes(manifest: Manifest) -> dict[str, Any]:
    """What the root group's attributes say of a store, for readers that do not know the manifest."""
    # Sorted: the dimensions of a store that was resumed come in the order in which JSON had them.
    dims = dict(sorted(manifest.dims.items()))
    return {"ddk": {"format_version": manifest.format_version, "kind": manifest.kind, "dims": dims}}


def write_commit(url: str, split: Split, shard: int, record: ShardRecord) -> None:
    """From here on the shard counts."""
    uri.write_json(_commit_url(url, split, shard), record.model_dump())


def _commit_url(url: str, split: Split, shard: int) -> str:
    return uri.join(url, "commits", f"{split}-{shard:08d}.json")


class StoreWriter:
    """Writes one store, or completes one that was left unfinished.

    Args:
        url: the store's folder.
        inputs: everything that determines the store's bytes; see `storage.fingerprint`.
        dims: see `Manifest.dims`.
        form: of targets; None writes format 1.
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
            format_version=format_version(form, marked=is_marked(dims)),
            kind=kind,
            fingerprint=fingerprint(inputs),
            inputs=dict(inputs),
            dims=dict(dims),
            targets=None if form == FORMAT_1 else form,
            complete=False,
        )
        found = read_manifest(url)
        if found is None:
            uri.write_json(uri.join(url, "manifest.json"), header.as_json())
            found = header
        # A store's folder is named by its fingerprint, so this is a foreign or an edited manifest.
        what = {"kind", "fingerprint", "inputs", "dims", "targets"}
        # Both as JSON, where a tuple is a list.
        stored, wanted = (m.model_dump(mode="json", include=what) for m in (found, header))
        if differing := differences(stored, wanted):
            raise StoreDamagedError(f"{url} holds another store ({'; '.join(differing)}); remove that folder")
        self.manifest = found

    def committed(self, split: Split) -> dict[int, ShardRecord]:
        """The shards that count, by number.

        Raises:
            StoreDamagedError: a commit record cannot be read.
        """
        if self.manifest.complete:
            return dict(enumerate(self.manifest.splits[split].shards))
        numbers = [
            int(name.removeprefix(f"{split}-").removesuffix(".json"))
            for name in uri.list_names(uri.join(self.url, "commits"))
            if name.startswith(f"{split}-")
        ]
        # What this writer has committed itself it need not read again: a large store has many records.
        foreign = [number for number in numbers if (split, number) not in self._own]
        try:
            contents = uri.read_jsons([_commit_url(self.url, split, number) for number in foreign])
            # None where another writer has completed the store meanwhile, and removed them.
            there = {n: c for n, c in zip(foreign, contents, strict=True) if c is not None}
            read = {n: ShardRecord.model_validate(c) for n, c in there.items()}
            return {n: read.get(n) or self._own[split, n] for n in numbers if n in read or (split, n) in self._own}
        except (StoreDamagedError, ValidationError) as error:
            why = str(error) if isinstance(error, StoreDamagedError) else error.errors()[0]["msg"]
            raise StoreDamagedError(
                f"{self.url}/commits holds what is no commit record ({why}); remove the folder {self.url} and run "
                f"the stage again"
            ) from None

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
        write_commit(self.url, split, shard, record)
        self._own[split, shard] = record
        return record

    def finish(self, facts: Mapping[str, Any] | None = None) -> Manifest:
        """Declare the store complete; every shard from 0 to the last must be committed, full but for the last.

        Where another writer has done so meanwhile, its word stands. One at a time: see `storage.claims`.

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
        uri.write_json(uri.join(self.url, "manifest.json"), manifest.as_json())
        uri.remove_tree(uri.join(self.url, "commits"))
        remove_claims(self.url)
        self.manifest = manifest
        return manifest
