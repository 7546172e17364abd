"""Generations of a store: stores that were redone on purpose (`--force`) and are kept beside the earlier ones.

    <root>/targets/3f2a…/math.zarr      the first one
    <root>/targets/3f2a….2/math.zarr    redone (`--force`), with the same inputs

Later stages read the newest complete one. No store is ever overwritten; `ddk clean` removes those that nothing needs,
so that a number may be missing among the generations, the first one's too.
"""

from __future__ import annotations

from storage.files import uri
from storage.stores.manifest import read_manifest


def newest_complete(url: str) -> str:
    """The store to read, and to complete where there is no complete one: then the first.

    Args:
        url: of the first.
    """
    for number in reversed(_begun(url)):
        if _complete(generation(url, number)):
            return generation(url, number)
    return url


def to_make_again(url: str) -> str:
    """The store to write when existing ones must not be used. An unfinished new store is resumed."""
    begun = _begun(url)
    if not begun and read_manifest(url) is None:
        return url
    last = begun[-1] if begun else 1
    return generation(url, last if begun and not _complete(generation(url, last)) else last + 1)


def generation(url: str, number: int) -> str:
    """`('r/targets/3f2a/math.zarr', 2)` → `'r/targets/3f2a.2/math.zarr'`."""
    folder, name = url.rsplit("/", 1)
    return f"{folder}.{number}/{name}"


def first_fingerprint(url: str) -> str:
    """The fingerprint that a store was first made for: `'r/targets/3f2a.2/math.zarr'` → `'3f2a'`."""
    return url.split("/")[-2].partition(".")[0]


def _begun(url: str) -> list[int]:
    """Numbers of the further generations that are there, ascending."""
    kind, first, name = url.rsplit("/", 2)
    folders = (folder.removeprefix(f"{first}.") for folder in uri.list_names(kind) if folder.startswith(f"{first}."))
    numbers = sorted(int(number) for number in folders if number.isdecimal() and number != "1")
    return [n for n in numbers if uri.size_of(uri.join(generation(f"{kind}/{first}/{name}", n), "manifest.json"))]


def _complete(url: str) -> bool:
    manifest = read_manifest(url)
    return manifest is not None and manifest.complete
