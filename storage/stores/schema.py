"""The schema of manifests and commit records: their fields, and the bounds of every number in them.

Readers use these numbers to allocate memory, to divide and as indices, so all of them are checked when a file is read,
before any is used. The bounds lie far beyond any real store; they prevent a foreign or edited file from requesting
terabytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ddk.values import SPLITS, Split
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.fields import Digest, Whole
from storage.fingerprint import fingerprint
from storage.stores.codec import Distortion, TargetFormat
from storage.stores.layout import INDEX_ENTRY, KINDS, Kind, array_specs, is_marked

MOST_SHARD_BLOCKS = 1 << 20
MOST_OBJECT_BYTES = 1 << 40
MOST_BLOCK_BYTES = 1 << 30
"""Of one block's part of one array, decoded."""
_BOUNDS = {
    "seq_len": 1 << 24,
    "vocab_size": 1 << 27,
    "k": 1 << 24,
    "shard_blocks": MOST_SHARD_BLOCKS,
    "marked": 1,
    "models": 10**4,
}
_OF_BLOCKS = {"seq_len", "vocab_size", "shard_blocks"}
_NEEDED = {
    "blocks": _OF_BLOCKS,
    "targets": _OF_BLOCKS | {"k"},
    "scores": _OF_BLOCKS | {"models"},
    "selections": _OF_BLOCKS,
}
_LEAST_LOGPROB = -1e6
"""Of a mean over positions; float32 holds no smaller one that is finite and makes sense."""
_FINGERPRINTED = re.compile(r"([0-9a-f]{16})(\.\d+)?")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ObjectRecord(_Frozen):
    """One written object: how large it is and what it must hash to."""

    bytes: Annotated[int, Field(gt=0, le=MOST_OBJECT_BYTES, strict=True)]
    sha256: Digest


class ShardRecord(_Frozen):
    """One committed shard."""

    blocks: Annotated[int, Field(gt=0, le=MOST_SHARD_BLOCKS, strict=True)]
    objects: dict[str, ObjectRecord]
    """By the array's name."""
    facts: dict[str, Any] = {}
    """What else its writer wants to find again, e.g. where in the corpus the next shard starts."""

    @model_validator(mode="after")
    def _facts_are_what_they_are_taken_for(self) -> ShardRecord:
        for name in ("tail_mass_sum", "true_logprob_sum"):
            value = self.facts.get(name, 0.0)
            impossible = -math.inf if name == "true_logprob_sum" else 0.0  # a token to which the teacher gives nothing
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not (math.isfinite(value) or value == impossible):
                raise ValueError(f"{name} is {str(value)[:40]}, which is no finite number")
        with_loss = self.facts.get("with_loss", 0)
        if isinstance(with_loss, bool) or not isinstance(with_loss, int) or with_loss < 0:
            raise ValueError("with_loss is no count")
        if self.facts.get("distortion") is not None:
            _check_distortion(self.facts["distortion"])
        return self


class SplitManifest(_Frozen):
    blocks: Whole
    shards: tuple[ShardRecord, ...]


class Manifest(_Frozen):
    """The content of `manifest.json`."""

    format_version: int
    kind: Kind
    name: Annotated[str, StringConstraints(min_length=1, max_length=255)]
    """Of the store's folder: `math.zarr`."""
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    inputs: dict[str, Any]
    """Everything that the fingerprint covers."""
    dims: dict[str, Whole]
    """`seq_len`, `vocab_size`, `shard_blocks`; for targets also `k`, for blocks with marked prompts also `marked`,
    for scores also `models`."""
    targets: TargetFormat | None = None
    """What is kept of a position, and how; None but for targets."""
    complete: bool
    splits: dict[Split, SplitManifest] = {}
    facts: dict[str, Any] = {}
    """Measured while writing, and no part of the fingerprint: documents read, tokens, seconds."""

    @model_validator(mode="after")
    def _dimensions_can_be_read(self) -> Manifest:
        check_dims(self.kind, self.dims, self.targets)
        if (self.targets is None) == (self.kind == "targets"):
            raise ValueError("targets: a store of targets says what it keeps, and no other store does")
        if self.fingerprint != fingerprint(self.inputs):
            raise ValueError("fingerprint: it is not that of the inputs")
        return self

    @model_validator(mode="after")
    def _shards_make_up_the_splits(self) -> Manifest:
        if set(self.splits) != (set(SPLITS) if self.complete else set()):
            raise ValueError("splits: a complete store has both, and an unfinished one none")
        full, names = self.dims["shard_blocks"], array_names(self)
        for split, part in self.splits.items():
            if part.blocks != sum(shard.blocks for shard in part.shards):
                raise ValueError(f"splits.{split}.blocks: {part.blocks}, and its shards have another sum")
            if any(shard.blocks != full for shard in part.shards[:-1]):
                raise ValueError(f"splits.{split}.shards: one before the last has not {full} blocks")
            for shard in part.shards:
                check_shard(shard, self.dims, names)
        return self

    @property
    def form(self) -> TargetFormat | None:
        """`targets`."""
        return self.targets

    def positions(self, split: Split) -> int:
        """Number of positions of a split that carry loss, in a complete store of blocks."""
        if is_marked(self.dims):
            return int(self.total("with_loss", split))
        return self.splits[split].blocks * self.dims["seq_len"]

    def total(self, fact: str, split: Split | None = None) -> float:
        """Sum of one of the shards' facts, over one split or all.

        Raises:
            StoreDamagedError: a shard does not have it.
        """
        chosen = self.splits.values() if split is None else [self.splits[split]]
        try:
            return float(sum(shard.facts[fact] for part in chosen for shard in part.shards))
        except (KeyError, OverflowError):
            raise StoreDamagedError(
                f"the manifest of {self.kind} {self.fingerprint}/{self.name} does not say {fact} of every shard; "
                f"make the store again with --force"
            ) from None


