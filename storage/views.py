"""Read-only views of complete stores: token blocks and teacher targets of one domain and split.

A view reads the manifest once, when it is opened. Reading blocks fetches their inner chunks only, each checked
against its crc32c; what is missing or damaged is an error that names the store, the array and the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, StorePath

from ddk.types import Float32Array, Int32Array, SparseTargets, Split
from storage import uri
from storage.errors import StoreDamagedError
from storage.layout import Kind, array_metadata, array_specs, is_absent
from storage.manifest import Manifest, require_complete

Indices = Sequence[int] | npt.NDArray[np.int64]


def _zarr_store(url: str) -> Store:
    fs, path = uri.open_fs(url)
    if uri.is_local(url):
        return LocalStore(path, read_only=True)
    return FsspecStore.from_url(url, storage_options=uri.whole_file_options(fs), read_only=True)


class _View:
    """What both kinds of view share: the manifest, and checked reads of one split's arrays."""

    kind: Kind

    def __init__(self, url: str, split: Split) -> None:
        self.url = url
        self.split = split
        self.manifest: Manifest = require_complete(url, self.kind)
        self._blocks = self.manifest.splits[split].blocks
        store = _zarr_store(url)
        # The arrays are described by the format's table, not by their `zarr.json`: nothing else is read to open a
        # store, and nothing else can be damaged.
        self._arrays: dict[str, zarr.Array[Any]] = {
            spec.name: zarr.Array(
                zarr.AsyncArray(
                    metadata=array_metadata(spec, self._blocks, self.manifest.dims["shard_blocks"]),
                    store_path=StorePath(store, f"{split}/{spec.name}"),
                )
            )
            for spec in array_specs(self.kind, self.manifest.dims)
        }

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

    def _read(self, name: str, indices: Indices) -> np.ndarray[Any, Any]:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"blocks {wanted.min()} to {wanted.max()} of {self.url} ({self.split}), of {len(self)}")
        try:
            data = self._fetch(name, wanted)
        except (ValueError, RuntimeError) as error:
            raise self._damaged(name, self._unreadable(name, wanted), str(error)) from error
        absent = is_absent(data)
        if absent.any():
            lost = wanted[absent.reshape(len(absent), -1).any(axis=1)]
            raise self._damaged(name, self._shards(lost), "never written, or lost")
        return data

    def _fetch(self, name: str, blocks: npt.NDArray[np.int64]) -> np.ndarray[Any, Any]:
        array = self._arrays[name]
        if blocks.size and np.array_equal(blocks, np.arange(blocks[0], blocks[0] + blocks.size)):
            # A run of blocks as one slice: zarr plans it much faster than a list of indices.
            return np.asarray(array[int(blocks[0]) : int(blocks[-1]) + 1])
        return np.asarray(array.oindex[blocks])

    def _shards(self, blocks: npt.NDArray[np.int64]) -> list[int]:
        return sorted({int(block) // self.manifest.dims["shard_blocks"] for block in blocks})

    def _unreadable(self, name: str, blocks: npt.NDArray[np.int64]) -> list[int]:
        """Which of the shards it is that cannot be read."""
        shards = self._shards(blocks)
        if len(shards) == 1:
            return shards
        found = []
        for shard in shards:
            try:
                self._fetch(name, np.unique(blocks[blocks // self.manifest.dims["shard_blocks"] == shard]))
            except (ValueError, RuntimeError):
                found.append(shard)
        return found or shards

    def _damaged(self, name: str, shards: list[int], why: str) -> StoreDamagedError:
        stage = "ddk pack" if self.kind == "blocks" else "ddk cache"
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
            StoreDamagedError: a checksum does not hold, or a block is missing.
        """
        return self._read("tokens", indices).astype(np.int32, copy=False)


class TargetView(_View):
    """Teacher targets of one split."""

    kind = "targets"

    @property
    def k(self) -> int:
        """Stored entries a position."""
        return self.manifest.dims["k"]

    def read(self, indices: Indices) -> SparseTargets:
        """Targets of the given blocks, in the given order: ids [n, L, K] int32, logprobs [n, L, K] float32,
        tail_mass and true_logprobs [n, L] float32.

        Raises:
            StoreDamagedError: a checksum does not hold, or a block is missing.
        """
        return SparseTargets(
            ids_BLK=self._read("ids", indices).astype(np.int32, copy=False),
            logprobs_BLK=self._read("logprobs", indices).astype(np.float32, copy=False),
            tail_mass_BL=self._read("tail_mass", indices).astype(np.float32, copy=False),
            true_logprobs_BL=self.true_logprobs(indices),
        )

    def true_logprobs(self, indices: Indices | None = None) -> Float32Array:
        """Log-probabilities [n, L] float32 of the true tokens; of all blocks by default."""
        chosen = np.arange(len(self)) if indices is None else indices
        return self._read("true_logprobs", chosen).astype(np.float32, copy=False)
