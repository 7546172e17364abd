"""Removes parts of a root so that a process that dies in the middle leaves nothing that looks complete.

    store        the copy of its manifest, its manifest, its commit records, then everything else
    run          its summary, its mixtures (the newest first), its checkpoints, everything else, its identity last
    checkpoint   its state, then its files

After a death between two of these, a store has no manifest (what is left of it is found as remains), and a run is one
that never finished.
"""

from __future__ import annotations

from storage.cleaning.parts import Part
from storage.files import uri
from storage.files.below import bytes_of, files_below
from storage.files.claims import Claims, Life, Watch
from storage.stores.manifest import COPY, MANIFEST


def lives_of(root: str, places: list[str], watch: Watch) -> dict[str, Life]:
    """Who is at work in these stores and runs, by their folder below the root."""
    return {place: watch.look(uri.join(root, place)) for place in places}


def remove_part(root: str, part: Part, before: float, watch: Watch) -> int | None:
    """Remove one part, unless it was written to or claimed since it was listed.

    Args:
        before: Unix time; where a file was written later, the part stays.
        watch: that has seen the claims before.

    Returns:
        Bytes that were freed; None where the part stays.
    """
    url = uri.join(root, part.path)
    if part.kind == "temporary":
        size = uri.size_of(url)
        uri.remove_file(url)
        return size or 0
    files = files_below(url)
    if any(file.modified >= before for file in files):
        return None
    if part.owner is not None and watch.look(uri.join(root, part.owner)) != "dead":
        return None
    if part.kind in ("store", "run"):
        with Claims(url) as claims:  # who would pack, or train, waits meanwhile, and then finds nothing
            if not claims.take("all"):
                return None
            _remove_store(url) if part.kind == "store" else _remove_run(url)
        uri.remove_tree(url)
        if part.kind == "store":
            uri.remove_empty_folders(url.rpartition("/")[0])
        return bytes_of(files)
    if part.kind == "checkpoint":
        uri.remove_file(uri.join(url, "state.json"))
    uri.remove_tree(url)
    return bytes_of(files)


def _remove_store(url: str) -> None:
    uri.remove_file(uri.join(url, COPY))  # in this order: a copy alone would be taken for a damaged store
    uri.remove_file(uri.join(url, MANIFEST))
    uri.remove_tree(uri.join(url, "commits"))  # before the objects: a record stands for objects that are there
    _remove_all_but(url, ("claims",))


def _remove_run(url: str) -> None:
    uri.remove_file(uri.join(url, "summary.json"))
    mixtures = uri.join(url, "mixtures")
    for name in reversed(uri.list_names(mixtures)):
        uri.remove_file(uri.join(mixtures, name))
    checkpoints = uri.join(url, "checkpoints")
    for name in uri.list_names(checkpoints):
        uri.remove_file(uri.join(checkpoints, name, "state.json"))
        uri.remove_tree(uri.join(checkpoints, name))
    _remove_all_but(url, ("claims", "identity.json"))
    uri.remove_file(uri.join(url, "identity.json"))


def _remove_all_but(url: str, kept: tuple[str, ...]) -> None:
    for name in uri.list_names(url):
        if name not in kept:
            uri.remove_tree(uri.join(url, name))
            uri.remove_file(uri.join(url, name))  # on S3 a tree is what lies below the name
