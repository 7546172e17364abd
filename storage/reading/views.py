"""Read-only views of complete stores: token blocks and teacher targets of one domain and split.

A view reads the manifest once, when it is opened. Reading blocks fetches their inner chunks only, each checked
against its crc32c; what is missing or damaged is an error that names the store, the array and the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk.values import BoolArray, Float32Array, Int32Array, SparseTargets, Split
from storage.errors import StoreDamagedError
from storage.reading.shards import ShardDamagedError, ShardReader
from storage.stores import compact
from storage.stores.codec import PLAIN, UNKNOWN_TRUE_LOGPROB, TargetFormat, decode, no_tokens
from storage.stores.layout import Kind, array_specs, is_marked
from storage.stores.manifest import STAGE, require_complete
from storage.stores.schema import Manifest

Indices = Sequence[int] | npt.NDArray[np.int64]


class _View:
    """What both kinds of view share: the manifest, and checked reads of one split's arrays."""

    kind: Kind

    def __init__(self, url: str, split: Split) -> None:
        self.url = url
        self.split = split
        self.manifest: Manifest = require_complete(url, self.kind)
        self._blocks = self.manifest.splits[split].blocks
        # The arrays are described by the format's table, not by their `zarr.json`: nothing else is read to open a
        # store, and nothing else can be damaged.
        self._specs = array_specs(self.kind, self.manifest.dims, self.manifest.form)
        self._names = tuple(spec.name for spec in self._specs)
        records = self.manifest.splits[split].shards
        self._reader = ShardReader(url, split, self._specs, records, self.shard_blocks)

    def __len__(self) -> int:
        """Number of blocks."""
        return self._blocks

    @property
    def seq_len(self) -> int:
        """Predictions in a block, L."""
        return self.manifest.dims["seq_len"]

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, V; every id is below it."""
        return self.manifest.dims["vocab_size"]

    @property
    def shard_blocks(self) -> int:
        """Blocks of a shard; the last may have fewer."""
        return self.manifest.dims["shard_blocks"]

    @property
    def block_bytes(self) -> int:
        """Bytes of one decoded block; given by the format, independent of the compression."""
        return sum(spec.block_bytes for spec in self._specs)

    def fetch(self, indices: Indices) -> bool:
        """Copy the shards of the given blocks to the local disk, for a later read; nothing is decoded.

        Returns:
            False where there is no room for all of them before more of what was fetched so has been read. True where
            nothing is copied: from a local store, or without `storage.reading.shard_cache`.

        Raises:
            FileNotFoundError, UnreachableError: a shard cannot be had; reading it says more.
        """
        return self._reader.fetch(self._names, self._checked(indices))

    def _checked(self, indices: Indices) -> npt.NDArray[np.int64]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"blocks {wanted.min()} to {wanted.max()} of {self.url} ({self.split}), of {len(self)}")
        return wanted

    def _read(self, names: Sequence[str], indices: Indices) -> dict[str, np.ndarray[Any, Any]]:
        wanted = self._checked(indices)
        try:
            return self._reader.read(names, wanted)
        except ShardDamagedError as error:
            raise self._damaged(error.name, error.shards, str(error)) from error

    def _damaged(self, name: str, shards: list[int], why: str) -> StoreDamagedError:
        stage = STAGE[self.kind]
        return StoreDamagedError(
            f"{self.url}: array '{self.split}/{name}' is damaged in shard {', '.join(map(str, shards))} ({why}); "
            f"`ddk verify {self.url} --repair` and then `{stage}` make it anew"
        )


class BlockView(_View):
    """Token blocks of one split."""

    kind = "blocks"

    def read(self, indices: Indices) -> Int32Array:
        """Tokens [n, L + 1] int32 of the given blocks, in the given order.

        Raises:
            StoreDamagedError: a checksum does not hold, a block is missing, or a token is none of the tokenizer's.
        """
        tokens = self._read(["tokens"], indices)["tokens"]
        if strange := no_tokens(tokens, self.vocab_size):
            wrong = sorted({int(np.asarray(indices)[row]) // self.shard_blocks for row in strange})
            raise self._damaged("tokens", wrong, "it holds ids that are no tokens")
        return tokens

    @property
    def marked(self) -> bool:
        """Whether some positions carry no loss: those whose label is a prompt's token."""
        return is_marked(self.manifest.dims)

    def loss_mask(self, indices: Indices) -> BoolArray | None:
        """[n, L] of the given blocks, true where position j's label (token j + 1) carries loss; None: all do.

        Raises:
            StoreDamagedError: as `read`.
        """
        if not self.marked:
            return None
        # Stored for each token; a block's first is no position's label.
        return np.asarray(self._read(["loss"], indices)["loss"][:, 1:] == 1)


class TargetView(_View):
    """Teacher targets of one split."""

    kind = "targets"

    @property
    def k(self) -> int:
        """Stored entries a position."""
        return self.manifest.dims["k"]

    @property
    def form(self) -> TargetFormat:
        """What is kept of a position, and how."""
        return self.manifest.form or PLAIN

    def read(self, indices: Indices) -> SparseTargets:
        """Targets of the given blocks, in the given order: ids [n, L, K] int32, logprobs [n, L, K] float32,
        tail_mass and true_logprobs [n, L] float32, and what else the store keeps.

        Raises:
            StoreDamagedError: a checksum does not hold, or a block is missing.
        """
        arrays = self._read(self._names, indices)
        try:
            return decode(arrays, self.form, self.k, self.vocab_size)
        except ValueError as error:  # numbers that no encoder writes
            shards = sorted({int(block) // self.shard_blocks for block in np.asarray(indices)})
            raise self._damaged(self._names[0], shards, str(error)) from error

    def true_logprobs(self, indices: Indices | None = None) -> Float32Array:
        """Log-probabilities [n, L] float32 of the true tokens, NaN where unknown; of all blocks by default."""
        chosen = np.arange(len(self)) if indices is None else indices
        if self.form.codec.name == "exact":
            found = self._read(["true_logprobs"], chosen)["true_logprobs"]
            return np.where(found == UNKNOWN_TRUE_LOGPROB, np.float32(np.nan), found)
        return compact.true_logprobs(self._read(["scalars"], chosen)["scalars"])


class ScoreView(_View):
    """Mean token losses of the train blocks of a domain under one or several models."""

    kind = "scores"

    def read(self) -> Float32Array:
        """Losses [N, C] float32 of all blocks under each model, in nats.

        Raises:
            StoreDamagedError: a checksum does not hold, or a shard is missing.
        """
        return np.asarray(self._read(["losses"], np.arange(len(self)))["losses"])


class SelectionView(_View):
    """The train blocks of a domain that were kept, and what they were chosen by."""

    kind = "selections"

    def read(self) -> tuple[npt.NDArray[np.int64], Float32Array]:
        """Indices [M], ascending, and scores [M] float32.

        Raises:
            StoreDamagedError: a checksum does not hold, a shard is missing, or the indices are no selection.
        """
        found = self._read(self._names, np.arange(len(self)))
        indices = found["indices"].astype(np.int64)
        if np.any(np.diff(indices) <= 0):
            raise self._damaged("indices", [0], "its indices do not ascend")
        return indices, np.asarray(found["scores"])
