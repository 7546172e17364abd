from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk.ahead import FetchesAhead
from ddk.data import Batch, TrainData, prefetch
from ddk.errors import LostPartError
from ddk.sampler import Window
from ddk.values import Draw, SparseTargets

L, K = 3, 2


class Blocks:
    """Every value names its domain, block and position; every read is noted."""

    def __init__(self, domain_number: int, size: int) -> None:
        self.base = domain_number * 10_000
        self.size = size
        self.reads: list[list[int]] = []

    def __len__(self) -> int:
        return self.size

    def values(self, indices, width: int) -> np.ndarray:
        return self.base + 10 * np.asarray(indices)[:, None] + np.arange(width)

    def read(self, indices) -> np.ndarray:
        self.reads.append([int(index) for index in indices])
        return self.values(indices, L + 1).astype(np.int32)


class Targets(Blocks):
    k = K
    vocab_size = 100

    def read(self, indices) -> SparseTargets:
        values = self.values(indices, L)
        return SparseTargets(
            ids_BLK=np.stack([values, values + 5], -1).astype(np.int32),
            logprobs_BLK=np.stack([-values, -values - 5], -1).astype(np.float32),
            tail_mass_BL=(values + 0.25).astype(np.float32),
            true_logprobs_BL=(-values - 0.5).astype(np.float32),
        )


DOMAINS = ("web", "code", "math")


def train_data(targets: bool = True, size: int = 50) -> TrainData:
    return TrainData(
        blocks={domain: Blocks(number, size) for number, domain in enumerate(DOMAINS)},
        targets={domain: Targets(number, size) for number, domain in enumerate(DOMAINS)} if targets else None,
    )


draws_strategy = st.lists(
    st.builds(Draw, domain=st.sampled_from(DOMAINS), index=st.integers(0, 49)), min_size=1, max_size=20
)


@settings(deadline=None)
@given(draws=draws_strategy)
def test_rows_come_in_the_order_of_the_draws(draws: list[Draw]) -> None:
    batch = train_data().load(draws)
    base = np.array([DOMAINS.index(one.domain) * 10_000 + 10 * one.index for one in draws])
    assert (batch.tokens_BL1 == base[:, None] + np.arange(L + 1)).all()
    values = base[:, None] + np.arange(L)
    assert (batch.targets.ids_BLK == np.stack([values, values + 5], -1)).all()
    assert (batch.targets.logprobs_BLK == -np.stack([values, values + 5], -1)).all()
    assert (batch.targets.tail_mass_BL == (values + 0.25).astype(np.float32)).all()
    assert (batch.targets.true_logprobs_BL == (-values - 0.5).astype(np.float32)).all()
    assert batch.tokens_BL1.dtype == np.int32
    assert batch.targets.logprobs_BLK.dtype == np.float32


@settings(deadline=None)
@given(draws=draws_strategy)
def test_one_read_a_domain_and_only_of_the_domains_drawn(draws: list[Draw]) -> None:
    data = train_data()
    data.load(draws)
    for domain in DOMAINS:
        wanted = [one.index for one in draws if one.domain == domain]
        assert data.blocks[domain].reads == ([wanted] if wanted else [])


def test_without_targets_none_are_read() -> None:
    batch = train_data(targets=False).load([Draw(domain="web", index=1)])
    assert batch.targets is None


def test_sizes() -> None:
    assert train_data().sizes == {"web": 50, "code": 50, "math": 50}


def plans(count: int) -> list[list[Draw]]:
    return [[Draw(domain=DOMAINS[n % 3], index=n % 50), Draw(domain="web", index=7)] for n in range(count)]


def same(one: Batch, other: Batch) -> bool:
    return np.array_equal(one.tokens_BL1, other.tokens_BL1) and np.array_equal(one.targets.ids, other.targets.ids)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ddk-prefetch"]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_prefetch_gives_the_batches_in_order(count: int, ahead: int) -> None:
    data = train_data()
    batches = list(prefetch(plans(count), data, ahead=ahead))
    assert len(batches) == count
    assert all(same(batch, data.load(plan)) for batch, plan in zip(batches, plans(count), strict=True))
    assert reading_threads() == []


class BrokenBlocks(Blocks):
    def read(self, indices) -> np.ndarray:
        if 9 in indices:
            raise OSError("shard 3 is damaged")
        return super().read(indices)


def test_an_error_of_the_thread_is_raised_at_its_batch() -> None:
    data = TrainData(blocks={"web": BrokenBlocks(0, 50)}, targets=None)
    batches = prefetch([[Draw(domain="web", index=index)] for index in (7, 8, 9, 10)], data)
    assert next(batches).tokens_BL1[0, 0] == 70
    assert next(batches).tokens_BL1[0, 0] == 80
    with pytest.raises(OSError, match="shard 3 is damaged"):
        next(batches)
    assert reading_threads() == []
    assert list(batches) == []
    assert [read for reads in data.blocks["web"].reads for read in reads] == [7, 8]


