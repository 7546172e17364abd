"""`ddk verify`: checks every byte of a store, of a run, or of everything in a root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ddk.errors import UserError
from storage.checking.verify_runs import Finding, memory_findings, report_findings, run_findings
from storage.checking.verify_store import Damage, total_bytes, uncommit, verify
from storage.errors import StoreDamagedError, StoreError
from storage.files import uri
from storage.runs.folder import run_at
from storage.runs.reports import ComparisonFolder, LawFolder
from storage.stores.generations import newest_complete
from storage.stores.layout import KINDS
from storage.stores.manifest import COPY, MANIFEST, STAGE, read_manifest, sound_copy
from storage.stores.schema import Manifest
from tasks.showing.progress import meter


def verify_all(url: str, *, full: bool, repair: bool, say: Callable[[str], None]) -> bool:
    """Verify what lies at `url`, and say what is found.

    Args:
        url: of a store, of a run, or of a root with all that lies in it.
        full: every byte; else presence and sizes only.
        repair: remove damaged shards so that they are recreated, and restore manifests from their copies.

    Returns:
        Whether everything was as it should be.

    Raises:
        UserError: there is no store, run, comparison, law or root at the URL.
    """
    url = url.rstrip("/")
    run = run_at(url)
    if run is not None and (uri.list_names(url) or not _is_store(url)):
        if not uri.list_names(url):
            raise UserError(f"there is no run at {url}; correct the URL")
        return _verify_run(*run, full=full, say=say)
    stores = [url] if _is_store(url) else list(_stores(url))
    runs = _folders(uri.join(url, "runs"))
    reports = [
        kind(url, name) for kind in (ComparisonFolder, LawFolder) for name in _folders(uri.join(url, kind.folder))
    ]
    if not (stores or runs or reports):
        raise UserError(
            f"there is no store at {url}, nor stores, runs, comparisons or laws below {url}/blocks, /targets, /runs, "
            f"/comparisons or /laws; correct the URL"
        )
    sound = [_verify_store(store, full=full, repair=repair, say=say) for store in stores]
    sound += [_verify_run(url, run, full=full, say=say) for run in runs]
    sound += [_said(report.url, report_findings(report, full=full), say) for report in reports]
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
        stages = (STAGE[kind] for kind in KINDS if f"/{kind}/" in store)
        stage = f"{next(stages, STAGE['targets'])} CONFIG"
        say(str(broken) if broken else f"{store}: manifest.json is missing; `{stage}` makes the store again")
        return False
    with meter(f"verify {store.rsplit('/', 1)[-1]}", total_bytes(store, manifest), "bytes") as progress:
        damages = verify(store, manifest, full=full, on_object=progress.advance)
    if damages:
        for line in told(store, manifest, damages, repair=repair):
            say(line)
        return False
    if not manifest.complete:
        say(f"{store}: not finished, but sound so far; `{_stage(manifest)}` goes on with it")
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
            if manifest is None or manifest.kind != "targets":
                continue
            blocks = newest_complete(uri.join(root, "blocks", str(manifest.inputs.get("blocks")), manifest.name))
        except StoreError:
            continue  # said before
        if not uri.list_names(blocks):
            yield Finding(url=blocks, what="missing, and there are targets of it; `ddk pack CONFIG` recreates it")


def told(store: str, manifest: Manifest, damages: list[Damage], *, repair: bool) -> Iterator[str]:
    """Lines about what is damaged; with `repair` the shards are marked to be made again."""
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
    return f"{STAGE[manifest.kind]} CONFIG"


def _is_store(url: str) -> bool:
    return any(uri.size_of(uri.join(url, name)) is not None for name in (MANIFEST, COPY))


def _stores(url: str) -> Iterator[str]:
    """Every store below a root, also one whose manifest is lost."""
    for kind in KINDS:
        for fingerprint in uri.list_names(uri.join(url, kind)):
            for name in uri.list_names(uri.join(url, kind, fingerprint)):
                if name.endswith(".zarr"):
                    yield uri.join(url, kind, fingerprint, name)


def _folders(url: str) -> list[str]:
    return [name for name in uri.list_names(url) if uri.list_names(uri.join(url, name))]
