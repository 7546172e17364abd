"""The leaves of a domain, and the inputs of each leaf's stores.

A domain without a `path_field` has one leaf, itself, which is identified by the domain's files. A domain with a
`path_field` has one leaf per path in its records; each is identified by a digest of its own documents
(`storage.corpus.leaves`), so that a change in one leaf's records does not affect the stores of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddk.domain_tree import check_leaves, depth
from ddk.errors import UserError
from ddk.values import SPLITS, Split
from storage.corpus.domain import DomainConfig
from storage.corpus.files import CorpusFile, resolve_files
from storage.corpus.leaves import LEAF_VERSION, Leaf, LeafIndex, check_number, read_leaves
from storage.corpus.record_paths import LONGEST_NAME, store_name
from storage.corpus.selecting import ByField
from storage.exchange.foreign import IMPORT_VERSION
from storage.files.digests import DigestCache
from tasks.showing.formats import few
from tasks.showing.progress import meter

_SHOWN = 3

Leaves = dict[str, list[tuple[CorpusFile, Leaf]]]
"""By path, the files that hold a leaf and what of it, in the files' order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafFiles:
    """One leaf, and where its documents lie."""

    domain: str
    """Its whole name."""
    corpus: DomainConfig
    """Of the domain that it is a leaf of."""
    path: str | None
    """What its records' paths are, cut; None where all documents of the files belong to it."""
    train: Sequence[CorpusFile]
    validation: Sequence[CorpusFile]
    """The train files again where a fraction of them is held out."""
    inputs: Mapping[str, Any]
    """What besides tokenizer and packing determines its blocks."""


def domain_leaves(domain: str, corpus: DomainConfig, digests: DigestCache, index: LeafIndex) -> list[LeafFiles]:
    """The leaves of one domain of the configuration, by name.

    Raises:
        UserError: its files cannot be listed or read; a leaf has documents of one split only, lies above another, or
            has too long a name; or there are too many.
    """
    train = resolve_files(corpus.train, domain, corpus.fields)
    held_out = not corpus.validation
    validation = train if held_out else resolve_files(corpus.validation, domain, corpus.validation_fields)
    both = {file.url for file in train} & {file.url for file in validation}
    if both and not held_out:
        raise UserError(
            f"domain '{domain}' reads {sorted(both)[0]} for training and for validation; remove it from one of them"
        )
    if corpus.path_field is None:
        described = {**_settings(corpus), "train": _files(train, digests), "validation": _files(validation, digests)}
        return [
            LeafFiles(domain=domain, corpus=corpus, path=None, train=train, validation=validation, inputs=described)
        ]
    every = {file.url: file for file in (*train, *validation)}
    apart = frozenset() if held_out else frozenset(file.url for file in validation)
    found = _read(domain, corpus, list(every.values()), apart, digests, index)
    leaves: dict[Split, Leaves] = {"train": _joined(train, found), "validation": _joined(validation, found)}
    _check(domain, corpus, leaves)
    return [_leaf(domain, corpus, path, leaves) for path in sorted(leaves["train"])]


def _leaf(domain: str, corpus: DomainConfig, path: str, leaves: Mapping[Split, Leaves]) -> LeafFiles:
    train, validation = ([file for file, _ in leaves[split][path]] for split in SPLITS)
    inputs = {
        "leaf": LEAF_VERSION,
        **corpus.model_dump(include={"validation_fraction", "max_train_blocks", "max_validation_blocks"}),
        **({} if corpus.special_tokens == "text" else {"special_tokens": corpus.special_tokens}),
        **_chosen(corpus),
        "train": _row(path, leaves["train"]),
        "validation": _row(path, leaves["validation"]),
    }
    return LeafFiles(
        domain=f"{domain}/{path}", corpus=corpus, path=path, train=train, validation=validation, inputs=inputs
    )


def _row(path: str, leaves: Leaves) -> list[list[Any]]:
    """As files are described, a list of [name, size, hash]: here of the leaf's documents in all files, in order."""
    parts = [leaf for _, leaf in leaves[path]]
    digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
    return [[path, sum(part.documents for part in parts), digest]]