def test_an_error_of_the_plans_is_raised_too() -> None:
    def failing():
        yield [Draw(domain="web", index=1)]
        raise RuntimeError("no plan")

    batches = prefetch(failing(), train_data())
    next(batches)
    with pytest.raises(RuntimeError, match="no plan"):
        next(batches)
    assert reading_threads() == []


def test_a_reading_thread_that_has_died_is_no_reason_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk.data.threading.Thread.run", lambda thread: None)
    with pytest.raises(LostPartError, match="the thread that reads the training data has ended without an error"):
        next(prefetch(iter(plans(3)), train_data()))


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_early_stops_the_thread(taken: int) -> None:
    data = train_data()
    batches = prefetch(plans(1000), data)
    for _ in range(taken):
        next(batches)
    batches.close()
    assert reading_threads() == []
    assert sum(len(blocks.reads) for blocks in data.blocks.values()) < 40


def test_a_consumer_that_fails_leaves_no_thread() -> None:
    def consume() -> None:
        for number, _ in enumerate(prefetch(plans(1000), train_data())):
            if number == 2:
                raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    deadline = time.monotonic() + 5
    while reading_threads() and time.monotonic() < deadline:  # the traceback's frames hold the iterator for a while
        time.sleep(0.01)
    assert reading_threads() == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_ahead_and_two_are_read_beyond_the_consumer(ahead: int) -> None:
    planned = 0

    def noted():
        nonlocal planned
        for plan in plans(30):
            planned += 1
            yield plan

    batches = prefetch(noted(), train_data(), ahead=ahead)
    for consumed in range(1, 6):
        next(batches)
        time.sleep(0.15)  # time enough for a thread without a bound to run away
        assert planned <= consumed + ahead + 2
    assert planned >= 5 + ahead, "it does read ahead"
    batches.close()


def test_reading_goes_on_while_the_consumer_works() -> None:
    data = train_data()
    batches = prefetch(plans(3), data)
    next(batches)
    deadline = time.monotonic() + 5
    while sum(len(blocks.reads) for blocks in data.blocks.values()) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Three plans of one or two domains each, all read although only one batch was taken.
    assert sum(len(blocks.reads) for blocks in data.blocks.values()) == 5
    batches.close()


# Fetching ahead


class FarBlocks(Blocks):
    """Notes what is fetched, and how far the reading was then."""

    def __init__(self, domain_number: int, size: int) -> None:
        super().__init__(domain_number, size)
        self.fetched: list[tuple[int, ...]] = []
        self.distance: list[int] = []
        self.room = True
        self.refused = 0
        self.broken = False
        self.released = threading.Event()
        self.released.set()
        self.entered = threading.Event()

    def fetch(self, indices) -> bool:
        self.entered.set()
        self.released.wait(30)
        if self.broken:
            raise OSError("no answer")
        if not self.room:
            self.refused += 1
            return False
        self.fetched.append(tuple(indices))
        self.distance.append(min(indices) - len(self.reads))
        return True


def far_data(size: int = 200) -> TrainData:
    return TrainData(blocks={"web": FarBlocks(0, size)}, targets=None)


def one_a_step(count: int) -> list[list[Draw]]:
    return [[Draw(domain="web", index=index)] for index in range(count)]


