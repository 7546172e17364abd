"""Which blocks a training step reads: a pure function of (mixture history, seed, step).

What happens at a step:

1. The mixture decides how many of the batch's blocks each domain gives, by systematic sampling: one uniform number
   u, and point (i + u)/B of the cumulated mixture for each i. A domain with probability r gives ⌊B·r⌋ or ⌈B·r⌉
   blocks, B·r on average: unbiased, with the smallest possible scatter from step to step.
2. The n-th block that a domain gives in a run is entry n mod N of that domain's permutation number ⌊n/N⌋: without
   replacement until the domain is exhausted, then reshuffled and cycled. Where a `Window` is given, a permutation goes
   through the domain's shards in random order, some of them at a time, so that each is needed for a while and then not
   again before the next epoch: a store of any size is read shard by shard.
3. The batch is shuffled, so that a rank's share `batch[rank::world_size]` is no single domain's.

No random state is carried: every number comes from a generator keyed by (seed, step) or (seed, domain, epoch). A
resumed run therefore draws exactly what an uninterrupted one would, on any number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ddk.values import Draw, Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerState:
    """Where a run's sampling stands: what steps 0 to `step` − 1 have drawn."""

    step: int
    drawn: Mapping[str, int]
    """Blocks drawn so far, by domain."""


@dataclass(frozen=True, slots=True)
class Window:
    """The number of blocks that are shuffled together.

    An epoch's order is: the domain's shards in random order, cut into windows of `shards` of them, the blocks of a
    window shuffled together. A window that holds the whole domain makes no difference: any order is as likely.

    Raises:
        ValueError: one of them is below 1.
    """

    shard_blocks: int
    """Blocks of a shard; the domain's last may have fewer."""
    shards: int
    """Of a window; the last window of an epoch may have fewer."""

    def __post_init__(self) -> None:
        if self.shard_blocks < 1 or self.shards < 1:
            raise ValueError(f"a window needs at least one shard of at least one block; this is {self}")


def initial_state(sizes: Mapping[str, int]) -> SamplerState:
    """Nothing drawn yet.

    Args:
        sizes: number of train blocks by domain; each at least 1.
    """
    for domain, size in sizes.items():
        if size < 1:
            raise ValueError(f"domain '{domain}' has {size} blocks; sampling needs at least one")
    return SamplerState(step=0, drawn=dict.fromkeys(sizes, 0))


def draw(
    mixture: Mixture,
    sizes: Mapping[str, int],
    seed: int,
    state: SamplerState,
    batch_size: int,
    windows: Mapping[str, Window] | None = None,
) -> tuple[tuple[Draw, ...], SamplerState]:
    """The batch of step `state.step`, and the state after it.

    Args:
        mixture: the one in force at this step.
        sizes: number of train blocks by domain.
        seed: of the run, non-negative.
        batch_size: blocks a step, over all ranks.
        windows: by domain; one without is shuffled as a whole. The same throughout a run.
    """
    # Sorted, so that the order in which a configuration names its domains does not matter.
    domains = sorted(mixture.domains)
    if domains != sorted(sizes):
        raise ValueError(f"the mixture has domains {domains}, the data {sorted(sizes)}")
    random = np.random.Generator(np.random.Philox(key=np.array([seed, state.step], dtype=np.uint64)))
    counts = _systematic_counts(
        np.array([mixture.probabilities[domain] for domain in domains]), float(random.random()), batch_size
    )
    drawn = dict(state.drawn)
    batch: list[Draw] = []
    for domain, count in zip(domains, counts, strict=True):
        window = windows.get(domain) if windows else None
        batch += [
            Draw(domain=domain, index=_nth_block(seed, domain, sizes[domain], drawn[domain] + i, window))
            for i in range(count)
        ]
        drawn[domain] += int(count)
    order = random.permutation(len(batch))
    return tuple(batch[i] for i in order), SamplerState(step=state.step + 1, drawn=drawn)


def _systematic_counts(probabilities: npt.NDArray[np.float64], u: float, batch_size: int) -> npt.NDArray[np.int64]:
    """How many of the points (i + u)/B, i < B, fall into each domain's stretch of the cumulated probabilities.

    Example: probabilities [0.5, 0.3, 0.2], u = 0.5, B = 4: points .125, .375, .625, .875 → [2, 1, 1].
    """
    edges = np.cumsum(probabilities)
    # Rounding may leave the last edge beside 1, or lift the last point to 1: a point would then fall behind the last
    # domain, or into one of probability 0 at the end.
    edges /= edges[-1]
    points = np.minimum((np.arange(batch_size) + u) / batch_size, np.nextafter(1.0, 0.0))
    return np.bincount(np.searchsorted(edges, points, side="right"), minlength=len(probabilities)).astype(np.int64)


def _nth_block(seed: int, domain: str, size: int, n: int, window: Window | None) -> int:
    if window is not None and window.shards * window.shard_blocks >= size:
        window = None
    return int(_permutation(seed, domain, n // size, size, window)[n % size])


# Room for every leaf of a thousand. An epoch's entry is as long as the blocks that it was drawn for: of a long run with
# few domains, all of them together take 8 bytes a block drawn.
@lru_cache(maxsize=4096)
def _permutation(seed: int, domain: str, epoch: int, size: int, window: Window | None) -> npt.NDArray[np.int64]:
    name = int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest(), "little")
    random = np.random.default_rng([seed, name, epoch])
    return random.permutation(size) if window is None else _by_windows(random, size, window)


def _by_windows(random: np.random.Generator, size: int, window: Window) -> npt.NDArray[np.int64]:
    """Example: 5 blocks, shards of 2, windows of 2. The shards come as [2, 0, 1], whose blocks are 4 | 0 1 | 2 3;
    the first window shuffles [4, 0, 1], the second [2, 3].
    """
    shards = random.permutation(-(-size // window.shard_blocks))
    order: npt.NDArray[np.int64] = (shards[:, None] * window.shard_blocks + np.arange(window.shard_blocks)).ravel()
    order = order[order < size]
    # Only the domain's last shard is shorter: what follows its window begins so much earlier.
    missing = len(shards) * window.shard_blocks - size
    last = int(np.flatnonzero(shards == len(shards) - 1)[0])
    for first in range(0, len(shards), window.shards):
        start, end = (at * window.shard_blocks - (missing if at > last else 0) for at in (first, first + window.shards))
        random.shuffle(order[start:end])
    return order
