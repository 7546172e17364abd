from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from ddk.errors import UserError
from storage.corpus import documents, file_bytes
from storage.corpus.documents import Text, iter_documents
from storage.corpus.files import CorpusFile, Fields

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda content: gzip.compress(content, 1, mtime=0),
    ".zst": zstandard.compress,
}


def put(path: Path, content: bytes) -> CorpusFile:
    path.write_bytes(content)
    return CorpusFile(url=str(path), name=path.name, size=len(content))


def put_table(path: Path, **columns: pa.Array) -> CorpusFile:
    pq.write_table(pa.table(columns), path, row_group_size=10)
    return CorpusFile(url=str(path), name=path.name, size=path.stat().st_size)


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


def texts_of(file: CorpusFile, start: int = 0) -> list[tuple[int, str]]:
    """Record and text of every document; none has a prompt."""
    documents = list(iter_documents(file, Fields(), start))
    assert not any(document.prompt for document in documents)
    return [(document.record, document.text) for document in documents]


def error_of(file: CorpusFile, text_field: str = "text", prompt_field: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        list(iter_documents(file, Fields(text_field, prompt_field)))
    message = str(caught.value)
    assert file.url in message
    assert "\n" not in message
    return message.replace(file.url, "FILE")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_lines(tmp_path: Path, suffix: str, compression: str) -> None:
    content = b"\xef\xbb\xbf" + json_lines(["one", "zwei\u2028ü", "  \n", "", "三"]).replace(b"\n", b"\n \r\n", 1)
    file = put(tmp_path / f"a{suffix}{compression}", COMPRESSIONS[compression](content.rstrip()))
    # The blank line counts; the documents of white space do not come.
    expected = [(0, "one"), (2, "zwei\u2028ü"), (5, "三")]
    assert texts_of(file) == expected
    for start in range(8):
        assert texts_of(file, start) == [pair for pair in expected if pair[0] >= start]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_text_files_are_cut_at_blank_lines(tmp_path: Path, compression: str) -> None:
    content = "\n\nfirst\nline two\r\n\r\n  \nsecond ü\n\n\nthird".encode()
    file = put(tmp_path / f"a.txt{compression}", COMPRESSIONS[compression](content))
    expected = [(2, "first\nline two"), (6, "second ü"), (9, "third")]
    assert texts_of(file) == expected
    for start in range(11):
        assert texts_of(file, start) == [pair for pair in expected if pair[0] >= start]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"text {row}" if row % 7 else " " for row in range(95)]
    file = put_table(tmp_path / "a.parquet", id=pa.array(range(95)), text=pa.array(texts).cast(kind))
    expected = [(row, text) for row, text in enumerate(texts) if row % 7]
    for start in (0, 1, 9, 10, 11, 50, 94, 95, 200):
        assert texts_of(file, start) == [pair for pair in expected if pair[0] >= start]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.zst"])
def test_an_empty_file_holds_no_documents(tmp_path: Path, name: str) -> None:
    assert list(iter_documents(put(tmp_path / name, b""), Fields())) == []


def test_zstd_frames_one_after_another(tmp_path: Path) -> None:
    # As pzstd writes them: each behind a skippable frame; and one line lies across two of them.
    first, second = json_lines(["one", "two", "three"])[:30], json_lines(["one", "two", "three"])[30:]
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    content = b"".join([skipped, zstandard.compress(first), skipped, zstandard.compress(second), skipped])
    documents = iter_documents(put(tmp_path / "a.jsonl.zst", content), Fields())
    assert [document.text for document in documents] == ["one", "two", "three"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_memory_is_bounded_by_a_document_not_by_the_file(tmp_path: Path, compression: str) -> None:
    content = json_lines([os.urandom(500).hex() for _ in range(20_000)])
    file = put(tmp_path / f"a.jsonl{compression}", COMPRESSIONS[compression](content))
    assert len(content) > 20_000_000
    del content
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_documents(file, Fields(), 19_000)) == 1000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_bytes_read_are_those_stored(tmp_path: Path) -> None:
    for compression, compress in COMPRESSIONS.items():
        heard: list[int] = []
        file = put(tmp_path / f"a.jsonl{compression}", compress(json_lines(["some text"] * 1000)))
        list(iter_documents(file, Fields(), on_bytes=heard.append))
        assert sum(heard) == file.size


