"""What `ddk verify` does: one store, or every store below a root; bytes, and with --replay what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prefect import flow

from ddk.errors import UserError
from flows.config import Config
from storage import uri
from storage.manifest import Manifest, read_manifest, require_complete
from storage.verify import Damage, total_bytes, uncommit, verify
from tasks.plan import plan_stores
from tasks.progress import meter
from tasks.replay import ReplayedBlock, replay
from tasks.sources import open_teacher
from tasks.storage_block import use_storage_block
from tasks.teacher import resolved_dtype


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


@flow(name="replay-targets", persist_result=False)
def replay_stores(config: Config, urls: list[str], blocks: int, seed: int) -> dict[str, list[ReplayedBlock]]:
    """Capture a sample of each store again, with one engine for all.

    Args:
        urls: stores of targets, or a root of theirs; of the configuration's stores those at or below one of these.

    Returns:
        The compared blocks by the store's URL.
    """
    use_storage_block(config.storage_block)
    plan = plan_stores(config.root, config.domains, config.packing, config.teacher)
    wanted = [url.rstrip("/") for url in urls]
    stores = [
        store
        for store in plan.domains.values()
        if not store.corpus.imported
        and any(store.targets_url == url or store.targets_url.startswith(f"{url}/") for url in wanted)
    ]
    if not stores:
        places = ", ".join(store.targets_url for store in plan.domains.values())
        raise UserError(f"none of the configuration's captured stores lies at {', '.join(urls)}; they are {places}")
    with open_teacher(
        config.teacher.model_copy(update={"model": plan.teacher_folder, "revision": None}),
        seq_len=config.packing.seq_len,
        vocab_size=plan.vocab_size,
    ) as engine:
        dtype = resolved_dtype(config.teacher)
        return {store.targets_url: replay(store, dtype, engine, blocks, seed) for store in stores}


def replay_all(url: str, config: Config, *, blocks: int, seed: int, repair: bool, say: Callable[[str], None]) -> bool:
    """Replay what lies at `url`, and say what is found; returns whether every block holds."""
    sound = True
    for store, compared in replay_stores(config, [url], blocks, seed).items():
        wrong = [block for block in compared if not block.holds]
        worst = max(compared, key=lambda block: block.divergence)
        say(
            f"{store}: {len(compared) - len(wrong)} of {len(compared)} blocks are what the teacher says now; "
            f"largest difference: {worst}"
        )
        for block in wrong:
            say(f"{store}: WRONG {block}")
        if wrong and repair:
            manifest = require_complete(store, "targets")
            damages = [
                Damage(
                    split=block.split, shard=block.shard, path=f"shard {block.shard}", what="not what the teacher says"
                )
                for block in wrong
            ]
            for line in _told(store, manifest, damages, repair=True):
                say(line)
        sound = sound and not wrong
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
