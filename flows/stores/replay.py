"""`ddk verify --replay`: compares a store's numbers with those of the live teacher."""

from __future__ import annotations

from collections.abc import Callable

from prefect import flow

from ddk.errors import UserError
from flows.config import Config
from flows.stores.verify import told
from storage.checking.verify_store import Damage
from storage.stores.manifest import require_complete
from tasks.capture.replay import ReplayedBlock, replay
from tasks.planning.store_plan import plan_stores
from tasks.running.storage_block import use_storage_block
from tasks.teachers.config import resolved_dtype
from tasks.teachers.sources import open_teacher


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
            f"{store}: {len(compared) - len(wrong)} of {len(compared)} blocks match what the teacher predicts now; "
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
            for line in told(store, manifest, damages, repair=True):
                say(line)
        sound = sound and not wrong
    return sound