def _read(
    domain: str,
    corpus: DomainConfig,
    files: Sequence[CorpusFile],
    held_out: Collection[str],
    digests: DigestCache,
    index: LeafIndex,
) -> dict[str, dict[str, Leaf]]:
    """The leaves in each file, by its URL; files that are not remembered are read.

    Args:
        held_out: URLs of the validation files.
    """
    sha256 = digests.get_all([file.url for file in files])
    found = {
        file.url: index.remembered(file, sha256[file.url], corpus, held_out=file.url in held_out) for file in files
    }
    new = [file for file in files if found[file.url] is None]
    with meter(f"paths of {domain}", sum(file.size for file in new), "bytes") as progress:
        for file in new:
            leaves = read_leaves(file, corpus, progress.advance, held_out=file.url in held_out)
            if digests.get(file.url) != sha256[file.url]:
                raise UserError(f"{file.url} changed while it was read; run again once nothing writes to it")
            index.remember(file, sha256[file.url], corpus, leaves, held_out=file.url in held_out)
            found[file.url] = leaves
    return {url: leaves or {} for url, leaves in found.items()}


def _joined(files: Sequence[CorpusFile], found: Mapping[str, Mapping[str, Leaf]]) -> Leaves:
    joined: Leaves = {}
    for file in files:
        for path, leaf in found[file.url].items():
            joined.setdefault(path, []).append((file, leaf))
    return joined


def _check(domain: str, corpus: DomainConfig, leaves: Mapping[Split, Leaves]) -> None:
    paths = sorted(leaves["train"].keys() | leaves["validation"].keys())
    check_number(len(paths), corpus, f"domain '{domain}'")
    if not paths:
        raise UserError(f"domain '{domain}': its files hold no document; give it files that do")
    for path in paths:
        if len(store_name(f"{domain}/{path}")) > LONGEST_NAME:
            raise UserError(f"domain '{domain}': the path '{path}' is too long to name a folder; shorten it")
    try:
        check_leaves(paths)
    except ValueError:
        short = next(path for path in paths if any(other.startswith(f"{path}/") for other in paths))
        below = next(other for other in paths if other.startswith(f"{short}/"))
        raise UserError(
            f"domain '{domain}': some records have the path '{short}' and some '{below}', which lies below it; give "
            f"the former a further part (such as '{short}/other'), or set domains.{domain}.path_depth: {depth(short)}"
        ) from None
    for split in SPLITS:
        if missing := [path for path in paths if path not in leaves[split]]:
            raise UserError(_missing(domain, missing, split))


def _missing(domain: str, paths: Sequence[str], split: Split) -> str:
    named = few([f"'{path}'" for path in paths], _SHOWN)
    deepest = max(map(depth, paths))
    coarser = (
        f", set domains.{domain}.path_depth: {deepest - 1} so that it is merged with its neighbours"
        if deepest > 1
        else ""
    )
    return (
        f"domain '{domain}' has no {split} records of the path {named}, and a leaf is trained and measured on its own; "
        f"add some{coarser}, or remove that path's records"
    )


def _settings(corpus: DomainConfig) -> dict[str, Any]:
    """What of a domain's settings, besides its files, determines its blocks."""
    other = {"train", "validation", "targets", "shift", "compression_config", "path_field", "path_depth", "select"}
    other.add("template_args")  # of the chat, which tasks.planning.store_plan describes
    # Left out where there is none, and where text is text: then they change nothing.
    if corpus.prompt_field is None:
        other.add("prompt_field")
    if corpus.special_tokens == "text":
        other.add("special_tokens")
    if not corpus.messages:
        other |= {"format", "messages_field"}
    if not corpus.imported:
        return {**corpus.model_dump(exclude=other), **_chosen(corpus)}
    return {**corpus.model_dump(exclude={*other, "text_field"}), "rows": IMPORT_VERSION}


def _chosen(corpus: DomainConfig) -> dict[str, Any]:
    """Which records are packed, where a field decides that; blocks are chosen later, and change no store of them."""
    return {"select": corpus.select.model_dump()} if isinstance(corpus.select, ByField) else {}


def _files(files: Sequence[CorpusFile], digests: DigestCache) -> list[list[Any]]:
    found = digests.get_all([file.url for file in files])
    return [[file.name, file.size, found[file.url]] for file in files]
