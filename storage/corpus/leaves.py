"""Finds the leaves to which the records of a domain's files belong, and remembers them across runs.

A file with a `path_field` is read once. For each leaf in it (a path, cut to `path_depth` parts), the number of
documents is stored, and a digest of everything that determines their blocks: texts and prompts, in order. The leaves of
one file therefore change independently. A document that is added, moved or corrected changes only the digest of its own
leaf; other fields, the file's compression and its name change none.

For the same reason, nothing in a leaf may depend on records of other leaves. A document's place is its number within
the leaf, and its content decides whether it is held out for validation (`in_leaf_validation`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from ddk.errors import UserError
from storage.corpus.conversations import CANONICAL_VERSION
from storage.corpus.documents import Text, iter_filed
from storage.corpus.domain import DomainConfig
from storage.corpus.file_bytes import OnBytes
from storage.corpus.files import CorpusFile, file_format
from storage.corpus.record_paths import cut_path, record_path
from storage.files.remembered import recall, remember
from storage.fingerprint import fingerprint

LEAF_VERSION = 1
"""Of how documents are assigned, held out and hashed; raised where the same files would give other blocks."""
MOST_LEAVES = 1000
"""Of a domain. More are no concepts: each has stores, a validation set and a row in the report."""


class Leaf(NamedTuple):
    """What one file holds of one leaf."""

    documents: int
    digest: str
    """sha256 of their texts and prompts, in order."""


class LeafIndex:
    """The leaves of files, remembered in one JSON file by the files' digests.

    It is read once, when it is first asked. The JSON file may be lost, damaged or written by two processes at once;
    that costs time only (`storage.files.remembered`).
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def remembered(
        self, file: CorpusFile, sha256: str, config: DomainConfig, *, held_out: bool = False
    ) -> dict[str, Leaf] | None:
        """The leaves of a file, by path, as it was read before; None where it was not."""
        found: Any = self._known.get(_key(file, sha256, config, held_out))
        if not isinstance(found, dict) or not 0 < len(found) <= MOST_LEAVES:
            return None
        leaves = {path: _leaf(path, fact) for path, fact in found.items()}
        return {path: leaf for path, leaf in leaves.items() if leaf is not None} if all(leaves.values()) else None

    def remember(
        self, file: CorpusFile, sha256: str, config: DomainConfig, leaves: Mapping[str, Leaf], *, held_out: bool = False
    ) -> None:
        new = {_key(file, sha256, config, held_out): dict(leaves)}
        self._known |= new
        remember(self._url, new)

    @cached_property
    def _known(self) -> dict[str, Any]:
        return recall(self._url)


def _leaf(path: str, fact: Any) -> Leaf | None:
    """What was remembered of one leaf; None where it is none, whoever wrote it: its path names a store."""
    if not isinstance(fact, list | tuple) or len(fact) != 2:
        return None
    documents, digest = fact
    counted = isinstance(documents, int) and not isinstance(documents, bool) and documents > 0
    if not counted or not isinstance(digest, str) or re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        return None
    try:
        return Leaf(documents, digest) if record_path(path) == path else None
    except ValueError:
        return None


def _key(file: CorpusFile, sha256: str, config: DomainConfig, held_out: bool = False) -> str:
    fields = config.model_dump(include={"text_field", "prompt_field", "path_field", "path_depth"})
    value_field = None if held_out else config.value_field
    value: dict[str, Any] = {} if value_field is None else {"value_field": value_field}
    if config.messages:
        value |= {"messages": True, "messages_field": config.messages_field, "canonical": CANONICAL_VERSION}
    return fingerprint(
        {"version": LEAF_VERSION, "sha256": sha256, "format": list(file_format(file)), **fields, **value}
    )


def read_leaves(
    file: CorpusFile, config: DomainConfig, on_bytes: OnBytes | None = None, *, held_out: bool = False
) -> dict[str, Leaf]:
    """The leaves of a file, by path.

    Args:
        held_out: whether the file is one of the domain's validation files, whose records are all kept, whatever number
            they carry.

    Raises:
        UserError: as `storage.corpus.documents.iter_filed`; or there are too many.
    """
    counts: dict[str, int] = {}
    hashes: dict[str, Any] = {}
    for path, document in iter_leaf_documents(file, config, on_bytes, held_out=held_out):
        if path not in counts:
            check_number(len(counts) + 1, config, file.url)
            counts[path], hashes[path] = 0, hashlib.sha256()
        counts[path] += 1
        hashes[path].update(_content(document))
        if document.value is not None:
            hashes[path].update(repr(document.value).encode())
    return {path: Leaf(counts[path], hashes[path].hexdigest()) for path in sorted(counts)}


def iter_leaf_documents(
    file: CorpusFile, config: DomainConfig, on_bytes: OnBytes | None = None, *, held_out: bool = False
) -> Iterator[tuple[str, Text]]:
    """Each document of a file with the path of its leaf, below the domain.

    Args:
        held_out: as of `read_leaves`.
    """
    if config.path_field is None:
        raise ValueError("only a domain with a path_field has leaves")
    for path, document in iter_filed(file, config.validation_fields if held_out else config.fields, on_bytes):
        yield cut_path(path, config.path_depth), document


def check_number(leaves: int, config: DomainConfig, place: str) -> None:
    """That a field which is to be a path is no text, and no number of the record.

    Raises:
        UserError: it has too many different values.
    """
    if leaves > MOST_LEAVES:
        raise UserError(
            f"{place}: field '{config.path_field}' has more than {MOST_LEAVES} different paths, and each would be a "
            f"domain of its own; set path_depth to cut them shorter, or path_field to a coarser field"
        )


def in_leaf_validation(domain_seed: int, document: Text, fraction: float) -> bool:
    """Whether a leaf's document is held out: a hash of its content, so that what other leaves hold is no matter.

    Equal documents are held out together. A larger fraction holds out all that a smaller one does.
    """
    key = f"{domain_seed}\0".encode() + _content(document)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < fraction * 2**64


def _content(document: Text) -> bytes:
    # Lengths first: 'ab' + 'c' is not 'a' + 'bc'.
    prompt, text = document.prompt.encode(), document.text.encode()
    return f"{len(prompt)} {len(text)}\0".encode() + prompt + text