@pytest.fixture(autouse=True)
def _other_tests_threads() -> None:
    """One that hangs on a server, as a test of the storage wants it, is none of ours."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


OTHERS: set[threading.Thread] = set()


def fetching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ddk-fetch" and thread not in OTHERS]


def wait_until_fetched(far: FarBlocks, index: int) -> None:
    wait_for(lambda: (index,) in far.fetched)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_every_step_is_fetched_ahead_and_none_too_early() -> None:
    data = far_data()
    far = data.blocks["web"]
    assert isinstance(far, FetchesAhead)
    batches = prefetch(one_a_step(100), data, ahead=2, fetch_ahead=10)
    for number, batch in enumerate(batches):
        assert batch.tokens_BL1[0, 0] == 10 * number
        # Two batches wait, and a third is read and has no place yet.
        reading = min(number + 3, 99)
        wait_until_fetched(far, min(reading + 10, 99))
        assert max(far.fetched) <= (reading + 11,)
    assert len(far.fetched) == len(set(far.fetched)) >= 85
    assert {index for (index,) in far.fetched} >= set(range(14, 100)), "of the first some were read at once"
    assert max(far.distance) <= 11
    assert fetching_threads() == reading_threads() == []


def test_blocks_and_targets_of_each_domain_are_fetched() -> None:
    class FarTargets(Targets):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.fetched: list[list[int]] = []

        def fetch(self, indices) -> bool:
            self.fetched.append(list(indices))
            return True

    data = TrainData(
        blocks={"web": FarBlocks(0, 50), "code": Blocks(1, 50)},
        targets={"web": FarTargets(0, 50), "code": FarTargets(1, 50)},
    )
    draws = [Draw(domain="code", index=3), Draw(domain="web", index=5), Draw(domain="code", index=4)]
    batches = prefetch([draws[:1]] * 8 + [draws], data, ahead=1)
    next(batches)
    wait_for(lambda: len(data.targets["code"].fetched) >= 6 and data.blocks["web"].fetched)
    list(batches)
    assert data.blocks["web"].fetched == [(5,)]
    assert data.targets["web"].fetched == [[5]]
    assert [3, 4] in data.targets["code"].fetched


def test_plans_that_come_one_by_one_are_not_run_through_for_fetching() -> None:
    data = far_data()
    assert len(list(prefetch(iter(one_a_step(20)), data))) == 20
    assert data.blocks["web"].fetched == []
    assert len(list(prefetch(one_a_step(20), data, fetch_ahead=0))) == 20
    assert data.blocks["web"].fetched == []


def test_where_there_is_no_room_it_is_asked_again_when_more_was_read() -> None:
    data = far_data()
    far = data.blocks["web"]
    far.room = False
    batches = prefetch(one_a_step(60), data, ahead=1, fetch_ahead=20)
    for _ in range(5):
        next(batches)
    time.sleep(0.1)
    refused = far.refused
    time.sleep(0.1)
    assert refused == far.refused < 8 * 8, "not again and again"
    assert far.fetched == []
    far.room = True
    next(batches)
    for number, _ in enumerate(batches, 6):
        wait_until_fetched(far, min(number + 20, 59))
    assert number == 59
    assert {index for (index,) in far.fetched} >= set(range(20, 60))


def test_what_the_reading_has_passed_is_not_fetched_any_more() -> None:
    far = {f"d{number}": FarBlocks(number, 50) for number in range(12)}
    data = TrainData(blocks=far, targets=None)
    for blocks in far.values():
        blocks.released.clear()
    batches = prefetch([[Draw(domain=name, index=step) for name in far] for step in range(30)], data)
    next(batches)
    wait_for(lambda: sum(blocks.entered.is_set() for blocks in far.values()) == 8)
    for _ in range(20):  # eight fetches are in flight, and those that were to follow have not begun
        next(batches)
    for blocks in far.values():
        blocks.released.set()
    assert len(list(batches)) == 9
    assert sum(step <= 20 for blocks in far.values() for (step,) in blocks.fetched) == 8


def test_what_fails_while_fetching_is_left_to_the_read() -> None:
    data = far_data()
    data.blocks["web"].broken = True
    assert len(list(prefetch(one_a_step(30), data))) == 30
    assert fetching_threads() == []


def test_closing_in_the_middle_of_a_fetch_does_not_hang() -> None:
    data = far_data()
    far = data.blocks["web"]
    far.released.clear()
    batches = prefetch(one_a_step(60), data)
    next(batches)
    assert far.entered.wait(5)
    batches.close()
    assert fetching_threads() != [], "the fetch that hangs was not waited for"
    far.released.set()
    wait_for(lambda: fetching_threads() == [])
    assert len(far.fetched) <= 8, "only what was in flight"


def test_closing_while_there_is_no_room_ends_the_threads() -> None:
    data = far_data()
    data.blocks["web"].room = False
    batches = prefetch(one_a_step(60), data)
    next(batches)
    time.sleep(0.2)
    assert len(fetching_threads()) == 8
    batches.close()
    assert fetching_threads() == reading_threads() == []


# Windows


class ShardedBlocks(Blocks):
    shard_blocks = 1024
    block_bytes = 8_000


class ShardedTargets(Targets):
    shard_blocks = 64
    block_bytes = 92_000


def sharded_data(domains: int, targets: bool = True) -> TrainData:
    names = [f"d{number}" for number in range(domains)]
    return TrainData(
        blocks={name: ShardedBlocks(number, 50) for number, name in enumerate(names)},
        targets={name: ShardedTargets(number, 50) for number, name in enumerate(names)} if targets else None,
    )


def test_windows_share_the_bytes_that_are_shuffled_together() -> None:
    # A shard of targets, and the token blocks that go with it: 64 · 100,000 bytes = 6.1 MiB.
    assert sharded_data(1).windows(100) == {"d0": Window(64, 16)}
    assert sharded_data(4).windows(100) == {f"d{number}": Window(64, 4) for number in range(4)}
    assert sharded_data(4).windows(1) == {f"d{number}": Window(64, 1) for number in range(4)}, "one shard at least"
    assert sharded_data(2, targets=False).windows(100) == {f"d{number}": Window(1024, 6) for number in range(2)}


def test_lists_in_memory_have_no_windows() -> None:
    assert train_data().windows(100) == {}


def test_a_document_begins_behind_each_of_several_separators() -> None:
    """EOS, and BOS where there is one."""
    tokens = np.array([[1, 5, 6, 0, 1, 7], [1, 8, 0, 1, 9, 9]], dtype=np.int32)
    marked = np.array([[1, 1, 1, 0, 1], [1, 1, 0, 1, 1]], dtype=np.bool_)
    batch = Batch(tokens_BL1=tokens, targets=None, valid_BL=marked)
    found = batch.valid((0, 1))
    assert found is not None
    assert found.astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 1]]
    assert batch.valid(None) is marked
