"""What is needed survives and is as sound as before, what is not is gone: on roots made by chance, and in corners."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_runs import make_run

from storage.checking.verify_runs import run_findings
from storage.checking.verify_store import verify
from storage.cleaning.inventory import take_inventory
from storage.cleaning.needs import Asked, Contents, RunFacts, StoreFacts, StoreKey, decide
from storage.cleaning.parts import Part, Parts, parts_of
from storage.cleaning.removing import lives_of, remove_part
from storage.files import uri
from storage.files.below import files_below
from storage.files.claims import Claims, Watch
from storage.fingerprint import fingerprint
from storage.stores.generations import newest_complete, to_make_again
from storage.stores.layout import Kind
from storage.stores.manifest import StoreWriter, read_manifest

DIMS = {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4}
NAME = "math.zarr"


def make_store(maker: Any, root: str, kind: Kind, number: int = 1, finish: bool = True, **inputs: Any) -> StoreKey:
    dims = {**DIMS, **({"k": 3} if kind == "targets" else {"models": 2} if kind == "scores" else {})}
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {
        "scores": {"train": {"losses": rng.random((5, 2), dtype=np.float32)}},
        "selections": {"train": {"indices": np.arange(3, dtype=np.int32), "scores": rng.random(3, dtype=np.float32)}},
    }.get(kind) or {split: maker.arrays(kind, dims, size) for split, size in (("train", 5), ("validation", 2))}
    first = fingerprint(inputs)
    key = StoreKey(kind, first if number == 1 else f"{first}.{number}", NAME)
    writer = StoreWriter(uri.join(root, key.path), kind, inputs, dims)
    maker.write_shards(writer, content)
    if finish:
        writer.finish()
    return key


def listed(root: str, asked: Asked | None = None, before: float | None = None, watch: Watch | None = None) -> Parts:
    inventory = take_inventory(root)
    claimed = [key.path for key in inventory.stores] + [f"runs/{name}" for name in inventory.runs]
    lives = lives_of(root, claimed, watch or Watch())
    decision = decide(inventory.contents, asked or Asked())
    return parts_of(inventory, decision, lives, time.time() + 3600 if before is None else before)


def clean(root: str, asked: Asked | None = None) -> list[Part]:
    parts = listed(root, asked).removable
    for part in parts:
        assert remove_part(root, part, time.time() + 3600, Watch()) == part.bytes
    return list(parts)


def stores_in(root: str) -> set[str]:
    return {"/".join(file.path.split("/")[:3]) for file in files_below(root) if not file.path.startswith("runs/")}


def findings(root: str) -> set[str]:
    """Everything that `ddk verify` has to say."""
    inventory = take_inventory(root)
    said = {str(one) for name in inventory.runs for one in run_findings(root, name, full=True)}
    for key in inventory.stores:
        url = uri.join(root, key.path)
        manifest = read_manifest(url)
        assert manifest is not None
        said |= {f"{url}: {damage}" for damage in verify(url, manifest, full=True)}
    return said


@pytest.mark.parametrize("seed", range(4))
def test_roots_made_by_chance(tmp_path: Any, maker: Any, seed: int) -> None:
    """Against an oracle of its own: what can be reached from the runs by the names that were given here."""
    root, chance = str(tmp_path), random.Random(seed)
    needs: dict[StoreKey, list[StoreKey]] = {}
    blocks = [make_store(maker, root, "blocks", corpus=n) for n in range(4)]
    needs |= {key: [] for key in blocks}
    targets: list[StoreKey] = []
    for number in range(5):
        of = chance.choice(blocks)
        inputs = {"blocks": of.folder, "teacher": number}
        generations = chance.choice([1, 2, 3])
        targets += [make_store(maker, root, "targets", n, **inputs) for n in range(1, generations + 1)]
        needs |= {key: [of] for key in targets[-generations:]}
    scores = [make_store(maker, root, "scores", blocks=chance.choice(blocks).folder, n=n) for n in range(3)]
    needs |= {key: [one for one in blocks if one.folder == read_inputs(root, key)["blocks"]] for key in scores}
    selections = []
    for n in range(3):
        by, over = chance.choice(scores), chance.choice(targets)
        selections.append(make_store(maker, root, "selections", scores=by.folder, targets=over.first.folder, n=n))
        own = [one for one in targets if one.first == over.first]
        needs[selections[-1]] = [by, own[0], own[-1]]
    roots: list[StoreKey] = []
    for n in range(3):
        read = chance.choice(targets)
        used = [needs[read][0], read, *chance.sample(selections, chance.choice([0, 1]))]
        make_run(root, f"run-{n}", stores={"math": {key.kind: key.folder for key in used}})
        roots += used
    reached: set[StoreKey] = set()
    while roots:
        key = roots.pop()
        if key not in reached:
            reached.add(key)
            roots += needs[key]
    before = findings(root)
    clean(root)
    assert stores_in(root) == {key.path for key in reached}
    assert findings(root) <= before
    assert {part.kind for part in listed(root).removable} == set(), "a second time there is nothing to do"


def read_inputs(root: str, key: StoreKey) -> dict[str, Any]:
    manifest = read_manifest(uri.join(root, key.path))
    assert manifest is not None
    return manifest.inputs


def test_on_either_storage(place: str, maker: Any) -> None:
    kept = make_store(maker, place, "blocks", corpus="a")
    stale = make_store(maker, place, "blocks", corpus="b")
    unfinished = make_store(maker, place, "targets", finish=False, blocks=stale.folder)
    run = make_run(place, "first", stores={"math": {"blocks": kept.folder}})
    make_run(place, "old", start=1.6e9)
    uri.write_bytes(f"{run.url}/checkpoints/step-00000003/rank-00000.safetensors", b"never finished")
    uri.write_bytes(f"{place}/runs/first/{'0' * 32}.tmp", b"half a file")
    uri.write_bytes(f"{place}/blocks/notes.txt", b"a file of somebody's own")
    parts = {part.path: part for part in clean(place, Asked(remove_runs=("old",)))}
    assert set(parts) == {
        *(stale.path, unfinished.path, "runs/old", "runs/first/checkpoints/step-00000002"),
        *("runs/first/checkpoints/step-00000003", f"runs/first/{'0' * 32}.tmp"),
    }
    left = {file.path for file in files_below(place)}
    assert {path for path in left if not path.startswith(("runs/first/", f"{kept.path}/"))} == {"blocks/notes.txt"}
    assert run.summary() is not None
    assert read_manifest(uri.join(place, kept.path)) is not None


def test_what_a_live_claim_covers_and_what_is_young_stays(tmp_path: Any, maker: Any) -> None:
    root = str(tmp_path)
    store = make_store(maker, root, "targets", finish=False, blocks="0" * 16)
    other = make_store(maker, root, "blocks", corpus="b")
    with Claims(uri.join(root, store.path)) as claims:
        assert claims.take("train-00000000")
        parts = listed(root)
        # The pipeline that captures may read the other store next.
        assert {part.path for part in parts.at_work} == {store.path, other.path}
        assert parts.removable == ()
    assert {part.path for part in listed(root).removable} == {store.path, other.path}
    assert {part.path for part in listed(root, before=time.time() - 3600).young} == {store.path, other.path}
    # Between listing and removing somebody begins.
    (part,) = (part for part in listed(root).removable if part.path == store.path)
    with Claims(uri.join(root, store.path)) as claims:
        assert claims.take("train-00000000")
        assert remove_part(root, part, time.time() + 3600, Watch()) is None
    assert remove_part(root, part, time.time() - 3600, Watch()) is None
    assert read_manifest(uri.join(root, store.path)) is not None


def test_claims_of_the_dead_and_records_of_complete_stores(tmp_path: Any, maker: Any) -> None:
    root = str(tmp_path)
    key = make_store(maker, root, "blocks", corpus="a")
    make_run(root, "first", stores={"math": {"blocks": key.folder}}, steps=(4,))
    uri.write_json(f"{root}/{key.path}/claims/all.0000.json", {"owner": "0" * 32})
    uri.write_bytes(f"{root}/{key.path}/commits/train-00000000.json", b"{}")
    assert {part.path: part.kind for part in clean(root)} == {
        f"{key.path}/claims": "claims",
        f"{key.path}/commits": "remains",
    }
    assert read_manifest(f"{root}/{key.path}") is not None


def test_a_death_at_any_removal_leaves_nothing_that_looks_complete(
    tmp_path: Any, maker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that removes something is the last one in turn."""
    removals = ("remove_file", "remove_tree")
    for last in range(1, 40):
        root = str(tmp_path / str(last))
        key = make_store(maker, root, "blocks", corpus="a")
        run = make_run(root, "old")
        calls = 0

        def dying(original: Any, limit: int = last) -> Any:
            def remove(url: str) -> None:
                nonlocal calls
                calls += 1
                if calls > limit:
                    raise KeyboardInterrupt
                original(url)

            return remove

        parts = listed(root, Asked(remove_runs=("old",))).removable
        with monkeypatch.context() as patched:
            # Not the module itself: the claims of the process that dies go with it.
            own = {**vars(uri), **{name: dying(getattr(uri, name)) for name in removals}}
            patched.setattr("storage.cleaning.removing.uri", SimpleNamespace(**own))
            ended = True
            try:
                for part in parts:
                    remove_part(root, part, time.time() + 3600, Watch())
            except KeyboardInterrupt:
                ended = False
        manifest = None if not uri.exists(f"{root}/{key.path}/manifest.json") else read_manifest(f"{root}/{key.path}")
        if manifest is not None:
            damages = verify(f"{root}/{key.path}", manifest, full=True)
            assert {damage.path for damage in damages} <= {"copy/manifest.json"}, "complete, and whole"
        if uri.exists(f"{root}/{key.path}/commits"):
            assert uri.exists(f"{root}/{key.path}/train/tokens/c/0/0")
        if uri.list_names(run.url) != [] and run.identity() is not None and run.summary() is not None:
            assert not [
                one
                for one in run_findings(root, "old", full=True)
                if "student.json" not in one.url and "report" not in one.url
            ]
        clean(root, Asked(remove_runs=("old",)))
        assert files_below(root) == [], "the next call removes the rest"
        if ended:
            return
    raise AssertionError("more removals than there can be")


