"""A teacher's predictions that somebody else cached: rows of DistillKit, or of Hugging Face data sets with top-k lists.

A row is a sequence of tokens, `input_ids`, and for its positions lists of entries, in one of these pairs of columns:

    compressed_logprobs, bytepacked_indices                 DistillKit's bytes (see `storage.exchange.distillkit`)
    token_ids, top_values                                   DistillKit's rows without compression
    topk_ids (or topk_indices), topk_logprobs (or topk_logits, if log-probabilities they are)
    target_token_ids, target_logprobs                       Axolotl's; a `target_mask` of 0 means no entry

and possibly `tail_mass` and `true_logprobs`, a number a position. With shift 1, list i predicts token i + 1: a row of n
tokens has n − 1 lists, and an nth one is ignored. With shift 0, list i predicts token i, and the first is ignored.

What comes out (`Predictions`) is as everywhere in this project: position j predicts token j + 1, entries are in
descending order, −inf stands for no entry, the tail's mass and the true token's log-probability are filled in where
the row lets them be known. What is no distribution is refused, with file, row and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from ddk.errors import UserError
from ddk.values import Int32Array
from storage.corpus.files import CorpusFile
from storage.exchange.distillkit import CompressionConfig, decode
from storage.exchange.predictions import BoolArray, Entries, Float64Array, Int64Array, Predictions, predictions
from storage.exchange.rows import Cells, Ragged, iter_rows, place
from storage.files import uri
from storage.files.yaml_text import parse_yaml

IMPORT_VERSION = 1
"""Of how predictions are read from files; raised where the same files would give other targets."""
COMPRESSION_FILE = "compression_config.yaml"
_LONGEST_DESCRIPTION = 1 << 16
"""Bytes of such a file."""
_COMPRESSED = ("bytepacked_indices", "compressed_logprobs")
_PAIRS = (
    ("topk_ids", "topk_logprobs"),
    ("topk_indices", "topk_logprobs"),
    ("topk_ids", "topk_logits"),
    ("topk_indices", "topk_logits"),
    ("token_ids", "top_values"),
    ("target_token_ids", "target_logprobs"),
)
_OLD = ("packed_indices", "exact_values", "coeffs")
_COLUMNS = {
    "input_ids",
    "target_mask",
    "tail_mass",
    "true_logprobs",
    *_COMPRESSED,
    *_OLD,
    *(n for p in _PAIRS for n in p),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFormat:
    """How rows are to be read."""

    vocab_size: int
    """Every id lies below it."""
    k: int
    """Entries kept of each position; what lies behind them goes to the tail's mass."""
    shift: int = 1
    """List i predicts token i + shift."""
    compression: CompressionConfig | None = None
    """Of the compressed columns."""


def iter_tokens(file: CorpusFile, vocab_size: int, start: int = 0) -> Iterator[tuple[int, Int32Array]]:
    """Record number and tokens [n] of every row from record `start` on; nothing else of the rows is read.

    Raises:
        UserError: a file or a row is not as it should be; see `storage.exchange.rows.iter_rows`.
    """
    for record, cells in iter_rows(file, {"input_ids"}, start):
        yield record, _tokens(cells, vocab_size, place(file, record))


def iter_predictions(
    file: CorpusFile, row_format: RowFormat, start: int = 0, min_tokens: int = 2
) -> Iterator[tuple[int, Predictions]]:
    """Record number and content of every row from record `start` on that has at least `min_tokens` tokens.

    Raises:
        UserError: a row is not as it should be; file, row and position are named.
    """
    for record, cells in iter_rows(file, _COLUMNS, start):
        where = place(file, record)
        tokens_N = _tokens(cells, row_format.vocab_size, where)
        if len(tokens_N) >= min_tokens:
            yield record, _Row(cells, tokens_N, row_format, where).predictions()


def compression_url(file: CorpusFile, named: str | None) -> str:
    """Where a file's compression is described: as named in the configuration, else beside the file."""
    return named or uri.join(file.url.rpartition("/")[0], COMPRESSION_FILE)


