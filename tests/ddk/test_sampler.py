from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddk.mixture import equal_mixture
from ddk.sampler import SamplerState, Window, _systematic_counts, draw, initial_state
from ddk.values import Draw, Mixture


@st.composite
def worlds(draw_):
    """(history of mixtures, sizes, seed, batch size, interval)"""
    domains = draw_(st.lists(st.text(max_size=3), min_size=1, max_size=4, unique=True))
    sizes = {domain: draw_(st.integers(1, 12)) for domain in domains}
    history = [mixture_of(draw_(st.lists(st.integers(0, 9), min_size=len(domains), max_size=len(domains))), domains)]
    history.append(mixture_of(list(range(1, len(domains) + 1)), domains))
    return history, sizes, draw_(st.integers(0, 2**31 - 1)), draw_(st.integers(1, 9)), draw_(st.integers(1, 5))


def mixture_of(weights: list[int], domains: list[str]) -> Mixture:
    weights = weights if any(weights) else [1] * len(domains)
    return Mixture(probabilities={d: w / sum(weights) for d, w in zip(domains, weights, strict=True)})


def fold(mixtures, sizes, seed, batch_size, state=None) -> tuple[list[tuple[Draw, ...]], SamplerState]:
    state = state or initial_state(sizes)
    batches = []
    for mixture in mixtures:
        batch, state = draw(mixture, sizes, seed, state, batch_size)
        batches.append(batch)
    return batches, state


def in_order_of_n(batches, domain: str) -> list[list[int]]:
    """Per batch, the domain's indices; their order inside the batch is shuffled."""
    return [[one.index for one in batch if one.domain == domain] for batch in batches]