def check_dims(kind: Kind, dims: Mapping[str, int], form: TargetFormat | None) -> None:
    """That arrays of these dimensions can exist.

    Raises:
        ValueError: a dimension is missing, or beyond its bound.
    """
    if missing := sorted(_NEEDED[kind] - set(dims)):
        raise ValueError(f"dims: there is no {missing[0]}")
    if unknown := sorted(set(dims) - set(_BOUNDS)):
        raise ValueError(f"dims: there is no '{unknown[0][:40]}'")
    for name, value in dims.items():
        least = 0 if name == "marked" else 1
        if not least <= value <= _BOUNDS[name]:
            raise ValueError(f"dims.{name}: it is {value}, and must lie between {least} and {_BOUNDS[name]:,}")
    if kind == "targets" and dims["k"] > dims["vocab_size"]:
        raise ValueError(f"dims.k: it is {dims['k']}, and there are {dims['vocab_size']} tokens")
    for spec in array_specs(kind, dims, form):
        if (size := spec.block_bytes) > MOST_BLOCK_BYTES:
            raise ValueError(f"dims: a block's part of '{spec.name}' would have {size:,} bytes")


def array_names(manifest: Manifest) -> frozenset[str]:
    """Of the arrays of a store."""
    return frozenset(spec.name for spec in array_specs(manifest.kind, manifest.dims, manifest.targets))


def check_shard(shard: ShardRecord, dims: Mapping[str, int], names: frozenset[str]) -> None:
    """That a shard has the objects of its store's arrays, and no more blocks than a shard of it holds.

    Args:
        dims: of the store.
        names: `array_names` of the store.

    Raises:
        ValueError: it does not.
    """
    full = dims["shard_blocks"]
    if shard.objects.keys() != names:
        raise ValueError(f"objects: there are {sorted(shard.objects)}, and a shard has {sorted(names)}")
    if shard.blocks > full:
        raise ValueError(f"blocks: {shard.blocks} in a shard of {full}")
    if smallest := [name for name, record in shard.objects.items() if record.bytes < INDEX_ENTRY * full + 4]:
        raise ValueError(f"objects.{smallest[0]}.bytes: fewer than the shard's index alone takes")
    positions = shard.blocks * dims["seq_len"]
    mean = shard.facts.get("true_logprob_sum", 0.0) / positions
    if not (_LEAST_LOGPROB <= mean <= 1e-3 or mean == -math.inf):
        raise ValueError(f"facts.true_logprob_sum: a mean log-probability of {mean:.3g} cannot be")
    if not -1e-3 <= shard.facts.get("tail_mass_sum", 0.0) / positions <= 1.0 + 1e-3:
        raise ValueError("facts.tail_mass_sum: more than the positions' whole probability")
    if shard.facts.get("with_loss", 0) > positions:
        raise ValueError("facts.with_loss: more than there are positions")


def _check_distortion(stored: Any) -> None:
    try:
        found = Distortion.from_json(stored)
        numbers = [found.count, found.total, found.largest, *found.histogram.values()]
        sound = all(isinstance(one, int | float) and math.isfinite(one) and one >= 0 for one in numbers)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        sound = False
    if not sound:
        raise ValueError("distortion is not what was measured")


def belonging(manifest: Manifest, url: str) -> str | None:
    """The reason why a manifest cannot belong to the store at `url`; None if it can.

    If the store's folder is named by a fingerprint, the manifest must match it. A store elsewhere (a copy, say) is
    not checked.
    """
    parts = url.rstrip("/").split("/")
    named = _FINGERPRINTED.fullmatch(parts[-2]) if len(parts) > 1 else None
    if named is None:
        return None
    wanted = (named[1], uri.name_of(url))
    if (manifest.fingerprint, manifest.name) != wanted:
        return (
            f"it is that of {manifest.fingerprint}/{manifest.name}, and this is the place of {'/'.join(wanted)}: "
            f"folders were exchanged or moved"
        )
    if len(parts) > 2 and parts[-3] in KINDS and parts[-3] != manifest.kind:
        return f"it is of {manifest.kind}, and lies among {parts[-3]}"
    return None
