"""Generations of a store: stores that were redone on purpose (`--force`) and are kept beside the earlier ones.

    <root>/targets/3f2a…/math.zarr      the first one
    <root>/targets/3f2a….2/math.zarr    redone (`--force`), with the same inputs

Later stages read the newest complete one. No store is ever overwritten or removed.
"""

from __future__ import annotations

from storage.files import uri
from storage.stores.manifest import read_manifest


def newest_complete(url: str) -> str:
    """The store to read, and to complete where there is no complete one: then the first.

    Args:
        url: of the first.
    """
    newest, number = url, 2
    while _begun(url, number):
        if _complete(generation(url, number)):
            newest = generation(url, number)
        number += 1
    return newest


def to_make_again(url: str) -> str:
    """The store to write when existing ones must not be used. An unfinished new store is resumed."""
    if read_manifest(url) is None:
        return url
    number = 2
    while _begun(url, number) and (_complete(generation(url, number)) or _begun(url, number + 1)):
        number += 1
    return generation(url, number)


def generation(url: str, number: int) -> str:
    """`('r/targets/3f2a/math.zarr', 2)` → `'r/targets/3f2a.2/math.zarr'`."""
    folder, name = url.rsplit("/", 1)
    return f"{folder}.{number}/{name}"


def first_fingerprint(url: str) -> str:
    """The fingerprint that a store was first made for: `'r/targets/3f2a.2/math.zarr'` → `'3f2a'`."""
    return url.split("/")[-2].partition(".")[0]


def _begun(url: str, number: int) -> bool:
    return uri.size_of(uri.join(generation(url, number), "manifest.json")) is not None


def _complete(url: str) -> bool:
    manifest = read_manifest(url)
    return manifest is not None and manifest.complete