def read_compression(url: str) -> CompressionConfig | None:
    """The content of a `compression_config.yaml`; None where there is no such file.

    Raises:
        UserError: it is not one.
    """
    try:
        content = uri.read_range(url, 0, _LONGEST_DESCRIPTION + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) > _LONGEST_DESCRIPTION:
        raise UserError(
            f"{url} has more bytes than any {COMPRESSION_FILE} ({_LONGEST_DESCRIPTION:,}); correct that file"
        )
    try:
        return CompressionConfig.model_validate(parse_yaml(content.decode(), url))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{url}: {where + ': ' if where else ''}{first['msg']}; correct that file") from None
    except UnicodeDecodeError:
        raise UserError(f"{url} is no text in UTF-8; correct that file") from None
    except UserError as error:
        raise UserError(f"{error}; correct that file") from None


def _tokens(cells: Cells, vocab_size: int, where: str) -> Int32Array:
    found = cells.get("input_ids")
    if found is None:
        raise UserError(f"{where}: no 'input_ids'; every row needs the tokens that its predictions belong to")
    if isinstance(found, Ragged) or (found.size and found.dtype.kind not in "iu"):
        raise UserError(f"{where}: 'input_ids' is not a list of whole numbers")
    # uint64 beside a negative bound would be compared as floats.
    outside = (found < 0) if found.dtype.kind == "i" else np.zeros(len(found), dtype=bool)
    outside |= found >= vocab_size
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise UserError(
            f"{where}, token {first}: id {found[first]} is none of the tokenizer's {vocab_size}; teacher.model must be "
            f"the model (or its tokenizer) that the file was made with"
        )
    return found.astype(np.int32)


