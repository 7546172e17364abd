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
from zarr.storage import FsspecStore, LocalStore

from ddk.types import Float32Array, Int32Array, SparseTargets, Split
from storage import uri
from storage.errors import StoreDamagedError
from storage.layout import Kind, array_specs
from storage.manifest import Manifest, require_complete

Indices = Sequence[int] | npt.NDArray[np.int64]


def _zarr_store(url: str) -> Store:
    if uri.is_local(url):
        return LocalStore(uri.open_fs(url)[1], read_only=True)
    return FsspecStore.from_url(url, read_only=True)


class _View:
    """What both kinds of view share: the manifest, and checked reads of one split's arrays."""

    kind: Kind

    def __init__(self, url: str, split: Split) -> None:
        self.url = url
        self.split = split
        self.manifest: Manifest = require_complete(url, self.kind)
        self._blocks = self.manifest.splits[split].blocks
        store = _zarr_store(url)
        specs = array_specs(self.kind, self.manifest.dims)
        self._arrays = {spec.name: zarr.open_array(store, mode="r", path=f"{split}/{spec.name}") for spec in specs}

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
        array = self._arrays[name]
        try:
            # A run of blocks as one slice: zarr plans it much faster than a list of indices.
            contiguous = wanted.size > 0 and np.array_equal(wanted, np.arange(wanted[0], wanted[0] + wanted.size))
            data = np.asarray(array[int(wanted[0]) : int(wanted[-1]) + 1] if contiguous else array.oindex[wanted])
        except (ValueError, RuntimeError, OSError, IndexError) as error:
            raise self._damaged(name, wanted, str(error)) from error
        missing = (data < 0) if data.dtype.kind == "i" else np.isnan(data)
        if missing.any():
            raise self._damaged(name, wanted[np.unique(np.nonzero(missing)[0])], "never written, or lost")
        return data

    def _damaged(self, name: str, blocks: npt.NDArray[np.int64], why: str) -> StoreDamagedError:
        shards = sorted({int(block) // self.manifest.dims["shard_blocks"] for block in blocks})
        return StoreDamagedError(
            f"{self.url}: array '{self.split}/{name}' is damaged in shard {' or '.join(map(str, shards))} ({why}); "
            f"remove the store and run `ddk {'pack' if self.kind == 'blocks' else 'cache'}` again"
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