def test_documents_on_s3(s3_server: str, tmp_path: Path) -> None:
    root, fs = f"{s3_server}/documents", fsspec.filesystem("s3")
    contents = {
        "a.jsonl.zst": zstandard.compress(json_lines(["zero"])),
        "b.jsonl.gz": gzip.compress(json_lines(["one", "two"]), mtime=0),
        "c.parquet": Path(put_table(tmp_path / "c.parquet", text=pa.array(["four", "five"])).url).read_bytes(),
        "d.txt": b"six",
    }
    files = [CorpusFile(url=f"{root}/{name}", name=name, size=len(content)) for name, content in contents.items()]
    for file in files:
        fs.pipe_file(file.url, contents[file.name])
    texts = [[text for _, text in texts_of(file)] for file in files]
    assert texts == [["zero"], ["one", "two"], ["four", "five"], ["six"]]
    fs.rm(files[3].url)
    with pytest.raises(UserError, match=r"d\.txt is no longer there"):
        list(iter_documents(files[3], Fields()))


# Prompts


RECORDS = [("one", "a"), ("two", ""), ("three", None), (" ", "left out"), ("", "left out"), ("ü", " \n"), ("six", "é")]
"""Text and prompt."""
PROMPTED = [
    *(Text(0, "one", "a"), Text(1, "two", ""), Text(2, "three", "")),
    *(Text(5, "ü", " \n"), Text(6, "six", "é")),
]


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    content = "".join(json.dumps({"prompt": prompt, "id": 1, "text": text}) + "\n" for text, prompt in RECORDS)
    file = put(tmp_path / "a.jsonl.gz", gzip.compress(content.encode(), mtime=0))
    for start in range(8):
        expected = [document for document in PROMPTED if document[0] >= start]
        assert list(iter_documents(file, Fields(prompt="prompt"), start)) == expected
    assert [document.prompt for document in iter_documents(file, Fields())] == [""] * 5


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("first", ["text", "prompt"])
def test_prompts_of_parquet(tmp_path: Path, kind: pa.DataType, first: str) -> None:
    """Whichever column comes first in the file."""
    columns = {
        "text": pa.array([text for text, _ in RECORDS]).cast(kind),
        "prompt": pa.array([prompt for _, prompt in RECORDS]).cast(kind),
    }
    file = put_table(tmp_path / "a.parquet", **{first: columns[first], **columns})
    for start in range(8):
        expected = [document for document in PROMPTED if document[0] >= start]
        assert list(iter_documents(file, Fields(prompt="prompt"), start)) == expected


def test_a_parquet_column_without_any_prompt(tmp_path: Path) -> None:
    file = put_table(tmp_path / "a.parquet", text=pa.array(["one"]), prompt=pa.array([None]))
    assert list(iter_documents(file, Fields(prompt="prompt"))) == [Text(0, "one", "")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a", "question": "b"},
            "FILE, line 1: no field 'prompt'; set prompt_field to one that is there, or give the record one (null for "
            "no prompt): 'text', 'question'",
        ),
        ({"prompt": "a"}, "FILE, line 1: no field 'text'; set text_field to one that is there: 'prompt'"),
        ({"text": "a", "prompt": ["b"]}, "FILE, line 1: field 'prompt' is not a string but an array; correct"),
        ({"text": "a", "prompt": 7}, "FILE, line 1: field 'prompt' is not a string but a number"),
        ({"text": None, "prompt": "a"}, "FILE, line 1: field 'text' is not a string but null"),
        ({"text": "a", "prompt": "\ud800"}, "FILE, line 1: field 'prompt' holds \\ud800, half a character"),
    ],
)
def test_a_broken_prompt_is_named(tmp_path: Path, record: dict[str, object], message: str) -> None:
    file = put(tmp_path / "a.jsonl", json.dumps(record).encode())
    assert message in error_of(file, prompt_field="prompt")


def test_a_column_of_prompts_that_does_not_serve_is_named(tmp_path: Path) -> None:
    file = put_table(tmp_path / "a.parquet", text=pa.array(["a"]), id=pa.array([1]))
    missing = "FILE: no column 'prompt'; set prompt_field to one that is there: 'text', 'id'"
    assert error_of(file, prompt_field="prompt") == missing
    assert "column 'id' holds int64, not strings; name a text column as prompt_field" in error_of(file, "text", "id")
    null = put_table(tmp_path / "n.parquet", text=pa.array(["a", None]), prompt=pa.array(["b", "c"]))
    assert "FILE, row 2: column 'text' is null; fill or remove" in error_of(null, prompt_field="prompt")
    text = put(tmp_path / "a.txt", b"x")
    assert "FILE holds plain text, which has no field 'prompt'" in error_of(text, prompt_field="prompt")


