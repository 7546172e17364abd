"""Several captures of one store: each shard once, whoever lives and whoever dies."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddk.errors import UserError
from ddk.values import Int32Array, SparseTargets, Split
from storage.corpus.domain import DomainConfig
from storage.files import claims as storage_claims
from storage.files.below import bytes_of, files_below
from storage.stores.codec import CodecConfig, TargetFormat
from storage.stores.manifest import StoreWriter, read_manifest
from storage.targets import TargetWriter, open_targets
from tasks.capture.cache_targets import cache_targets
from tasks.planning.store_plan import StorePlan
from tasks.running import sharing
from tasks.running.sharing import ShardQueue, alone

BLOCKS: dict[Split, int] = {"train": 21, "validation": 5}
SEQ_LEN, K, VOCAB = 6, 3, 50
BLOCK_DIMS = {"seq_len": SEQ_LEN, "vocab_size": VOCAB, "shard_blocks": 8}
DIMS = {"seq_len": SEQ_LEN, "vocab_size": VOCAB, "k": K, "shard_blocks": 2}
SHARDS: dict[Split, int] = {"train": 11, "validation": 3}


class SlowTeacher:
    """Targets that follow from the tokens; notes what it was asked for."""

    def __init__(self, seconds: float = 0.01, die_after: int | None = None) -> None:
        self.captured: list[bytes] = []
        self.die_after = die_after
        self.seconds = seconds

    def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        if self.die_after is not None and len(self.captured) >= self.die_after:
            raise RuntimeError("the engine is gone")
        self.captured.append(tokens_BL1.tobytes())
        time.sleep(self.seconds)
        ids = np.stack([(tokens_BL1[:, 1:] + i) % VOCAB for i in range(K)], axis=-1).astype(np.int32)
        logprobs = np.log(np.broadcast_to(np.array([0.5, 0.25, 0.125], np.float32), ids.shape))
        return SparseTargets(
            ids_BLK=ids,
            logprobs_BLK=logprobs,
            tail_mass_BL=np.full(ids.shape[:2], 0.125, np.float32),
            true_logprobs_BL=logprobs[..., 0],
            entropy_BL=np.full(ids.shape[:2], 1.0, np.float32),
        )


def one_store(root: Path) -> StorePlan:
    """A domain's packed blocks, and the plan of its targets."""
    store = StorePlan(
        root=str(root),
        domain="math",
        corpus=DomainConfig(train=[str(root / "math.jsonl")], validation_fraction=0.1),
        train_files=(),
        validation_files=(),
        blocks_url=str(root / "blocks/aa/math.zarr"),
        blocks_inputs={},
        blocks_dims=BLOCK_DIMS,
        targets_url=str(root / "targets/bb/math.zarr"),
        targets_inputs={"k": K},
        targets_dims=DIMS,
        targets_form=TargetFormat(codec=CodecConfig(), entropy=True, draws=0, temperatures=()),
    )
    writer = StoreWriter(store.blocks_url, "blocks", {}, BLOCK_DIMS)
    rng = np.random.default_rng(0)
    for split, count in BLOCKS.items():
        tokens = rng.integers(0, VOCAB, (count, SEQ_LEN + 1), dtype=np.int32)
        for first in range(0, count, 8):
            writer.write_shard(split, first // 8, {"tokens": tokens[first : first + 8]})
    writer.finish()
    return store


class OnePlan(dict[str, StorePlan]):
    @property
    def domains(self) -> list[str]:
        return list(self)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnePlan:
    monkeypatch.setattr(sharing, "SECONDS_BETWEEN_LOOKS", 0.05)
    return OnePlan(math=one_store(tmp_path))


def capture(plan: Any, teacher: SlowTeacher, part: int = 1, parts: int = 1) -> dict[str, Any]:
    return cache_targets.fn(plan, "math", teacher, part, parts)


@pytest.mark.parametrize("parts", [1, 3])
def test_several_share_the_shards_and_none_is_captured_twice(plan: Any, parts: int) -> None:
    teachers = [SlowTeacher() for _ in range(3)]
    with ThreadPoolExecutor(3) as executor:
        done = list(executor.map(lambda i: capture(plan, teachers[i], part=min(i + 1, parts), parts=parts), range(3)))
    counts = Counter(shard for teacher in teachers for shard in teacher.captured)
    assert set(counts.values()) == {1}
    assert len(counts) == sum(SHARDS.values())
    assert [each["shards_written"] for each in done] == [len(teacher.captured) for teacher in teachers]
    assert all(teacher.captured for teacher in teachers)
    manifest = read_manifest(plan["math"].targets_url)
    assert manifest is not None
    assert manifest.complete
    assert not list(Path(plan["math"].targets_url).glob("c*s/**/*")), "neither commits nor claims are left"
    tokens = np.frombuffer(teachers[0].captured[0], np.int32).reshape(-1, SEQ_LEN + 1)
    found = open_targets(plan["math"].targets_url).read(np.arange(BLOCKS["train"])).ids_BLK[:, :, 0]
    assert any((found[i : i + len(tokens)] == tokens[:, 1:]).all() for i in range(0, BLOCKS["train"], 2))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_quota_stops_after_a_shard_and_the_same_goes_on_when_it_is_raised(plan: Any, parts: int) -> None:
    url = Path(plan["math"].targets_url)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        capture(plan, failing := SlowTeacher(die_after=6))
    limit = int(1.2 * bytes_of(files_below(str(url))))
    with pytest.raises(UserError, match=rf"teacher\.max_bytes is {limit:,}; every shard so far is kept"):
        cache_targets.fn(plan, "math", limited := SlowTeacher(), 1, parts, limit)
    assert 0 < len(limited.captured) < sum(SHARDS.values()) - len(failing.captured)
    kept = len(list(url.glob("commits/**/*.json")))
    assert kept >= len(failing.captured) - 1 + len(limited.captured), "whatever was captured is kept"

    with pytest.raises(UserError, match="the capture has stopped"):
        cache_targets.fn(plan, "math", nothing := SlowTeacher(), 1, parts, limit - 1000)
    assert not nothing.captured
    capture(plan, rest := SlowTeacher())
    assert len(rest.captured) == sum(SHARDS.values()) - kept


def test_who_comes_later_gets_what_is_left_and_waits_for_what_is_in_hand(plan: Any) -> None:
    slow, quick = SlowTeacher(seconds=0.5), SlowTeacher(seconds=0.0)
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(capture, plan, slow)
        while not slow.captured and not first.done():
            time.sleep(0.01)
        second = executor.submit(capture, plan, quick)
        assert not second.result()["done_before"]
        manifest = read_manifest(plan["math"].targets_url)
        assert manifest is not None
        assert manifest.complete, "it returned when all was captured, the other's shards too"
        first.result()
    assert 1 <= len(slow.captured) <= 3
    assert len(set(slow.captured) | set(quick.captured)) == len(slow.captured) + len(quick.captured)


def test_another_takes_over_what_one_leaves_behind(plan: Any) -> None:
    failing, patient = SlowTeacher(seconds=0.05, die_after=2), SlowTeacher(seconds=0.05)
    with ThreadPoolExecutor(2) as executor:
        first, second = executor.submit(capture, plan, failing, 1, 2), executor.submit(capture, plan, patient, 2, 2)
        with pytest.raises(RuntimeError, match="the engine is gone"):
            first.result()
        assert second.result()["shards_written"] == sum(SHARDS.values()) - len(failing.captured)


def test_who_was_taken_for_dead_does_not_write_over_another_s_shard(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept: it captured a shard, and meanwhile another has committed it."""
    woken, asleep = threading.Event(), threading.Event()

    class Sleeper(SlowTeacher):
        def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
            targets = super().capture(tokens_BL1)
            if len(self.captured) == 1:
                asleep.set()
                assert woken.wait(30)
            return targets

    sleeper, other = Sleeper(), SlowTeacher()
    written: list[tuple[str, int]] = []
    write_shard = TargetWriter.write_shard

    def noting(self: TargetWriter, split: Any, shard: int, *args: Any) -> Any:
        written.append((split, shard))
        return write_shard(self, split, shard, *args)

    monkeypatch.setattr(TargetWriter, "write_shard", noting)
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(capture, plan, sleeper)
        assert asleep.wait(30)
        # Seen from another machine, and with no patience.
        monkeypatch.setattr(storage_claims, "_machine", lambda: "another")
        monkeypatch.setattr(storage_claims, "PATIENCE", 0.0)
        assert capture(plan, other)["shards_written"] == sum(SHARDS.values())
        woken.set()
        first.result()
    assert sorted(written) == sorted((split, i) for split, count in SHARDS.items() for i in range(count))


def test_parts_begin_at_places_of_their_own(plan: Any) -> None:
    store = plan["math"]
    writer = TargetWriter(store.targets_url, store.targets_inputs, DIMS, store.targets_form)
    with _claims(store.targets_url) as first, _claims(store.targets_url) as second:
        queues = [ShardQueue(writer, claims, SHARDS, part, 2) for part, claims in ((1, first), (2, second))]
        assert [queue.take() for queue in queues] == [("train", 0), ("train", 7)]
        assert [queue.take() for queue in queues] == [("train", 1), ("train", 8)]


@contextmanager
def _claims(url: str) -> Iterator[storage_claims.Claims]:
    with storage_claims.Claims(url) as claims:
        yield claims


def test_alone_lets_one_in_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ddk")
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with alone(str(tmp_path), "pack math"):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.1)
            inside.remove(number)

    with ThreadPoolExecutor(3) as executor:
        list(executor.map(work, range(3)))
    assert most == [1, 1, 1]
    assert "pack math: another process is doing this; waiting for it to finish" in caplog.messages
