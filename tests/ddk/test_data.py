from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk.data import Batch, TrainData, prefetch
from ddk.types import Draw, SparseTargets

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


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_early_stops_the_thread(taken: int) -> None:
    data = train_data()
    batches = prefetch(plans(1000), data)
    for _ in range(taken):
        next(batches)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 5
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