# Reading what is broken


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", ', "FILE, line 3: broken JSON (Expecting property name enclosed in double quotes: line 2"),
        (b"[" * 100_000, "FILE, line 3: broken JSON (nested too deeply)"),
        (b'["a"]', "FILE, line 3: not a JSON object but an array; each line must be one JSON object (`jq -c"),
        (b"12", "FILE, line 3: not a JSON object but a number; "),
        (b'{"body": "a", "id": 1}', "no field 'text'; set text_field to one that is there: 'body', 'id'"),
        (b"{}", "FILE, line 3: no field 'text'; set text_field to one that is there: (none)"),
        (b'{"text": null}', "FILE, line 3: field 'text' is not a string but null; correct or remove the record"),
        (b'{"text": ["a"]}', "FILE, line 3: field 'text' is not a string but an array"),
        (b'{"text": true}', "FILE, line 3: field 'text' is not a string but a boolean"),
        (b'{"text": "a\xe9b"}', "FILE, line 3: not UTF-8 at byte offset 11 of the line (0xe9); convert the file from "),
        (b'{"text": "\\ud800 x"}', "FILE, line 3: field 'text' holds \\ud800, half a character; correct the record"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, compression: str, line: bytes, message: str) -> None:
    content = b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n'
    file = put(tmp_path / f"a.jsonl{compression}", COMPRESSIONS[compression](content))
    assert message in error_of(file)


def test_a_long_list_of_fields_is_cut(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", json.dumps({f"f{number}": 1 for number in range(50)}).encode())
    assert error_of(file).endswith("'f19', …")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    file = put(tmp_path / "a.txt", b"one\n\ntwo\ncaf\xe9\n")
    assert "FILE, line 4: not UTF-8 at byte offset 3 of the line (0xe9)" in error_of(file)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [0.0001, 0.5, 0.9999])
def test_a_truncated_file_is_named(tmp_path: Path, compression: str, cut: float) -> None:
    whole = COMPRESSIONS[compression](json_lines([os.urandom(100).hex() for _ in range(5000)]))
    file = put(tmp_path / f"a.jsonl{compression}", whole[: max(5, int(len(whole) * cut))])
    message = error_of(file)
    assert "FILE is truncated or corrupt after line " in message
    assert message.endswith("; fetch or compress it again")


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_at_all_is_named(tmp_path: Path, compression: str) -> None:
    file = put(tmp_path / f"a.jsonl{compression}", json_lines(["a"] * 100))
    message = error_of(file)
    assert message.startswith("FILE is not compressed with gzip or zstd, as its name promises: it begins with b'{")
    assert f"; take '{compression}' off its name if this is its real content" in message
    assert list(iter_documents(put(tmp_path / f"e.jsonl{compression}", b""), Fields())) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
@pytest.mark.parametrize("compression", [".gz", ".zst", "skippable"])
def test_a_file_is_read_as_what_it_is(tmp_path: Path, name: str, compression: str) -> None:
    """Whatever its name says: many a download is stored as it came."""
    texts = ["one", "two", "three"]
    content = COMPRESSIONS[".gz" if compression == ".gz" else ".zst"](json_lines(texts))
    if compression == "skippable":
        content = b"\x5a\x2a\x4d\x18\x04\0\0\0abcd" + content
    file = put(tmp_path / name, content)
    assert [document.text for document in iter_documents(file, Fields())] == texts


LINES = b'{"text": "a"}\n' * 60


@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (bz2.compress(LINES), "bzip2-compressed", "`bzip2 -dc"),
        (bz2.compress(b""), "bzip2-compressed", "`bzip2 -dc"),
        (lzma.compress(LINES), "xz-compressed", "`xz -dc"),
        (b"PK\x03\x04" + LINES, "a zip archive", "`unzip"),
        (LINES.decode().encode("utf-16"), "UTF-16", "`iconv -f utf-16 -t utf-8 FILE"),
        (LINES.decode().encode("utf-16-le"), "UTF-16 without its mark", "`iconv -f utf-16le"),
        (LINES.decode().encode("utf-16-be"), "UTF-16 without its mark", "`iconv -f utf-16be"),
        (LINES.decode().encode("utf-32"), "UTF-32", "`iconv -f utf-32"),
        (b"PAR1\x15\x04", "a Parquet file", ".parquet"),
        (b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000", "a tar archive", "`tar xf"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, content: bytes, what: str, remedy: str, name: str, packed
) -> None:
    file = put(tmp_path / name, gzip.compress(content, mtime=0) if packed else content)
    message = error_of(file)
    assert message.startswith(f"FILE is {'decompressed once, ' if packed else ''}{what}, whatever its name says; ")
    assert remedy in message
    assert "latin1" not in message


def test_a_file_that_is_compressed_twice_is_named(tmp_path: Path) -> None:
    twice = put(tmp_path / "a.jsonl.gz", gzip.compress(COMPRESSIONS[".zst"](LINES), mtime=0))
    assert error_of(twice) == "FILE is compressed twice; decompress it once (plain UTF-8, gzip and zstd are read)"


@pytest.mark.parametrize("text", ["BZh9 is no magic", "PAR1 is a word", "PK and more", "\x1f\x7f", "ÿþ", "Objects"])
def test_text_that_begins_oddly_is_text(tmp_path: Path, text: str) -> None:
    file = put(tmp_path / "a.txt", text.encode())
    assert [document.text for document in iter_documents(file, Fields())] == [text]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (LINES, "it begins as JSON does: give it a name that ends in .jsonl"),
        (gzip.compress(LINES, mtime=0), "by its first bytes it is compressed: give it a name that ends in .jsonl.gz"),
        (b"PK\x03\x04" + LINES, "by its first bytes it is a zip archive: unpack it"),
        (b"", "fetch or write it again"),
    ],
)
def test_a_file_that_is_called_parquet_and_is_none(tmp_path: Path, content: bytes, remedy: str) -> None:
    message = error_of(put(tmp_path / "a.parquet", content))
    assert message.startswith("FILE is not a readable Parquet file (")
    assert remedy in message


def test_a_line_without_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, "MAX_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1 << 20)
    long = b'{"text": "a"}\n{"text": "' + b"a" * (1 << 26) + b'"}\n'
    for compression, compress in COMPRESSIONS.items():
        tracemalloc.start()
        message = error_of(put(tmp_path / f"a.jsonl{compression}", compress(long)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert message.startswith("FILE, line 2: longer than 1 MiB, which is no document; ")
        assert peak < 1 << 24 or compression == ".zst"  # of which 4 KiB, all this, are unfolded at once
    column = put_table(tmp_path / "a.parquet", text=pa.array(["a", "b" * (1 << 22)]))
    assert error_of(column).startswith("FILE: column 'text' holds strings of more than 1 MiB, which are no documents")
    text = put(tmp_path / "a.txt", b"short\n\n" + b"a line of a text\n" * (1 << 17))
    assert "FILE, line 3: a document of more than 1 MiB begins here; documents end at blank lines" in error_of(text)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_nul_bytes_are_named(tmp_path: Path, name: str) -> None:
    file = put(tmp_path / name, b'{"text": "fine"}\n\n' + bytes(5000) + b"\n")
    assert "FILE, line 3: it holds NUL bytes, so it is no text, or the file is damaged" in error_of(file)
    file = put(tmp_path / "b.jsonl", b'{"text": "an escaped \\u0000 is text"}')
    assert [document.text for document in iter_documents(file, Fields())] == ["an escaped \0 is text"]


def test_a_number_of_thousands_of_digits_beside_the_text(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", b'{"id": -%s, "text": "a", "x": %s.5}' % (b"9" * 5000, b"9" * 5000))
    assert [document.text for document in iter_documents(file, Fields())] == ["a"]
    file = put(tmp_path / "b.jsonl", b'{"text": %s}' % (b"9" * 5000))
    assert "FILE, line 1: field 'text' is not a string but a number" in error_of(file)


def test_a_field_that_comes_twice_is_named(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b", "id": 1, "text": "c"}\n')
    assert "FILE, line 2: field 'text' comes twice, and one of them would be lost; correct the record" in error_of(file)
    once = {"id": {"text": "x"}, "text": 'a "text" of "text"', "more": ["text", {"text": "y"}]}
    file = put(tmp_path / "b.jsonl", json.dumps(once).encode())
    assert [document.text for document in iter_documents(file, Fields())] == [once["text"]]


def test_a_column_that_comes_twice_is_named(tmp_path: Path) -> None:
    texts, ids = pa.array(["a", "b"]), pa.array([1, 2])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([texts, texts, ids], names=["text", "text", "id"]), path)
    file = CorpusFile(url=str(path), name=path.name, size=1)
    assert error_of(file) == "FILE: 2 columns are called 'text'; rename or remove all but the one meant"
    pq.write_table(pa.Table.from_arrays([ids, texts, ids], names=["id", "text", "id"]), path)
    assert [document.text for document in iter_documents(file, Fields())] == ["a", "b"]


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    garbage = put(tmp_path / "g.parquet", b"PAR1 not really" * 10)
    assert "FILE is not a readable Parquet file (" in error_of(garbage)
    file = put_table(tmp_path / "a.parquet", text=pa.array([os.urandom(500).hex() for _ in range(500)]))
    content = (tmp_path / "a.parquet").read_bytes()
    assert "FILE is not a readable Parquet file (" in error_of(put(tmp_path / "t.parquet", content[:-50]))
    middle = len(content) // 2
    damaged = content[: middle - 20_000] + bytes(40_000) + content[middle + 20_000 :]
    assert "FILE is not a readable Parquet file (" in error_of(put(tmp_path / "d.parquet", damaged))
    assert len(list(iter_documents(file, Fields()))) == 500


def test_a_parquet_column_that_does_not_serve_is_named(tmp_path: Path) -> None:
    file = put_table(tmp_path / "a.parquet", id=pa.array([1, 2]), body=pa.array(["a", None]))
    assert error_of(file) == "FILE: no column 'text'; set text_field to one that is there: 'id', 'body'"
    assert "FILE: column 'id' holds int64, not strings" in error_of(file, "id")
    assert "FILE, row 2: column 'body' is null; fill or remove such rows" in error_of(file, "body")
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"ab\xe9")
    latin = put_table(tmp_path / "l.parquet", text=pa.StringArray.from_buffers(2, offsets, data))
    assert "FILE, row 2: column 'text' is not UTF-8 at byte 1" in error_of(latin)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_file_that_vanished_is_named(tmp_path: Path, name: str) -> None:
    file = CorpusFile(url=f"{tmp_path}/{name}", name=name, size=1)
    assert error_of(file) == "FILE is no longer there; restore it, or run again to list the corpus anew"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.jsonl", b"")

    def refuse(*_):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(file_bytes, "_open", refuse)
    assert error_of(file).startswith("FILE may not be read (Access Denied); check its permissions")


def values_of(file: CorpusFile) -> list[tuple[str, float | None]]:
    return [(document.text, document.value) for document in iter_documents(file, Fields(value="quality"))]


def test_a_records_number_comes_with_its_text(tmp_path: Path) -> None:
    lines = [{"text": "a", "quality": 0.5}, {"text": "b", "quality": 3}]
    file = put(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    assert values_of(file) == [("a", 0.5), ("b", 3.0)]
    table = put_table(tmp_path / "a.parquet", text=pa.array(["a", "b"]), quality=pa.array([0.5, 3.0]))
    assert values_of(table) == [("a", 0.5), ("b", 3.0)]
    assert texts_of(table) == [(0, "a"), (1, "b")], "nobody asked for it"


@pytest.mark.parametrize("value", ['"high"', "null", "true", "[1]"])
def test_a_number_that_is_none_is_refused_with_its_place(tmp_path: Path, value: str) -> None:
    content = f'{{"text": "a", "quality": 1}}\n{{"text": "b", "quality": {value}}}\n'
    file = put(tmp_path / "a.jsonl", content.encode())
    with pytest.raises(UserError, match=r"a.jsonl, line 2: field 'quality' is .* not a finite number"):
        values_of(file)


def test_a_column_that_holds_no_numbers_and_a_missing_field_are_refused(tmp_path: Path) -> None:
    table = put_table(tmp_path / "a.parquet", text=pa.array(["a"]), quality=pa.array(["high"]))
    with pytest.raises(UserError, match=r"column 'quality' holds string, not numbers; name another as select\.field"):
        values_of(table)
    with pytest.raises(UserError, match=r"no field 'quality'; set select\.field to one that is there"):
        values_of(put(tmp_path / "b.jsonl", b'{"text": "a"}\n'))
    with pytest.raises(UserError, match="plain text, which has no field 'quality'"):
        values_of(put(tmp_path / "c.txt", b"a\n"))