class _Row:
    """One row on its way from cells to predictions. Letters: P predictions, K entries in the file."""

    def __init__(self, cells: Cells, tokens_N: Int32Array, row_format: RowFormat, where: str) -> None:
        self._cells, self._format, self._where = cells, row_format, where
        self._tokens_N = tokens_N
        self._count = len(tokens_N) - 1
        self._first = 1 - row_format.shift  # the list that predicts token 1

    def predictions(self) -> Predictions:
        return predictions(
            self._tokens_N,
            self._entries(),
            vocab_size=self._format.vocab_size,
            k=self._format.k,
            shift=self._format.shift,
            refuse=self._refusal,
        )

    def _entries(self) -> Entries:
        compressed = all(name in self._cells for name in _COMPRESSED)
        pair = _COMPRESSED if compressed else self._pair()
        ids_PK, logprobs_PK = self._decoded() if compressed else self._listed(*pair)
        return Entries(
            ids_PK=ids_PK,
            logprobs_PK=logprobs_PK,
            tail_mass_P=self._numbers("tail_mass") if "tail_mass" in self._cells else None,
            true_logprobs_P=self._numbers("true_logprobs") if "true_logprobs" in self._cells else None,
            approximate=compressed,
            most_mass=1.001 if pair[1].endswith("logits") else 1.01,
        )

    def _pair(self) -> tuple[str, str]:
        for pair in _PAIRS:
            if all(name in self._cells for name in pair):
                return pair
        if all(name in self._cells for name in _OLD):
            raise self._refusal("an older format of DistillKit (packed_indices, exact_values, coeffs) is not read")
        wanted = "; ".join(", ".join(pair) for pair in (_COMPRESSED, *_PAIRS))
        raise self._refusal(f"no predictions; there must be one of these pairs of columns: {wanted}")

    def _listed(self, id_column: str, value_column: str) -> tuple[Int64Array, Float64Array]:
        """Ids and log-probabilities [P, K] of two columns of lists."""
        ids, values = self._lists(id_column), self._lists(value_column)
        unequal = np.flatnonzero(ids.lengths != values.lengths)
        if unequal.size:
            i = int(unequal[0])
            raise self._refusal(f"{ids.lengths[i]} ids and {values.lengths[i]} log-probabilities", i)
        if ids.values.size and ids.values.dtype.kind not in "iu":
            raise self._refusal(f"'{id_column}' does not hold whole numbers")
        entry_PK = np.arange(max(int(ids.lengths.max(initial=0)), 1)) < ids.lengths[:, None]
        ids_PK, logprobs_PK = np.zeros(entry_PK.shape, dtype=np.int64), np.full(entry_PK.shape, -np.inf)
        ids_PK[entry_PK], logprobs_PK[entry_PK] = ids.values, values.values
        if "target_mask" in self._cells:
            logprobs_PK[~self._mask(entry_PK)] = -np.inf
        return ids_PK, logprobs_PK

    def _decoded(self) -> tuple[Int64Array, Float64Array]:
        """Ids and log-probabilities [P, K] of DistillKit's bytes."""
        config = self._format.compression
        if config is None:
            raise self._refusal(
                f"compressed columns, and there is no {COMPRESSION_FILE} beside the file; put it there, or name it as "
                f"domains.<domain>.compression_config"
            )
        packed, compressed = (self._lists(name) for name in _COMPRESSED)
        for name, lists, size in (
            (_COMPRESSED[0], packed, config.id_bytes),
            (_COMPRESSED[1], compressed, config.logprob_bytes),
        ):
            wrong = np.flatnonzero(lists.lengths != size)
            if wrong.size:
                i = int(wrong[0])
                raise self._refusal(
                    f"'{name}' has {lists.lengths[i]} bytes, where {COMPRESSION_FILE} gives {size}; it is not this "
                    f"file's",
                    i,
                )
        logprobs_PK, ids_PK = decode(
            compressed.values.astype(np.uint8).reshape(self._count, config.logprob_bytes),
            packed.values.astype(np.uint8).reshape(self._count, config.id_bytes),
            config,
        )
        return ids_PK.astype(np.int64), logprobs_PK.astype(np.float64)

    def _lists(self, name: str) -> Ragged:
        """The P lists of a column that predict this row's tokens from the second on."""
        cell = self._cells[name]
        if not isinstance(cell, Ragged):
            if cell.size:
                raise self._refusal(f"'{name}' is a list of numbers; it must hold one list for each position")
            cell = Ragged(cell, np.zeros(0, dtype=np.int64))
        self._check_length(name, len(cell))
        return cell.part(self._first, self._first + self._count)

    def _numbers(self, name: str) -> Float64Array:
        """The P numbers of a column with one a position."""
        cell = self._cells[name]
        if isinstance(cell, Ragged):
            raise self._refusal(f"'{name}' holds lists; it must hold one number for each position")
        self._check_length(name, len(cell))
        return cell[self._first : self._first + self._count].astype(np.float64)

    def _check_length(self, name: str, length: int) -> None:
        count = len(self._tokens_N)
        allowed = (count - 1, count) if self._format.shift == 1 else (count,)
        if length not in allowed:
            raise self._refusal(
                f"'{name}' has {length} positions, and 'input_ids' {count} tokens; with shift {self._format.shift} "
                f"there must be {' or '.join(map(str, allowed))}"
            )

    def _mask(self, entry_PK: BoolArray) -> BoolArray:
        """Where `target_mask`, a number for each entry or each position, is not 0."""
        if not isinstance(self._cells["target_mask"], Ragged):
            return np.broadcast_to((self._numbers("target_mask") != 0)[:, None], entry_PK.shape)
        mask = self._lists("target_mask")
        unequal = np.flatnonzero(mask.lengths != entry_PK.sum(axis=1))
        if unequal.size:
            i = int(unequal[0])
            raise self._refusal(f"'target_mask' has {mask.lengths[i]} entries for {entry_PK[i].sum()}", i)
        mask_PK = np.zeros(entry_PK.shape, dtype=bool)
        mask_PK[entry_PK] = mask.values != 0
        return mask_PK

    def _refusal(self, what: str, prediction: int | None = None) -> UserError:
        # Positions are those of the file, from 0.
        at = "" if prediction is None else f", position {prediction + self._first}"
        return UserError(f"{self._where}{at}: {what}")