@given(world=worlds())
@settings(deadline=None, max_examples=40)
def test_from_a_kept_state_at_any_step_the_draws_go_on_as_from_the_start(world) -> None:
    history, sizes, seed, batch_size, interval = world
    steps = 2 * interval
    mixtures = [history[step // interval] for step in range(steps)]
    folded, state = fold(mixtures, sizes, seed, batch_size)
    assert state.step == steps
    assert sum(state.drawn.values()) == steps * batch_size
    for step in range(steps):
        before, kept = fold(mixtures[:step], sizes, seed, batch_size)
        after, _ = fold(mixtures[step:], sizes, seed, batch_size, kept)
        assert before + after == folded


@given(world=worlds(), cut=st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_same_inputs_same_outputs_and_nothing_is_changed(world, cut) -> None:
    history, sizes, seed, batch_size, _ = world
    start = initial_state(sizes)
    whole, end = fold(history[:1] * 8, sizes, seed, batch_size)
    assert fold(history[:1] * 8, sizes, seed, batch_size) == (whole, end)
    assert start == initial_state(sizes)
    _, middle = fold(history[:1] * cut, sizes, seed, batch_size)
    # The state is small and plain: what comes back from JSON resumes as well.
    resumed = SamplerState(step=int(middle.step), drawn=dict(middle.drawn))
    assert fold(history[:1] * (8 - cut), sizes, seed, batch_size, resumed) == (whole[cut:], end)


@given(world=worlds())
@settings(deadline=None, max_examples=40)
def test_each_epoch_of_a_domain_holds_every_block_once(world) -> None:
    history, sizes, seed, _, _ = world
    # One block a step: the order of the draws inside a domain is then known.
    batches, state = fold(history[:1] * 60, sizes, seed, 1)
    for domain, size in sizes.items():
        indices = [index for batch in in_order_of_n(batches, domain) for index in batch]
        assert len(indices) == state.drawn[domain]
        for start in range(0, len(indices), size):
            epoch = indices[start : start + size]
            assert len(set(epoch)) == len(epoch)
            if len(epoch) == size:
                assert set(epoch) == set(range(size))


@given(world=worlds())
@settings(deadline=None, max_examples=40)
def test_blocks_are_used_equally_often_at_any_batch_size(world) -> None:
    history, sizes, seed, batch_size, _ = world
    mixtures = [history[step // 10] for step in range(20)]
    batches, _ = fold(mixtures, sizes, seed, batch_size)
    for domain, size in sizes.items():
        counts = Counter(index for batch in in_order_of_n(batches, domain) for index in batch)
        assert set(counts) <= set(range(size))
        assert max(counts.values(), default=0) - min((counts[i] for i in range(size)), default=0) <= 1


def test_cycling_reshuffles() -> None:
    batches, _ = fold([equal_mixture(["a"])] * 5, {"a": 50}, 3, 50)
    batches_in_order, _ = fold([equal_mixture(["a"])] * 250, {"a": 50}, 3, 1)
    epochs = [tuple(b[0].index for b in batches_in_order[e * 50 : e * 50 + 50]) for e in range(5)]
    assert len(set(epochs)) == 5
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert all(sorted(one.index for one in batch) == list(range(50)) for batch in batches)


def test_domains_of_one_size_are_shuffled_differently() -> None:
    # Two blocks a step, one of each domain: the order inside a domain is known.
    batches, _ = fold([equal_mixture(["a", "b"])] * 40, {"a": 40, "b": 40}, 0, 2)
    a, b = ([i for batch in in_order_of_n(batches, domain) for i in batch] for domain in "ab")
    assert a != b
    assert sorted(a) == sorted(b) == list(range(40))


@given(world=worlds())
@settings(deadline=None, max_examples=40)
def test_counts_are_floor_or_ceiling(world) -> None:
    history, sizes, seed, batch_size, _ = world
    batches, _ = fold(history[:1] * 10, sizes, seed, batch_size)
    for batch in batches:
        assert len(batch) == batch_size
        counts = Counter(one.domain for one in batch)
        for domain, r in history[0].probabilities.items():
            assert abs(counts[domain] - batch_size * r) < 1 + 1e-9
            if r == 0.0:
                assert counts[domain] == 0


@settings(deadline=None)
@given(
    weights=st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=1, max_size=12).filter(any),
    u=st.one_of(st.floats(0.0, 1.0, exclude_max=True), st.just(math.nextafter(1.0, 0.0)), st.just(0.0)),
    batch_size=st.integers(1, 4096),
)
@example(weights=[1.0] * 10 + [0.0], u=math.nextafter(1.0, 0.0), batch_size=1)  # ten tenths sum to 1 − 1e-16
@example(weights=[1.0], u=math.nextafter(1.0, 0.0), batch_size=4)  # (3 + u)/4 rounds to 1
def test_systematic_counts_at_the_edges_of_rounding(weights, u, batch_size) -> None:
    probabilities = np.array(weights) / math.fsum(weights)
    counts = _systematic_counts(probabilities, u, batch_size)
    assert len(counts) == len(weights)
    assert counts.sum() == batch_size
    assert (np.abs(counts - batch_size * probabilities) < 1 + 1e-6).all()
    assert (counts[probabilities == 0.0] == 0).all()


def test_the_example_of_systematic_counts() -> None:
    assert _systematic_counts(np.array([0.5, 0.3, 0.2]), 0.5, 4).tolist() == [2, 1, 1]


def test_the_long_run_frequency_is_the_mixture() -> None:
    mixture = Mixture(probabilities={"a": 0.613, "b": 0.2, "c": 0.187})
    _, state = fold([mixture] * 4000, {"a": 7, "b": 100, "c": 1000}, 5, 5)
    for domain, r in mixture.probabilities.items():
        # A step's count scatters by at most ½, so 4,000 of them by ½·√4000 ≈ 32 blocks of 20,000; four of those.
        assert state.drawn[domain] / 20_000 == pytest.approx(r, abs=4 * 32 / 20_000)


def test_the_order_of_the_mappings_is_irrelevant() -> None:
    mixture, backwards = {"x": 0.2, "a": 0.5, "m": 0.3}, {"m": 0.3, "a": 0.5, "x": 0.2}
    one, _ = fold([Mixture(probabilities=mixture)] * 9, {"x": 5, "a": 6, "m": 7}, 1, 6)
    other, _ = fold([Mixture(probabilities=backwards)] * 9, {"a": 6, "m": 7, "x": 5}, 1, 6)
    assert one == other


def test_seeds_and_steps_differ() -> None:
    mixture, sizes = equal_mixture(["a", "b"]), {"a": 1000, "b": 1000}
    runs = {seed: tuple(fold([mixture] * 3, sizes, seed, 8)[0]) for seed in range(20)}
    assert len(set(runs.values())) == 20
    assert all(len(set(run)) == 3 for run in runs.values())


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_share_the_global_batch(world_size: int) -> None:
    batches, _ = fold([Mixture(probabilities={"a": 0.7, "b": 0.3})] * 6, {"a": 30, "b": 9}, 2, 8)
    for batch in batches:
        shares = [batch[rank::world_size] for rank in range(world_size)]
        assert {len(share) for share in shares} == {8 // world_size}
        assert Counter(one for share in shares for one in share) == Counter(batch)


def test_a_share_is_no_single_domains() -> None:
    # Unshuffled, 'a' would come first in every batch, and rank 0 of 2 would see a fixed number of it.
    batches, _ = fold([equal_mixture(["a", "b"])] * 40, {"a": 30, "b": 30}, 2, 4)
    assert len({tuple(one.domain for one in batch) for batch in batches}) == 6  # all arrangements of two a and two b


def test_the_mixture_changes_at_the_interval() -> None:
    history = [Mixture(probabilities={"a": 1.0, "b": 0.0}), Mixture(probabilities={"a": 0.0, "b": 1.0})]
    steps, _ = fold([history[step // 3] for step in range(6)], {"a": 4, "b": 4}, 0, 2)
    assert [{one.domain for one in batch} for batch in steps] == [{"a"}] * 3 + [{"b"}] * 3


def test_a_later_mixture_does_not_touch_earlier_draws() -> None:
    sizes = {"a": 9, "b": 9}
    first, changed = equal_mixture(["a", "b"]), Mixture(probabilities={"a": 0.9, "b": 0.1})
    assert fold([first] * 3, sizes, 0, 4)[0] == fold([first] * 3 + [changed] * 3, sizes, 0, 4)[0][:3]


def test_pinned_draws() -> None:
    """A change here means that numpy's streams have changed: resumed runs would not draw what they would have."""
    mixture = Mixture(probabilities={"code": 0.5, "math": 0.3, "web": 0.2})
    batches, state = fold([mixture] * 3, {"code": 3, "math": 100, "web": 1_000_000}, 42, 4)
    assert [[(one.domain, one.index) for one in batch] for batch in batches] == PINNED
    assert state == SamplerState(step=3, drawn={"code": 6, "math": 3, "web": 3})


PINNED = [
    [("code", 0), ("code", 2), ("web", 782_291), ("math", 73)],
    [("web", 841_656), ("math", 79), ("code", 2), ("code", 1)],
    [("math", 90), ("code", 1), ("code", 0), ("web", 870_248)],
]


# Windows


def order_of(size: int, window: Window | None, seed: int = 0, epochs: int = 1, domain: str = "web") -> list[list[int]]:
    """The order of each epoch of one domain, drawn one block a step."""
    state, mixture, found = initial_state({domain: size}), equal_mixture([domain]), []
    for _ in range(epochs * size):
        batch, state = draw(mixture, {domain: size}, seed, state, 1, None if window is None else {domain: window})
        found.append(batch[0].index)
    return [found[start : start + size] for start in range(0, len(found), size)]


windows_strategy = st.builds(Window, shard_blocks=st.integers(1, 9), shards=st.integers(1, 5))


@given(size=st.integers(1, 60), window=windows_strategy, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_an_epoch_goes_through_whole_shards_a_window_at_a_time(size: int, window: Window, seed: int) -> None:
    first, second = order_of(size, window, seed, epochs=2)
    assert sorted(first) == sorted(second) == list(range(size))
    for order in (first, second):
        seen: list[int] = []
        while len(seen) < size:
            # What begins here is a window: some shards, all of their blocks, and none of the others'.
            shards: set[int] = set()
            part: list[int] = []
            while order[len(seen) + len(part) :] and (
                len(shards) < window.shards or not _whole(part, shards, window, size)
            ):
                part.append(order[len(seen) + len(part)])
                shards.add(part[-1] // window.shard_blocks)
            assert len(shards) <= window.shards
            assert len(shards) == window.shards or len(seen) + len(part) == size, "only the last one is smaller"
            assert _whole(part, shards, window, size)
            seen += part


def _whole(part: list[int], shards: set[int], window: Window, size: int) -> bool:
    return sorted(part) == [block for block in range(size) if block // window.shard_blocks in shards]


@given(size=st.integers(1, 40), shard_blocks=st.integers(1, 50), more=st.integers(0, 3), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_a_window_that_holds_the_domain_changes_nothing(size: int, shard_blocks: int, more: int, seed: int) -> None:
    window = Window(shard_blocks, -(-size // shard_blocks) + more)
    assert order_of(size, window, seed, epochs=2) == order_of(size, None, seed, epochs=2)


def test_without_windows_the_order_is_that_of_earlier_versions() -> None:
    """Runs that were begun by them go on with the same draws."""
    expected = {
        ("web", 42, 0): [3, 7, 4, 5, 10, 6, 2, 1, 9, 0, 8, 11],
        ("web", 42, 3): [10, 11, 0, 8, 4, 5, 1, 2, 9, 7, 3, 6],
        ("größe", 0, 0): [5, 7, 2, 9, 0, 1, 8, 10, 6, 4, 3, 11],
    }
    for (domain, seed, epoch), order in expected.items():
        for window in (None, Window(4, 3), Window(5, 9)):
            assert order_of(12, window, seed, epoch + 1, domain)[epoch] == order


def test_pinned_windows() -> None:
    assert order_of(12, Window(2, 3), 42) == [PINNED_WINDOWS[0]]
    assert order_of(11, Window(4, 1), 42, epochs=2)[1] == PINNED_WINDOWS[1]


PINNED_WINDOWS = [[8, 9, 4, 3, 2, 5, 11, 1, 6, 7, 0, 10], [10, 9, 8, 0, 2, 1, 3, 6, 7, 4, 5]]


def test_every_order_of_a_window_is_as_likely() -> None:
    """Six blocks in shards of two, of which two are a window: six pairs of shards, and four blocks in 24 orders."""
    epochs = [tuple(order) for order in order_of(6, Window(2, 2), 5, epochs=6000)]
    lasts = Counter(frozenset(order[4:]) for order in epochs)
    assert set(lasts) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})}
    assert all(abs(count - 2000) < 150 for count in lasts.values())  # four standard deviations of √(6000 · 2/9)
    for last in lasts:
        orders = Counter(order[:4] for order in epochs if frozenset(order[4:]) == last)
        assert len(orders) == 24
        expected = lasts[last] / 24
        assert sum((count - expected) ** 2 / expected for count in orders.values()) < 56  # χ², 23 degrees, p = 1e-4
    assert abs(sum(order[4] < order[5] for order in epochs) - 3000) < 160


@given(world=worlds(), window=windows_strategy)
@settings(deadline=None, max_examples=20)
def test_windows_are_a_pure_function_too(world, window: Window) -> None:
    history, sizes, seed, batch_size, interval = world
    windows = dict.fromkeys(list(sizes)[:2], window)
    mixtures = [history[step // interval] for step in range(2 * interval)]

    def drawn(*, disturbed: bool) -> list[tuple[Draw, ...]]:
        state, batches = initial_state(sizes), []
        for mixture in mixtures:
            if disturbed:
                draw(history[0], sizes, seed, state, batch_size)  # what is cached of other orders is not in the way
            batch, state = draw(mixture, sizes, seed, state, batch_size, windows)
            batches.append(batch)
        return batches

    assert drawn(disturbed=True) == drawn(disturbed=False)


def test_a_domain_without_a_window_is_shuffled_whole() -> None:
    sizes, mixture = {"a": 40, "b": 40}, equal_mixture(["a", "b"])
    plain, windowed = [], []
    for windows, found in ((None, plain), ({"a": Window(4, 2)}, windowed)):
        state = initial_state(sizes)
        for _ in range(40):
            batch, state = draw(mixture, sizes, 1, state, 2, windows)
            found.append({one.domain: one.index for one in batch})
    assert [batch["b"] for batch in plain] == [batch["b"] for batch in windowed]
    assert [batch["a"] for batch in plain] != [batch["a"] for batch in windowed]


@pytest.mark.parametrize(("shard_blocks", "shards"), [(0, 1), (1, 0), (-4, 3)])
def test_an_empty_window_is_refused(shard_blocks: int, shards: int) -> None:
    with pytest.raises(ValueError, match="a window needs at least one shard of at least one block"):
        Window(shard_blocks, shards)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="domain 'b' has 0 blocks; sampling needs at least one"):
        initial_state({"a": 3, "b": 0})
    with pytest.raises(ValueError, match=r"the mixture has domains \['a'\], the data \['a', 'b'\]"):
        draw(equal_mixture(["a"]), {"a": 3, "b": 3}, 0, initial_state({"a": 3, "b": 3}), 2)
