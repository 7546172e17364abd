"""Reading a domain's documents: from one file to a stream of texts, each with its record number.

`iter_documents` streams one file, whatever its suffix says is in it (see `storage.corpus.files`). The **record
number** is the index, from 0, of the line on which the document begins, or of the row: an error that names line 7 means
record 6, and reading can go on at the record where it stopped. Blank lines count. Documents of white space alone are
left out. Memory is bounded by the longest document, not by the file. `iter_filed` gives the paths as well, of a domain
whose records have them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ddk.errors import UserError
from storage.corpus.conversations import CONVERSATIONS, TOOLS, conversation
from storage.corpus.file_bytes import MAX_DOCUMENT_BYTES, OnBytes, first_bytes, opened, stored_lines
from storage.corpus.files import CorpusFile, Fields, check_fields, file_format
from storage.corpus.json_lines import comes_twice, parsed
from storage.corpus.magic import if_no_parquet
from storage.corpus.record_paths import record_path

_NUL = (
    "it holds NUL bytes, so it is no text, or the file is damaged (as one is whose download broke off); fetch it again"
)


class Text(NamedTuple):
    """One document."""

    record: int
    text: str
    prompt: str
    """What comes before the text; empty where there is none, or no field for it."""
    value: float | None = None
    """A number that the record carries; None without a field for it."""


def iter_documents(file: CorpusFile, fields: Fields, start: int = 0, on_bytes: OnBytes | None = None) -> Iterator[Text]:
    """Every document whose record number is at least `start`.

    Records before `start` are skipped without parsing: lines are only counted, Parquet row groups not even read.
    `on_bytes` is called with the number of stored bytes read since its last call (a Parquet file is not
    read whole, so their sum may differ from the file's size). If a text is only white space, its prompt is skipped too.

    Raises:
        UserError: with file and line or row: broken JSON, no object, a missing field or column, a field that is no
            text (or no conversation), not UTF-8, a truncated or corrupt file, a file that is no longer there, a
            prompt's field of a text file.
    """
    for _, document in _iter(file, fields._replace(path=None), start, on_bytes):
        yield document


def iter_filed(file: CorpusFile, fields: Fields, on_bytes: OnBytes | None = None) -> Iterator[tuple[str, Text]]:
    """As `iter_documents`, each with the path that its record has (`storage.corpus.record_paths.record_path`).

    Raises:
        UserError: also for a record without a path, or with a value that is not a path.
    """
    yield from _iter(file, fields, 0, on_bytes)


def _iter(file: CorpusFile, fields: Fields, start: int, on_bytes: OnBytes | None) -> Iterator[tuple[str, Text]]:
    """Path and document; the path is empty where there is no field for it."""
    check_fields(file, fields)
    kind, compression = file_format(file)
    with opened(file, on_bytes) as stored:
        if kind == "parquet":
            documents = _parquet_rows(stored, file, fields, start)
        elif kind == "json":
            documents = _json_records(stored_lines(stored, file, compression), file, fields, start)
        else:
            documents = _paragraphs(stored_lines(stored, file, compression), file, start)
        for path, document in documents:
            if document.text and not document.text.isspace():
                yield path, document


def _path(value: str, field: str, place: str) -> str:
    try:
        return record_path(value)
    except ValueError as error:
        raise UserError(
            f"{place}: field '{field}' holds {value!r}, which is no path ({error}); write parts with '/' between them, "
            f"such as 'algebra/linear'"
        ) from None


def _json_records(
    records: Iterator[tuple[int, bytes]], file: CorpusFile, asked: Fields, start: int
) -> Iterator[tuple[str, Text]]:
    for number, line in records:
        if number >= start and not line.isspace():
            place = _place(file, number)
            decoded = _decode(line, file, number)
            record = _json_object(decoded, place)
            fields = _there(asked, record, place)
            _check_record(record, decoded, place, fields)
            text = _document(record, place, fields)
            # null: there is no prompt.
            has_prompt = fields.prompt is not None and record[fields.prompt] is not None
            prompt = _json_text(record, place, str(fields.prompt)) if has_prompt else ""
            path = _path(_json_text(record, place, fields.path), fields.path, place) if fields.path is not None else ""
            value = None if fields.value is None else _number(record[fields.value], fields.value, place)
            yield path, Text(number, text, prompt, value)


def _number(value: Any, name: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"{place}: field '{name}' is {str(value)[:40]!r} and not a finite number; correct or remove the record, or "
            f"name another field as select.field"
        )
    return float(value)


def _document(record: Mapping[str, Any], place: str, fields: Fields) -> str:
    """The text, or the conversation's canonical text; the latter is empty where no turn says anything."""
    if not fields.messages:
        return _json_text(record, place, str(fields.text))
    found = conversation(record[str(fields.text)], record.get(TOOLS), str(fields.text), place)
    return found.text if found.messages else ""


def _there(asked: Fields, names: Iterable[str], place: str) -> Fields:
    """With the field of a conversation where the configuration does not name it.

    Raises:
        UserError: there is none.
    """
    if asked.text is not None:
        return asked
    if found := next((name for name in CONVERSATIONS if name in names), None):
        return asked._replace(text=found)
    raise UserError(
        f"{place}: no field {' or '.join(map(repr, CONVERSATIONS))}, which hold a conversation; set messages_field to "
        f"one that is there: {_listed(names)}"
    )


def _json_object(line: str, place: str) -> dict[str, Any]:
    remedy = "each line must be one JSON object (`jq -c '.[]' array.json > lines.jsonl` turns an array into lines)"
    try:
        record = parsed(line)
    except ValueError as error:
        if "\0" in line:
            raise UserError(f"{place}: {_NUL}") from None
        raise UserError(f"{place}: broken JSON ({error}); {remedy}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: not a JSON object but {_named(record)}; {remedy}")
    return record


def _check_record(record: Mapping[str, Any], line: str, place: str, fields: Fields) -> None:
    """That it has the fields, each once."""
    for name, setting in fields.settings():
        if name not in record:
            also = {
                "prompt_field": ", or give the record one (null for no prompt)",
                "path_field": ", or give the record one",
                "select.field": ", or give the record one",
            }.get(setting, "")
            there = _listed(record)
            raise UserError(f"{place}: no field '{name}'; set {setting} to one that is there{also}: {there}")
        if comes_twice(line, name):
            raise UserError(f"{place}: field '{name}' comes twice, and one of them would be lost; correct the record")


def _json_text(record: Mapping[str, Any], place: str, name: str) -> str:
    text = record[name]
    if not isinstance(text, str):
        raise UserError(f"{place}: field '{name}' is not a string but {_named(text)}; correct or remove the record")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell what is not Unicode: "\ud800"
            half = f"\\u{ord(text[error.start]):04x}"
            raise UserError(f"{place}: field '{name}' holds {half}, half a character; correct the record") from None
    return text


def _paragraphs(lines: Iterator[tuple[int, bytes]], file: CorpusFile, start: int) -> Iterator[tuple[str, Text]]:
    first = 0
    document: list[str] = []
    inside, size = False, 0
    for number, line in lines:
        if line.isspace():
            if document:
                yield "", Text(first, "\n".join(document), "")
            document, inside, size = [], False, 0
            continue
        if not inside:
            first, inside = number, True
        if first >= start:
            text = _decode(line, file, number).rstrip("\r\n")
            if "\0" in text:
                raise UserError(f"{_place(file, number)}: {_NUL}")
            size += len(line)
            if size > MAX_DOCUMENT_BYTES:
                raise UserError(
                    f"{_place(file, first)}: a document of more than {MAX_DOCUMENT_BYTES >> 20} MiB begins here; "
                    f"documents end at blank lines: insert some"
                )
            document.append(text)
    if document:
        yield "", Text(first, "\n".join(document), "")


def _parquet_rows(stored: io.RawIOBase, file: CorpusFile, asked: Fields, start: int) -> Iterator[tuple[str, Text]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(io.BufferedReader(stored))
        fields = _there(asked, parquet.schema_arrow.names, file.url)
        columns = [name for name, _ in fields.settings()]
        if fields.messages and TOOLS in parquet.schema_arrow.names:
            columns.append(TOOLS)
        for name, setting in fields.settings():
            _check_column(parquet.schema_arrow, file, name, setting)
        _check_lengths(parquet.metadata, file, columns)
        row, groups = 0, list(range(parquet.num_row_groups))
        while groups and row + parquet.metadata.row_group(groups[0]).num_rows <= start:
            row += parquet.metadata.row_group(groups.pop(0)).num_rows
        # Few rows a batch: a row may be a whole book.
        for batch in parquet.iter_batches(batch_size=64, row_groups=groups, columns=columns):
            for cells in zip(*(batch.column(name) for name in columns), strict=True):
                if row >= start:
                    yield _row_text(row, dict(zip(columns, cells, strict=True)), _place(file, row, "row"), fields)
                row += 1
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"{file.url} is not a readable Parquet file ({cause}); {if_no_parquet(first_bytes(stored))}"
        ) from error


def _check_lengths(metadata: Any, file: CorpusFile, columns: Sequence[str]) -> None:
    """That no row group's strings are that long on average: a few stored bytes may stand for any number of them."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            most = MAX_DOCUMENT_BYTES * max(1, group.num_rows)
            column = chunk.path_in_schema.split(".")[0] if chunk.path_in_schema not in columns else chunk.path_in_schema
            if column in columns and chunk.total_uncompressed_size > most:
                raise UserError(
                    f"{file.url}: column '{column}' holds strings of more than "
                    f"{MAX_DOCUMENT_BYTES >> 20} MiB, which are no documents; split them, or correct the file"
                )


def _check_column(schema: Any, file: CorpusFile, column: str, setting: str) -> None:
    import pyarrow.types as pt

    if column not in schema.names:
        raise UserError(
            f"{file.url}: no column '{column}'; set {setting} to one that is there: {_listed(schema.names)}"
        )
    if (times := schema.names.count(column)) > 1:
        raise UserError(f"{file.url}: {times} columns are called '{column}'; rename or remove all but the one meant")
    kind = schema.field(column).type
    if setting == "select.field":
        if not (pt.is_integer(kind) or pt.is_floating(kind)):
            raise UserError(f"{file.url}: column '{column}' holds {kind}, not numbers; name another as {setting}")
        return
    if setting == "messages_field":
        if not (pt.is_list(kind) or pt.is_large_list(kind) or pt.is_string(kind) or pt.is_large_string(kind)):
            raise UserError(f"{file.url}: column '{column}' holds {kind}, no lists of turns; name another as {setting}")
        return
    if pt.is_dictionary(kind):
        kind = kind.value_type
    if pt.is_null(kind) and setting == "prompt_field":  # no row has a prompt
        return
    if not (pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)):
        raise UserError(f"{file.url}: column '{column}' holds {kind}, not strings; name a text column as {setting}")


def _row_text(row: int, cells: Mapping[str, Any], place: str, fields: Fields) -> tuple[str, Text]:
    """Path and document of a row.

    Args:
        cells: by column.
    """
    other = {fields.value, TOOLS} | ({fields.text} if fields.messages else set())
    found = {name: _cell_text(cell, place, name) for name, cell in cells.items() if name not in other}
    for name in (fields.text, fields.path):
        if name is not None and name not in other and found[name] is None:
            raise UserError(f"{place}: column '{name}' is null; fill or remove such rows")
    path = "" if fields.path is None else _path(str(found[fields.path]), fields.path, place)
    prompt = None if fields.prompt is None else found[fields.prompt]
    value = None if fields.value is None else _number(cells[fields.value].as_py(), fields.value, place)
    if fields.messages:
        record = {name: _value(cells[name], place, name) for name in (str(fields.text), TOOLS) if name in cells}
        return path, Text(row, _document(record, place, fields), "", value)
    return path, Text(row, str(found[str(fields.text)]), prompt or "", value)


def _cell_text(cell: Any, place: str, column: str) -> str | None:
    text = _value(cell, place, column)
    return None if text is None else str(text)


def _value(cell: Any, place: str, column: str) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: column '{column}' is not UTF-8 at byte {error.start}; correct the row") from None


def _decode(line: bytes, file: CorpusFile, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{_place(file, number)}: not UTF-8 at byte offset {error.start} of the line "
            f"(0x{line[error.start]:02x}); convert the file from the encoding that it is in (`file FILE` guesses it): "
            f"`iconv -f ENCODING -t utf-8 FILE > NEW`"
        ) from None


def place_of(file: CorpusFile, record: int) -> str:
    """Where a record lies, for messages."""
    return _place(file, record, "row" if file_format(file)[0] == "parquet" else "line")


def _place(file: CorpusFile, number: int, unit: str = "line") -> str:
    return f"{file.url}, {unit} {number + 1}"


def _named(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _listed(names: Any) -> str:
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "") if shown else "(none)"