def test_runs_and_checkpoints_that_others_need() -> None:
    runs = {
        "finished": RunFacts(identity="a" * 16, checkpoints=(2, 4, 6)),
        "child": RunFacts(finished=False, began_from=("finished", 2), checkpoints=(8,)),
        "grown": RunFacts(began_from=("gone", 3), checkpoints=(1, 2)),
        "gone": RunFacts(checkpoints=(3,)),
        "scored": RunFacts(identity="b" * 16, checkpoints=(1, 2)),
        "shown": RunFacts(checkpoints=(5,)),
        "reference": RunFacts(checkpoints=(5,)),
        "user": RunFacts(runs=("reference",), checkpoints=(5, 6)),
        "weekly-1": RunFacts(checkpoints=(1, 2)),
    }
    scores = StoreKey("scores", "c" * 16, NAME)
    contents = Contents(
        stores={scores: StoreFacts(scored_by="b" * 16)}, runs=runs, reports={"comparisons/x": ("shown", "not there")}
    )
    asked = Asked(
        stores=frozenset([scores]),
        keep_runs=("weekly-*",),
        remove_runs=("gone", "shown", "reference", "scored", "weekly-1"),
    )
    found = decide(contents, asked)
    assert found.runs == {"gone"}
    assert found.checkpoints == {"finished": (4,), "grown": (1,), "user": (5,)}
    assert found.held == {
        "reference": "run 'user' needs it",
        "scored": f"{scores.path} was measured with its checkpoints",
        "shown": "comparisons/x shows it",
    }
    everything = decide(contents, Asked(remove_runs=("*",)))
    assert "finished" not in everything.held, "nothing that stays began from it"
    assert everything.stores == {scores}


def test_where_needs_cannot_be_read_everything_stays() -> None:
    store = StoreKey("blocks", "c" * 16, NAME)
    runs = {"broken": RunFacts(unreadable="broken is damaged"), "sound": RunFacts(checkpoints=(1, 2))}
    contents = Contents(stores={store: StoreFacts()}, runs=runs)
    found = decide(contents, Asked())
    assert (found.stores, found.checkpoints, found.blocked) == (frozenset(), {}, ("broken is damaged",))
    # Unless it goes itself.
    found = decide(contents, Asked(remove_runs=("broken",)))
    assert (found.stores, found.runs, found.blocked) == ({store}, {"broken"}, ())


def test_generations_with_numbers_missing(tmp_path: Any, maker: Any) -> None:
    root = str(tmp_path)
    keys = [make_store(maker, root, "targets", number, blocks="0" * 16) for number in (1, 2, 3)]
    make_run(root, "reads", stores={"math": {"targets": keys[1].folder}}, steps=(4,))
    clean(root)
    assert stores_in(root) == {keys[1].path}
    first = uri.join(root, keys[0].path)
    assert newest_complete(first) == uri.join(root, keys[1].path)
    assert to_make_again(first).endswith(keys[2].path)
