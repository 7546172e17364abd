"""What `ddk verify` does: one store, one run, or all that lies in a root; bytes, and with --replay what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prefect import flow

from ddk.errors import UserError
from flows.config import Config
from storage.checking.verify_runs import Finding, comparison_findings, memory_findings, run_findings
from storage.checking.verify_store import Damage, total_bytes, uncommit, verify
from storage.errors import StoreDamagedError, StoreError
from storage.files import uri
from storage.stores.manifest import COPY, MANIFEST, read_manifest, require_complete, sound_copy
from storage.stores.schema import Manifest
from tasks.capture.replay import ReplayedBlock, replay
from tasks.planning.store_plan import plan_stores
from tasks.running.storage_block import use_storage_block
from tasks.showing.progress import meter
from tasks.teachers.config import resolved_dtype
from tasks.teachers.sources import open_teacher


def verify_all(url: str, *, full: bool, repair: bool, say: Callable[[str], None]) -> bool:
    """Verify what lies at `url`, and say what is found.

    Args:
        url: of a store, of a run, or of a root with all that lies in it.
        full: every byte; else presence and sizes only.
        repair: mark damaged shards to be made again, and put a manifest's copy in its place.

    Returns:
        Whether everything was as it should be.

    Raises:
        UserError: there is nothing of ours.
    """
    url = url.rstrip("/")
    root, _, name = url.rpartition("/runs/")
    if name and "/" not in name and (uri.list_names(url) or not _is_store(url)):
        if not uri.list_names(url):
            raise UserError(f"there is no run at {url}; correct the URL")
        return _verify_run(root, name, full=full, say=say)
    stores = [url] if _is_store(url) else list(_stores(url))
    runs, comparisons = (_folders(uri.join(url, kind)) for kind in ("runs", "comparisons"))
    if not (stores or runs or comparisons):
        raise UserError(
            f"there is no store at {url}, nor stores, runs or comparisons below {url}/blocks, /targets, /runs or "
            f"/comparisons; correct the URL"
        )
    sound = [_verify_store(store, full=full, repair=repair, say=say) for store in stores]
    sound += [_verify_run(url, run, full=full, say=say) for run in runs]
    sound += [
        _said(f"{url}/comparisons/{name}", comparison_findings(url, name, full=full), say) for name in comparisons
    ]
    if not _is_store(url):
        sound += [not _tell(memory_findings(url), say), not _tell(list(_without_blocks(url, stores)), say)]
    return all(sound)


def _verify_store(store: str, *, full: bool, repair: bool, say: Callable[[str], None]) -> bool:
    try:
        manifest = read_manifest(store)
        broken = None
    except StoreDamagedError as error:
        manifest, broken = sound_copy(store), error
    except StoreError as error:
        say(str(error))
        return False
    if manifest is None:
        stage = "ddk pack CONFIG" if "/blocks/" in store else "ddk cache CONFIG"
        say(str(broken) if broken else f"{store}: manifest.json is missing; `{stage}` makes the store again")
        return False
    with meter(f"verify {store.rsplit('/', 1)[-1]}", total_bytes(store, manifest), "bytes") as progress:
        damages = verify(store, manifest, full=full, on_object=progress.advance)
    if damages:
        for line in _told(store, manifest, damages, repair=repair):
            say(line)
        return False
    if not manifest.complete:
        say(f"{store}: not finished, and sound so far; `{_stage(manifest)}` goes on with it")
        return True
    shards = sum(len(split.shards) for split in manifest.splits.values())
    say(f"{store}: {shards} shards, {total_bytes(store, manifest):,} bytes, sound{'' if full else ' in size'}")
    return True


def _verify_run(root: str, name: str, *, full: bool, say: Callable[[str], None]) -> bool:
    return _said(f"{root}/runs/{name}", run_findings(root, name, full=full), say)


def _said(url: str, findings: Sequence[Finding], say: Callable[[str], None]) -> bool:
    if not _tell(findings, say):
        say(f"{url}: sound")
    return not findings


def _tell(findings: Sequence[Finding], say: Callable[[str], None]) -> bool:
    for finding in findings:
        say(str(finding))
    return bool(findings)


def _without_blocks(root: str, stores: Sequence[str]) -> Iterator[Finding]:
    """Targets whose blocks are not there: nothing can be trained on them."""
    for store in stores:
        try:
            manifest = read_manifest(store)
        except StoreError:
            continue  # said before
        if manifest is None or manifest.kind != "targets":
            continue
        blocks = uri.join(root, "blocks", str(manifest.inputs.get("blocks")), manifest.name)
        if not uri.list_names(blocks):
            yield Finding(url=blocks, what="missing, and there are targets of it; `ddk pack CONFIG` makes it again")


@flow(name="replay-targets", persist_result=False)
def replay_stores(config: Config, urls: list[str], blocks: int, seed: int) -> dict[str, list[ReplayedBlock]]:
    """Capture a sample of each store again, with one engine for all.

    Args:
        urls: stores of targets, or a root of theirs; of the configuration's stores those at or below one of these.

    Returns:
        The compared blocks by the store's URL.
    """
    use_storage_block(config.storage_block)
    plan = plan_stores(config.root, config.domains, config.packing, config.teacher, student=config.student)
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
    if not redone and manifest.complete and read_manifest(store) == manifest:
        yield f"{store}: the manifest is put right"
        return
    numbers = "; ".join(f"{split} {', '.join(map(str, shards))}" for split, shards in redone.items())
    yield f"{store}: taken out: {numbers or 'no shard'}; `{_stage(manifest)}` makes them again, and no others"


def _stage(manifest: Manifest) -> str:
    return "ddk pack CONFIG" if manifest.kind == "blocks" else "ddk cache CONFIG"


def _is_store(url: str) -> bool:
    return any(uri.size_of(uri.join(url, name)) is not None for name in (MANIFEST, COPY))


def _stores(url: str) -> Iterator[str]:
    """Every store below a root, also one whose manifest is lost."""
    for kind in ("blocks", "targets"):
        for fingerprint in uri.list_names(uri.join(url, kind)):
            for name in uri.list_names(uri.join(url, kind, fingerprint)):
                if name.endswith(".zarr"):
                    yield uri.join(url, kind, fingerprint, name)


def _folders(url: str) -> list[str]:
    return [name for name in uri.list_names(url) if uri.list_names(uri.join(url, name))]
