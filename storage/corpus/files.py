"""Which files a domain's patterns match, and what their suffixes say is in them.

- `.jsonl`, `.json`: one JSON object a line; the document is one field of it. Blank lines hold no document.
- `.txt`: a document ends at a blank line (or at the file's end). Its lines are joined by a line feed.
- `.parquet`: a document is one row of a column.

The first two may end in `.gz` or `.zst` as well; whether they are compressed, and with which of the two, is seen by
their first bytes (`storage.corpus.magic`). Of the kinds that have fields, further ones may hold a document's
prompt, and where below its domain it belongs (`storage.corpus.leaves`).
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddk.errors import UserError
from storage.errors import StoreError, explained
from storage.files import uri

_SUFFIXES = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")
_ACCEPTED = ".jsonl, .json (one object a line) or .txt, each plain or with .gz or .zst behind it, or .parquet"


class Fields(NamedTuple):
    """Names of the JSON fields or Parquet columns that are read of a record."""

    text: str | None = "text"
    """What holds the document. None in a domain of conversations: then it is the first of `CONVERSATIONS` that the
    record has."""
    prompt: str | None = None
    path: str | None = None
    value: str | None = None
    """What holds a number, by which the record is chosen."""
    messages: bool = False
    """Whether the document is a conversation (`storage.corpus.conversations`) and not a string."""

    def settings(self) -> Iterator[tuple[str, str]]:
        """Each name, and what it is called in the configuration."""
        for name, setting in (
            (self.text, "messages_field" if self.messages else "text_field"),
            (self.prompt, "prompt_field"),
            (self.path, "path_field"),
            (self.value, "select.field"),
        ):
            if name is not None:
                yield name, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFile:
    """One file of a domain."""

    url: str
    name: str
    """Base name: what stays the same when a corpus moves."""
    size: int
    """Bytes as stored (compressed); 0 where the server does not tell."""


def resolve_files(
    patterns: Sequence[str],
    domain: str,
    fields: Fields | None = None,
) -> list[CorpusFile]:
    """The files that the patterns match: sorted by URL, each once, local ones as absolute paths.

    Raises:
        UserError: a pattern matches no file, names a folder or cannot be listed, a file's suffix is unknown, or it is
            a text file and there is to be a prompt or a path.
    """
    found = {file.url: file for pattern in patterns for file in _expand(pattern, domain)}
    for file in found.values():
        check_fields(file, fields or Fields(), f"domain '{domain}': ")
    return [found[url] for url in sorted(found)]


def _expand(pattern: str, domain: str) -> list[CorpusFile]:
    place = f"domain '{domain}', pattern '{pattern}'"
    try:
        fs, path = uri.open_fs(pattern)
        fs.invalidate_cache()
        entries: dict[str, Any] = fs.glob(path, detail=True) if glob.has_magic(path) else {}
        if not entries and (info := _info(fs, path, place)):  # plain, or a name that holds a bracket
            entries = {path: info}
        # A listing does not follow links.
        entries = {path: fs.info(path) if info.get("islink") else info for path, info in entries.items()}
    except StoreError as error:  # of the address itself
        raise UserError(f"{place} cannot be listed: {error}") from error
    except UserError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{place} cannot be listed ({error}); check the URL and the credentials") from error
    except Exception as error:
        if (known := explained(error, place)) is None:
            raise
        raise known from error
    files = {path: info for path, info in entries.items() if info["type"] == "file"}
    for found, info in entries.items():
        if info["type"] == "other":
            raise UserError(f"{place}: {found} is {_special(info)}, which cannot be read twice; store it as a file")
    if entries and not files:
        raise UserError(f"{place} names a folder; name the files in it, for example '{pattern.rstrip('/')}/*.jsonl'")
    if not files:
        raise UserError(f"{place} matches no file; check the path (relative ones start at the working folder)")
    if "::" in pattern and glob.has_magic(path):
        raise UserError(f"{place}: a chained URL ('::') cannot be a glob; name its files one by one")
    return [
        CorpusFile(
            url=pattern if "::" in pattern else path if uri.is_local(pattern) else fs.unstrip_protocol(path),
            name=path.rsplit("/", 1)[-1],
            size=int(info.get("size") or 0),
        )
        for path, info in files.items()
    ]


def _info(fs: Any, path: str, place: str) -> dict[str, Any] | None:
    """Of what lies there; None where nothing does.

    Raises:
        UserError: nobody can tell: a server does not answer, or refuses. fsspec takes that for a missing file.
    """
    try:
        if "http" not in fs.protocol:
            return dict(fs.info(path)) if fs.exists(path) else None
        return dict(fs.info(path))
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            return None
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(
            f"{place}: its server does not answer, or refuses ({said}); check the URL, the network and HTTP_PROXY"
        ) from error


def _special(info: dict[str, Any]) -> str:
    """A local entry that is neither file nor folder."""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(info.get("mode", 0)), "neither file nor folder")


def file_format(file: CorpusFile, place: str = "") -> tuple[str, str]:
    """`('json', '.gz')` for `a.jsonl.gz`.

    Raises:
        UserError: the suffix is unknown; the message begins with `place`.
    """
    stem, suffix = os.path.splitext(file.name.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    kind = _SUFFIXES.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (kind == "parquet" and compression):
        raise UserError(f"{place}{file.url} has an unknown suffix; accepted are {_ACCEPTED}")
    return kind, compression


def check_fields(file: CorpusFile, fields: Fields, place: str = "") -> None:
    """That the file's kind is known, and has fields where one is to hold the prompt, the path, a number or messages.

    Raises:
        UserError: it is not so; the message begins with `place`.
    """
    if file_format(file, place)[0] != "text":
        return
    if fields.messages:
        raise UserError(
            f"{place}{file.url} holds plain text, and format: messages reads the fields of .jsonl and .parquet files; "
            f"leave format out, or put the messages into fields"
        )
    for what, field in (("prompt", fields.prompt), ("path", fields.path)):
        if field is not None:
            raise UserError(
                f"{place}{file.url} holds plain text, which has no field '{field}'; {what}_field goes with .jsonl and "
                f".parquet files: leave it out, or put {what} and text into fields"
            )
    if fields.value is not None:
        raise UserError(
            f"{place}{file.url} holds plain text, which has no field '{fields.value}'; select.by: field goes with "
            f".jsonl and .parquet files"
        )
