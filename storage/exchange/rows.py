"""Rows of numbers from Parquet or JSON lines: the columns that somebody else wrote a teacher's predictions in.

`iter_rows` streams one file: the record number (the index, from 0, of the row or line) and the cells of the columns
that were asked for, as NumPy arrays. A cell is a list of numbers, or a list of lists (`Ragged`). What a cell means is
the matter of `storage.exchange.foreign`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk.errors import UserError
from storage.corpus.file_bytes import opened, stored_lines
from storage.corpus.files import CorpusFile, file_format
from storage.corpus.json_lines import comes_twice, parsed

_ROWS_AT_ONCE = 8
"""Of Parquet: a row of 8,192 positions with 128 entries each takes 16 MB."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """A list of lists of numbers."""

    values: npt.NDArray[Any]
    """All of them, end to end."""
    lengths: npt.NDArray[np.int64]
    """Of each list."""

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, first: int, stop: int) -> Ragged:
        """The lists from `first` to the one before `stop`."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return Ragged(self.values[ends[first] : ends[stop]], self.lengths[first:stop])


Cells = Mapping[str, "npt.NDArray[Any] | Ragged"]


def iter_rows(file: CorpusFile, columns: Collection[str], start: int = 0) -> Iterator[tuple[int, Cells]]:
    """Record number and cells of every row from record `start` on; columns that a row does not have are left out.

    Blank lines of a JSON file hold no row, and count.

    Raises:
        UserError: with file and row or line: not readable, no rows of columns, a cell that is not numbers.
    """
    kind, compression = file_format(file)
    if kind == "text":
        raise UserError(f"{file.url} holds text; rows of a teacher's predictions are .parquet or .jsonl files")
    with opened(file) as stored:
        if kind == "parquet":
            yield from _parquet(stored, file, columns, start)
            return
        for number, line in stored_lines(stored, file, compression):
            if number >= start and not line.isspace():
                yield number, _json_cells(line, columns, place(file, number))


def place(file: CorpusFile, record: int) -> str:
    """Where a row is, for people: they count from 1."""
    unit = "row" if file_format(file)[0] == "parquet" else "line"
    return f"{file.url}, {unit} {record + 1}"


def _parquet(stored: io.RawIOBase, file: CorpusFile, columns: Collection[str], start: int) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(io.BufferedReader(stored))
        present = [name for name in parquet.schema_arrow.names if name in columns]
        if twice := sorted({name for name in present if present.count(name) > 1}):
            raise UserError(
                f"{file.url}: several columns are called '{twice[0]}'; rename or remove all but the one meant"
            )
        row, groups = 0, list(range(parquet.num_row_groups))
        while groups and row + parquet.metadata.row_group(groups[0]).num_rows <= start:
            row += parquet.metadata.row_group(groups.pop(0)).num_rows
        for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=groups, columns=present):
            for i in range(batch.num_rows):
                if row >= start:
                    where = place(file, row)
                    yield row, {name: _arrow_cell(batch.column(name)[i], f"{where}: '{name}'") for name in present}
                row += 1
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"{file.url} is not a readable Parquet file ({cause}); fetch or write it again") from error


def _arrow_cell(cell: Any, where: str) -> npt.NDArray[Any] | Ragged:
    import pyarrow.compute as pc
    import pyarrow.types as pt

    listed = (pt.is_list, pt.is_large_list, pt.is_fixed_size_list)
    if not any(is_list(cell.type) for is_list in listed) or cell.values is None:
        raise UserError(f"{where} holds {cell.type}{'' if cell.is_valid else ' (null)'}, not a list of numbers")
    values, lengths = cell.values, None
    if any(is_list(values.type) for is_list in listed):
        # A null in the place of a list has no length; it must not be taken for an empty one.
        _refuse_nulls(values, where)
        lengths = np.asarray(pc.list_value_length(values)).astype(np.int64)
        values = pc.list_flatten(values)
    _refuse_nulls(values, where)
    kind = values.type
    if not (pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind) or pt.is_null(kind)):
        raise UserError(f"{where} holds {kind}, not numbers")
    numbers = values.to_numpy(zero_copy_only=False)
    return numbers if lengths is None else Ragged(numbers, lengths)


def _refuse_nulls(values: Any, where: str) -> None:
    if values.null_count:
        first = np.flatnonzero(np.asarray(values.is_null()))[0]
        raise UserError(f"{where} is null at index {first}; fill or remove such rows")


def _json_cells(line: bytes, columns: Collection[str], where: str) -> Cells:
    try:
        record = parsed(line)
    except ValueError as error:
        raise UserError(f"{where}: broken JSON ({error}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object; each line must be one, with a field for each column")
    if twice := sorted(name for name in columns if name in record and comes_twice(line, name)):
        raise UserError(f"{where}: field '{twice[0]}' comes twice, and one of them would be lost; correct the record")
    return {name: _json_cell(record[name], f"{where}: '{name}'") for name in columns if name in record}


def _json_cell(cell: Any, where: str) -> npt.NDArray[Any] | Ragged:
    if not isinstance(cell, list):
        raise UserError(f"{where} is not a list of numbers")
    if not any(isinstance(item, list) for item in cell):
        return _numbers(cell, where)
    if not all(isinstance(item, list) for item in cell):
        raise UserError(f"{where} holds lists and other things; give one list for each position")
    return Ragged(_numbers(list(chain.from_iterable(cell)), where), np.array([len(item) for item in cell]))


def _numbers(values: list[Any], where: str) -> npt.NDArray[Any]:
    wrong = [value for value in values if not isinstance(value, int | float)]
    if wrong:
        raise UserError(f"{where} holds {json.dumps(wrong[0])[:40]}, not a number")
    # An empty list is one of integers as well as one of floats.
    numbers = np.array(values) if values else np.array([], dtype=np.int64)
    if numbers.dtype.kind not in "iufb":
        raise UserError(f"{where} holds a number beyond 64 bits")
    return numbers
