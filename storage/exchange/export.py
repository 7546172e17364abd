"""Writes targets and their blocks as Parquet files for others: one row per block, a bounded number of rows per file.

    topk         input_ids, topk_ids, topk_logprobs (lists as long as a position has entries), tail_mass, true_logprobs
    distillkit   input_ids, compressed_logprobs, bytepacked_indices (see `storage.exchange.distillkit`), true_logprobs

List j of a row predicts its token j + 1: L + 1 tokens, L lists. Each file is written in one atomic step, and its
metadata name its inputs, so that an interrupted export resumes with the missing files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ddk.errors import UserError
from ddk.values import BlockReader, Float32Array, Int32Array, SparseTargets, Split
from storage.exchange.distillkit import CompressionConfig, encode
from storage.files import uri

_POSITIONS_A_FILE = 1 << 18
"""At k = 64 some 130 MB before compression."""
_POSITIONS_AT_ONCE = 1 << 13
_NEXT_TO_NOTHING = -20.0
"""Log-probability of tokens that fill up a position whose entries hold all mass."""


class TargetSource(Protocol):
    """What is read of a targets store."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    def __len__(self) -> int: ...
    def read(self, indices: npt.NDArray[np.int64], /) -> SparseTargets: ...


def export_split(
    targets: TargetSource,
    blocks: BlockReader,
    folder: str,
    split: Split,
    *,
    compression: CompressionConfig | None,
    source: Mapping[str, Any],
    on_rows: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write one split's rows to `<folder>/<split>-<number>-of-<files>.parquet`.

    Args:
        folder: any URL.
        compression: of DistillKit's format; None for plain lists.
        source: what the files are made of, as plain JSON data; kept in their metadata.
        on_rows: hears how many rows were written, or found to be there, since its last call.

    Returns:
        The number of files.

    Raises:
        UserError: the folder holds files of this split that come from something else.
    """
    rows = max(1, _POSITIONS_A_FILE // targets.seq_len)
    files = max(1, -(-len(targets) // rows))
    names = [f"{split}-{number:05d}-of-{files:05d}.parquet" for number in range(files)]
    stamp = json.dumps({**source, "split": split}, sort_keys=True)
    _refuse_others(folder, split, names, stamp)
    done = set(uri.list_names(folder))
    for number, name in enumerate(names):
        first, stop = number * rows, min((number + 1) * rows, len(targets))
        if name not in done:
            _write_file(uri.join(folder, name), targets, blocks, (first, stop), compression, stamp)
        on_rows(stop - first)
    return files


def _refuse_others(folder: str, split: Split, names: list[str], stamp: str) -> None:
    for found in uri.list_names(folder):
        if not (found.startswith(f"{split}-") and found.endswith(".parquet")):
            continue
        if found not in names or _stamp(uri.join(folder, found)) != stamp:
            raise UserError(
                f"{folder} holds {found}, of something else; export to an empty folder, or remove that file"
            )


def _stamp(url: str) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = uri.open_fs(url)
    try:
        with fs.open(path, "rb") as file:
            metadata = pq.read_schema(file).metadata or {}
    except pa.ArrowException:
        return None
    return str(metadata.get(b"ddk", b"").decode())


def _write_file(
    url: str,
    targets: TargetSource,
    blocks: BlockReader,
    rows: tuple[int, int],
    compression: CompressionConfig | None,
    stamp: str,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(compression).with_metadata({"ddk": stamp})
    at_once = max(1, _POSITIONS_AT_ONCE // targets.seq_len)
    with uri.writing(url) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(*rows, at_once):
            indices = np.arange(first, min(first + at_once, rows[1]))
            columns = _columns(blocks.read(indices), targets.read(indices), targets.vocab_size, compression)
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _schema(compression: CompressionConfig | None) -> Any:
    import pyarrow as pa

    def lists(name: str, kind: Any, depth: int) -> Any:
        return pa.field(name, pa.list_(kind) if depth == 1 else pa.list_(pa.list_(kind)))

    if compression is not None:
        return pa.schema(
            [
                lists("input_ids", pa.uint64(), 1),
                lists("compressed_logprobs", pa.uint8(), 2),
                lists("bytepacked_indices", pa.uint8(), 2),
                lists("true_logprobs", pa.float32(), 1),
            ]
        )
    return pa.schema(
        [
            lists("input_ids", pa.int32(), 1),
            lists("topk_ids", pa.int32(), 2),
            lists("topk_logprobs", pa.float32(), 2),
            lists("tail_mass", pa.float32(), 1),
            lists("true_logprobs", pa.float32(), 1),
        ]
    )


def _columns(
    tokens_BL1: Int32Array, targets: SparseTargets, vocab_size: int, compression: CompressionConfig | None
) -> list[Any]:
    true = _listed(targets.true_logprobs_BL)
    if compression is not None:
        blocks, positions, k = targets.ids_BLK.shape
        ids_PK, logprobs_PK = targets.ids_BLK.reshape(-1, k), targets.logprobs_BLK.reshape(-1, k)
        ids_PK, logprobs_PK = filled_up(
            ids_PK[:, : compression.k], logprobs_PK[:, : compression.k], targets.tail_mass_BL.reshape(-1), vocab_size
        )
        parts = encode(logprobs_PK, ids_PK, compression)
        return [
            _listed(tokens_BL1.astype(np.uint64)),
            *(_listed(part.reshape(blocks, positions, part.shape[-1])) for part in parts),
            true,
        ]
    entry_BLK = targets.logprobs_BLK > -np.inf
    return [
        _listed(tokens_BL1),
        _ragged(targets.ids_BLK, entry_BLK),
        _ragged(targets.logprobs_BLK, entry_BLK),
        _listed(targets.tail_mass_BL),
        true,
    ]


def filled_up(
    ids_PK: Int32Array, logprobs_PK: Float32Array, tail_P: Float32Array, vocab_size: int
) -> tuple[Int32Array, Float32Array]:
    """Positions with fewer than K entries, filled up with other tokens: DistillKit's have K of them.

    Each other token gets an equal share of the mass outside, but no more than the last entry.
    """
    entry_PK = logprobs_PK > -np.inf
    if entry_PK.all():
        return ids_PK, logprobs_PK
    positions, k = ids_PK.shape
    # Of the ids 0 … k − 1, those that are no entries come first; there are enough of them.
    used_PK = np.zeros((positions, k), dtype=bool)
    row, column = np.nonzero(entry_PK & (ids_PK < k))
    used_PK[row, ids_PK[row, column]] = True
    free_PK = np.argsort(used_PK, axis=1, kind="stable")
    count_P = entry_PK.sum(axis=1)
    which_PK = np.clip(np.arange(k) - count_P[:, None], 0, None)
    ids_PK = np.where(entry_PK, ids_PK, np.take_along_axis(free_PK, which_PK, axis=1)).astype(np.int32)
    share_P = np.log(np.maximum(tail_P, 1e-30) / np.maximum(vocab_size - count_P, 1))
    last_P = np.where(entry_PK, logprobs_PK, 0.0).min(axis=1)
    share_P = np.minimum(np.maximum(share_P, _NEXT_TO_NOTHING), last_P)
    return ids_PK, np.where(entry_PK, logprobs_PK, share_P[:, None]).astype(np.float32)


def _listed(values: npt.NDArray[Any]) -> Any:
    """An array [B, n] or [B, n, m] as a column of lists, or of lists of lists."""
    import pyarrow as pa

    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        count = int(np.prod(values.shape[:axis]))
        column = pa.ListArray.from_arrays(_offsets(np.full(count, values.shape[axis])), column)
    return column


def _ragged(values_BLK: npt.NDArray[Any], entry_BLK: npt.NDArray[np.bool_]) -> Any:
    """The entries alone as a column of lists of lists."""
    import pyarrow as pa

    blocks, positions, _ = values_BLK.shape
    inner = pa.ListArray.from_arrays(_offsets(entry_BLK.sum(axis=-1).reshape(-1)), pa.array(values_BLK[entry_BLK]))
    return pa.ListArray.from_arrays(_offsets(np.full(blocks, positions)), inner)


def _offsets(lengths: npt.NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
