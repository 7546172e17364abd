"""Which blocks of a domain to train on: scores for every block, and the blocks that are kept of them.

    difference   mean token loss of a reference − the teacher's (MiniPLM, arXiv 2410.17215): large where the teacher
                 knows what the reference does not; small where both find a block easy, or both find it noise
    trajectory   blocks whose losses fall alike over a finished run are clustered, and drawn from the smallest clusters
                 upwards, each as evenly as may be (S2L, arXiv 2403.07384)

Everything here ranks inside one domain. How much of a domain is drawn is the mixture's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ddk.data import loss_mask
from ddk.values import BlockReader, BoolArray

Float64Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@torch.no_grad()
def block_losses(student: Any, blocks: BlockReader, indices: Indices, device: torch.device) -> Float64Array:
    """Mean cross-entropy of each block in nats per token that carries loss, [n]; 0 for a block that has none.

    Args:
        student: a `ddk.student.StudentLoss` in evaluation mode.
        blocks: [N, L + 1].
        indices: which of them, [n].
    """
    tokens = torch.from_numpy(blocks.read(indices).astype(np.int64)).to(device)
    valid_BL = loss_mask(blocks, indices)
    found = np.zeros(len(indices))
    for row in range(len(indices)):
        valid = None if valid_BL is None else torch.from_numpy(valid_BL[row : row + 1]).to(device)
        positions = tokens.shape[1] - 1 if valid is None else int(valid.sum())
        if positions:
            _, ce, _ = student(tokens[row : row + 1, :-1], tokens[row : row + 1, 1:], valid)
            found[row] = float(ce) / positions
    return found


def mean_over_positions(true_logprobs_BL: npt.NDArray[np.float32], valid_BL: BoolArray | None) -> Float64Array:
    """Mean −log-probability of each block's true tokens, [B]; 0 for a block without a position that carries loss."""
    losses = -true_logprobs_BL.astype(np.float64)
    if valid_BL is None:
        return np.asarray(losses.mean(axis=1))
    counts = valid_BL.sum(axis=1)
    return np.asarray(np.where(valid_BL, losses, 0.0).sum(axis=1) / np.maximum(counts, 1))


def kept_count(blocks: int, keep: float) -> int:
    """Blocks that a share of them is: rounded up, and at least one."""
    return max(1, min(blocks, math.ceil(keep * blocks - 1e-9)))


def keep_highest(scores: Float64Array, keep: float) -> Indices:
    """The blocks with the highest scores, in the corpus' order; of equal ones the earlier.

    Args:
        scores: [N], finite.
        keep: share of the blocks.

    Returns:
        [M], ascending.
    """
    order = np.argsort(-scores, kind="stable")
    return np.sort(order[: kept_count(len(scores), keep)])


def balanced_draw(clusters: Indices, keep: float, seed: int) -> Indices:
    """Blocks from the clusters, from the smallest upwards, each as evenly as its size allows.

    A cluster gives its equal share of what is left, or all that it has; what it lacks goes to the larger ones. Clusters
    of one or two blocks, which are outliers more often than kinds, come last.

    Args:
        clusters: number of each block's cluster, [N].
        keep: share of the blocks.
        seed: of the draw inside a cluster.

    Returns:
        [M], ascending.
    """
    wanted = kept_count(len(clusters), keep)
    members = [np.flatnonzero(clusters == number) for number in np.unique(clusters)]
    members.sort(key=lambda one: (len(one) <= 2, len(one), int(one[0])))
    generator = np.random.default_rng(seed)
    kept: list[Indices] = []
    for place, one in enumerate(members):
        left = wanted - sum(map(len, kept))
        share = min(len(one), math.ceil(left / (len(members) - place)))
        kept.append(generator.permutation(one)[:share])
    chosen = np.concatenate(kept)
    if len(chosen) < wanted:  # small clusters at the end could not give what was left for them
        rest = np.setdiff1d(np.arange(len(clusters)), chosen)
        chosen = np.concatenate([chosen, generator.permutation(rest)[: wanted - len(chosen)]])
    return np.sort(chosen)


class Selected:
    """The kept blocks of a store's train split, of tokens or of targets: block n is block `indices[n]` of the whole.

    Args:
        reader: a store's view, or what `ddk.known_targets` makes of it.
        indices: ascending, [M].
    """

    def __init__(self, reader: Any, indices: Indices) -> None:
        self._reader = reader
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def k(self) -> int:
        """Of targets."""
        return int(self._reader.k)

    @property
    def vocab_size(self) -> int:
        return int(self._reader.vocab_size)

    @property
    def shard_blocks(self) -> int:
        """Kept blocks of a shard, on average: the window of the shuffle is counted in them."""
        return max(1, round(int(self._reader.shard_blocks) * len(self._indices) / len(self._reader)))

    @property
    def block_bytes(self) -> int:
        return int(self._reader.block_bytes)

    def read(self, indices: Sequence[int] | Indices) -> Any:
        return self._reader.read(self._of(indices))

    def loss_mask(self, indices: Sequence[int] | Indices) -> BoolArray | None:
        """See `ddk.data.MarkedBlocks`."""
        return loss_mask(self._reader, self._of(indices))

    def fetch(self, indices: Sequence[int] | Indices) -> bool:
        """See `ddk.ahead.FetchesAhead`."""
        return bool(self._reader.fetch(self._of(indices)))

    def _of(self, indices: Sequence[int] | Indices) -> Indices:
        return self._indices[np.asarray(indices, dtype=np.int64)]
