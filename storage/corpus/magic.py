"""Detects from its first bytes what a corpus file really holds, because names can be wrong."""

from __future__ import annotations

from ddk.errors import UserError

HEAD = 512
"""Bytes to look at: a tar archive says what it is at the 257th."""

_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
_BZIP2 = (b"1AY&SY", b"\x17rE8P\x90")
_OTHERS = (
    (b"\xfd7zXZ\x00", "xz-compressed", "`xz -dc FILE | zstd > NAME.zst`"),
    (b"\x04\x22\x4d\x18", "lz4-compressed", "`lz4 -dc FILE | zstd > NAME.zst`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it (`7z x FILE`)"),
    (b"PK\x03\x04", "a zip archive", "unpack it (`unzip FILE`)"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"ARROW1\x00\x00", "an Arrow file", "write it as Parquet"),
    (b"Obj\x01", "an Avro file", "write it as Parquet, or as JSON lines"),
    (b"SQLite format 3\x00", "an SQLite database", "write it as JSON lines"),
    (b"%PDF-", "a PDF document", "extract its text"),
    # The longer ones first: one of UTF-32 begins with one of UTF-16.
    (b"\xff\xfe\x00\x00", "UTF-32", "convert it: `iconv -f utf-32 -t utf-8 FILE > NEW`"),
    (b"\x00\x00\xfe\xff", "UTF-32", "convert it: `iconv -f utf-32 -t utf-8 FILE > NEW`"),
    (b"\xff\xfe", "UTF-16", "convert it: `iconv -f utf-16 -t utf-8 FILE > NEW`"),
    (b"\xfe\xff", "UTF-16", "convert it: `iconv -f utf-16 -t utf-8 FILE > NEW`"),
)


def compression_of(head: bytes) -> str:
    """`.gz` or `.zst`, by the first bytes; else empty."""
    if head[:2] == b"\x1f\x8b":
        return ".gz"
    skippable = head[1:4] == _ZSTD_SKIPPABLE and 0x50 <= head[0] <= 0x5F
    return ".zst" if head[:4] == b"\x28\xb5\x2f\xfd" or skippable else ""


def disguised(head: bytes) -> tuple[str, str] | None:
    """What bytes are that are no text, and what to do about it; None where they may be text, or nothing is known."""
    for magic, what, remedy in _OTHERS:
        if head.startswith(magic):
            return what, remedy
    if head[:3] == b"BZh" and head[4:10] in _BZIP2:
        return "bzip2-compressed", "`bzip2 -dc FILE | zstd > NAME.zst`"
    if head[:4] == b"PAR1" and head[4:5] < b" ":
        return "a Parquet file", "give it a name that ends in .parquet"
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it (`tar xf FILE`)"
    if len(head) >= 4 and any(head[:4]) and any(not any(head[start:8:2]) for start in (0, 1)):
        order = "le" if head[0] else "be"
        return "UTF-16 without its mark", f"convert it: `iconv -f utf-16{order} -t utf-8 FILE > NEW`"
    return None


def check_text(head: bytes, url: str, named: str, *, unpacked: bool) -> None:
    """That the content may be text.

    Args:
        head: its first bytes, decompressed.
        named: the compression that the file's name promises.
        unpacked: whether the content was compressed.

    Raises:
        UserError: it is something else, or not as the name promises.
    """
    within = "decompressed once, " if unpacked else ""
    accepted = "plain UTF-8, gzip and zstd are read"
    if within and compression_of(head):
        raise UserError(f"{url} is compressed twice; decompress it once ({accepted})")
    if found := disguised(head):
        raise UserError(f"{url} is {within}{found[0]}, whatever its name says; {found[1]} ({accepted})")
    if named and head and not unpacked:
        raise UserError(
            f"{url} is not compressed with gzip or zstd, as its name promises: it begins with {head[:16]!r}; take "
            f"'{named}' off its name if this is its real content; otherwise fetch or compress it again"
        )


def if_no_parquet(head: bytes) -> str:
    """What to do about a Parquet file that cannot be read, by its first bytes."""
    if packed := compression_of(head):
        return f"by its first bytes it is compressed: give it a name that ends in .jsonl{packed}, or decompress it"
    if head[:1] in (b"{", b"["):
        return "it begins as JSON does: give it a name that ends in .jsonl"
    if head[:4] != b"PAR1" and (found := disguised(head)):
        return f"by its first bytes it is {found[0]}: {found[1]}"
    return "fetch or write it again"
