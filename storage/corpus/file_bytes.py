"""Reads a corpus file's bytes, counting them, and its lines, with any supported compression."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import zstandard

from ddk.errors import UserError
from storage.corpus.files import CorpusFile
from storage.corpus.magic import HEAD, check_text, compression_of
from storage.files import uri

_BROKEN_COMPRESSION = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
_CHUNK = 1 << 20
MAX_DOCUMENT_BYTES = 1 << 28
"""Of a line, or of a text between blank lines: 256 MiB. A longer one is no document, and would take memory for what a
few bytes of a compressed file can unfold to."""

OnBytes = Callable[[int], None]


@contextlib.contextmanager
def opened(file: CorpusFile, on_bytes: OnBytes | None = None) -> Iterator[io.RawIOBase]:
    """The stored bytes of a file.

    Raises:
        UserError: here, or while it is read: the file is no longer there, or may not be read.
    """
    try:
        with _open(file, on_bytes) as stored:
            yield stored
    except FileNotFoundError:
        raise UserError(f"{file.url} is no longer there; restore it, or run again to list the corpus anew") from None
    except PermissionError as error:
        raise UserError(f"{file.url} may not be read ({error}); check its permissions or the credentials") from None


def stored_lines(stored: io.RawIOBase, file: CorpusFile, compression: str) -> Iterator[tuple[int, bytes]]:
    """Index and bytes of every line, its line feed included, the byte order mark of some editors not.

    Args:
        compression: what the file's name promises. How it is read is decided by its first bytes.

    Raises:
        UserError: the content is no text, is compressed otherwise than with gzip or zstd, truncated or corrupt, or has
            a line of more than 256 MiB.
    """
    number = 0
    try:
        packed = io.BufferedReader(stored, _CHUNK)
        found = compression_of(packed.peek(HEAD)[:HEAD])
        with _decompressed(packed, found) as stream:
            check_text(stream.peek(HEAD)[:HEAD], file.url, compression, unpacked=bool(found))
            while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise UserError(
                        f"{file.url}, line {number + 1}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB, which is no "
                        f"document; one is a line (.jsonl), or ends at a blank line (.txt): split it, "
                        f"or correct the file"
                    )
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
                number += 1
    except _BROKEN_COMPRESSION as error:
        raise UserError(
            f"{file.url} is truncated or corrupt after line {number} ({error}); fetch or compress it again"
        ) from error


def first_bytes(stored: io.RawIOBase) -> bytes:
    """Those that say what a file is; none where they cannot be read."""
    try:
        stored.seek(0)
        return stored.read(HEAD) or b""
    except (OSError, ValueError):
        return b""


def _decompressed(packed: io.BufferedReader[Any], compression: str) -> io.BufferedReader[Any]:
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=packed), _CHUNK)
    return io.BufferedReader(_ZstdReader(packed), _CHUNK) if compression else packed


class _ZstdReader(io.RawIOBase):
    """The content of one zstd frame after another. Unlike zstandard's own stream reader it notices a cut-off end."""

    def __init__(self, stored: io.BufferedReader[Any]) -> None:
        self._stored = stored
        # Archives made with `zstd --long=31` need the widest window.
        self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = self._zstd.decompressobj()
        self._begun = False  # within a frame
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            # Little at a time, since a few bytes can unfold to much.
            self._compressed = self._compressed or self._stored.read(1 << 12) or b""
            if not self._compressed:
                if self._begun:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._content = memoryview(self._frame.decompress(self._compressed))
            self._compressed, self._begun = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._zstd.decompressobj()
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size


class _Counted(io.RawIOBase):
    """A file that tells how much of it has been read, whatever decompresses or seeks on top of it."""

    def __init__(self, file_system: Any, file: Any, on_bytes: OnBytes | None) -> None:
        # The file system is kept as well: an archive's closes its files when it is let go of.
        self._file_system, self._file, self._on_bytes = file_system, file, on_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        size = int(self._file.readinto(buffer))
        if self._on_bytes is not None and size:
            self._on_bytes(size)
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open(file: CorpusFile, on_bytes: OnBytes | None) -> _Counted:
    fs, path = uri.open_fs(file.url)
    return _Counted(fs, fs.open(path, "rb", block_size=8 * _CHUNK), on_bytes)
