"""What `ddk verify` does: one store, or every store below a root."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ddk.errors import UserError
from storage import uri
from storage.manifest import Manifest, read_manifest
from storage.verify import Damage, total_bytes, uncommit, verify
from tasks.progress import meter


def verify_all(url: str, *, full: bool, repair: bool, say: Callable[[str], None]) -> bool:
    """Verify what lies at `url`, and say what is found.

    Args:
        url: of a store, or of a root.
        full: every byte; else presence and sizes only.
        repair: mark damaged shards to be made again.

    Returns:
        Whether everything was as it should be.

    Raises:
        UserError: there is no store.
    """
    stores = list(_stores(url.rstrip("/")))
    if not stores:
        raise UserError(f"there is no store at {url}, nor below {url}/blocks or {url}/targets; correct the URL")
    sound = True
    for store, manifest in stores:
        if not manifest.complete:
            say(f"{store}: not finished; `{_stage(manifest)}` goes on with it")
            continue
        with meter(f"verify {store.rsplit('/', 1)[-1]}", total_bytes(manifest), "bytes") as progress:
            damages = verify(store, manifest, full=full, on_object=progress.advance)
        shards = sum(len(split.shards) for split in manifest.splits.values())
        if not damages:
            say(f"{store}: {shards} shards, {total_bytes(manifest):,} bytes, sound{'' if full else ' in size'}")
            continue
        sound = False
        for line in _told(store, manifest, damages, repair=repair):
            say(line)
    return sound


def _told(store: str, manifest: Manifest, damages: list[Damage], *, repair: bool) -> Iterator[str]:
    for damage in damages:
        yield f"{store}: {damage}"
    if not repair:
        yield f"{store}: `ddk verify {store} --repair` marks these to be made again"
        return
    redone = uncommit(store, manifest, damages)
    numbers = "; ".join(f"{split} {', '.join(map(str, shards))}" for split, shards in redone.items())
    yield f"{store}: taken out: {numbers or 'no shard'}; `{_stage(manifest)}` makes them again, and no others"


def _stage(manifest: Manifest) -> str:
    return "ddk pack CONFIG" if manifest.kind == "blocks" else "ddk cache CONFIG"


def _stores(url: str) -> Iterator[tuple[str, Manifest]]:
    manifest = read_manifest(url)
    if manifest is not None:
        yield url, manifest
        return
    for kind in ("blocks", "targets"):
        for fingerprint in uri.list_names(uri.join(url, kind)):
            for name in uri.list_names(uri.join(url, kind, fingerprint)):
                store = uri.join(url, kind, fingerprint, name)
                found = read_manifest(store)
                if found is not None:
                    yield store, found
