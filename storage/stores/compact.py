"""The compact codec: a position in about a byte and a half for each token that it keeps.

Of a position, with stored tokens of probabilities p_i and `m` = Σ p_i of those kept:

* Codes c_i = round(levels · √(p_i / m)), whole numbers. A grid that is uniform in √p makes the divergence that
  rounding causes the same for every token, likely or not, which is the least for a given number of bits. Tokens with
  code 0, and those beyond `keep_mass`, are dropped; their probability goes to the tail.
* The tail's mass r as round(1023 · (2/π) · asin √r).
* Decoded: r = sin²(code · π/2 / 1023) and p_i = (1 − r) · c_i² / Σ c_j², so that all adds up to 1.

Tokens lie in ascending order of id, each as the difference to the one before, less 1. They follow one another without
gaps from position to position; `scalars` says how many belong to each. What is left of a block's part is 0.

    scalars          uint16 [3 + …, L]   rows: kept tokens; tail; true token's −log p in 1/512 nat (65533: 128 nat or
                                         more, 65534: unknown); entropy in 1/128 nat; tail at each further
                                         temperature, as the tail; distinct drawn tokens
    id_deltas        uint32 [L · K]
    codes            uint8  [L · K]      (uint16 where `levels` is above 254)
    drawn_id_deltas  uint32 [L · D]      random draws, likewise, but 2 · difference, plus 1 where drawn more than once
    drawn_counts     uint16 [L · D]      of those alone: how often, less 2

Example: kept ids 5, 9, 10 with codes 3, 200, 17 → id_deltas 5, 3, 0 and codes 3, 200, 17. Draws 4, 7, 7, 7 →
drawn_id_deltas 8, 5 and drawn_counts 1.

Shape letters: B blocks, L positions, K stored tokens, D draws, P = B · L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk.values import SampledTokens, SparseTargets

TAIL_LEVELS = 1023
TRUE_PER_NAT = 512
TRUE_LEAST, TRUE_UNKNOWN = 65533, 65534
ENTROPY_PER_NAT = 128
MOST_KEPT = 65534
"""Tokens a position, so that their number fits beside the value that means 'never written'."""

Arrays = dict[str, np.ndarray[Any, Any]]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    levels: int
    keep_mass: float
    vocab_size: int

    @property
    def code_dtype(self) -> type[np.unsignedinteger[Any]]:
        return np.uint8 if self.levels <= 254 else np.uint16

    @property
    def code_bits(self) -> int:
        return 8 * np.dtype(self.code_dtype).itemsize

    @property
    def key_dtype(self) -> type[np.unsignedinteger[Any]]:
        """That holds an id and a code."""
        return np.uint32 if self.vocab_size << self.code_bits <= 2**32 else np.uint64


def encode(targets: SparseTargets, grid: Grid, sample_every: int) -> tuple[Arrays, npt.NDArray[np.float64]]:
    """The arrays of some blocks, one row per block, and KL(captured ‖ stored) for every n-th position of a block.

    A block at a time, so that it stays in the core's cache.
    """
    parts = [_encode_block(targets, b, grid, slice(0, None, sample_every)) for b in range(len(targets))]
    arrays = {name: np.stack([part[name] for part, _ in parts]) for name in parts[0][0]}
    return arrays, np.concatenate([lost for _, lost in parts])


def _encode_block(targets: SparseTargets, b: int, grid: Grid, sample: slice) -> tuple[Arrays, Array]:
    logprobs_LK = targets.logprobs_BLK[b]
    p_LK = np.exp(logprobs_LK)
    codes_LK = _codes(p_LK, grid)
    kept_LK = codes_LK > 0
    kept_L = kept_LK.sum(-1)
    mass_L = (p_LK * kept_LK).sum(-1, dtype=np.float64)
    tail_L = targets.tail_mass_BL[b] + (p_LK.sum(-1, dtype=np.float64) - mass_L)
    tail_code_L = _tail_code(tail_L / np.maximum(tail_L + mass_L, 1e-30), kept_L)
    rows = [kept_L, tail_code_L, _true_code(targets, b)]
    if targets.entropy_BL is not None:
        rows.append(np.rint(targets.entropy_BL[b] * ENTROPY_PER_NAT))
    for temperature, tail_at_BL in targets.tail_mass_at.items():
        rows.append(_tail_code(_tail_after_drop(logprobs_LK, kept_LK, tail_at_BL[b], temperature), kept_L))
    deltas, codes = _by_id(targets.ids_BLK[b], codes_LK, kept_LK, kept_L, grid)
    arrays: Arrays = {"id_deltas": deltas, "codes": codes}
    if targets.sampled is not None:
        counts_LD = targets.sampled.counts_BLN[b]
        distinct_LD, again_LD = counts_LD > 0, counts_LD > 1
        rows.append(distinct_LD.sum(-1))
        ids_LD = np.where(distinct_LD, targets.sampled.ids_BLN[b], -1)
        drawn_deltas_LD = 2 * (np.diff(ids_LD, axis=-1, prepend=-1) - 1) + again_LD
        arrays["drawn_id_deltas"] = _close_up(drawn_deltas_LD, distinct_LD, np.uint32)
        arrays["drawn_counts"] = _close_up(counts_LD - 2, again_LD, np.uint16)
    lost = _divergences(
        logprobs_LK[sample], targets.tail_mass_BL[b][sample], codes_LK[sample], _tail_mass(tail_code_L[sample]), grid
    )
    return {"scalars": np.stack(rows).astype(np.uint16), **arrays}, lost


def _divergences(logprobs_LK: Array, tail_L: Array, codes_LK: Array, stored_tail_L: Array, grid: Grid) -> Array:
    """KL(captured ‖ stored) over the captured tokens and one bucket for all others, from the codes themselves.

    A dropped token has its equal share of the stored tail. (`codec.divergences` says the same of two targets.)
    """
    p_LK = np.exp(logprobs_LK.astype(np.float64))
    squares_LK = codes_LK.astype(np.float64) ** 2
    share_L = np.maximum(stored_tail_L, 1e-30) / np.maximum(grid.vocab_size - (codes_LK > 0).sum(-1), 1)
    kept_LK = squares_LK / np.maximum(squares_LK.sum(-1), 1.0)[:, None] * (1.0 - stored_tail_L)[:, None]
    q_LK = np.where(codes_LK > 0, kept_LK, share_L[:, None])
    inside_L = np.where(p_LK > 0, p_LK * np.log(np.maximum(p_LK, 1e-300) / q_LK), 0.0).sum(-1)
    rest_L = np.maximum(share_L * (grid.vocab_size - logprobs_LK.shape[1]), 1e-30)
    tail_L = tail_L.astype(np.float64)
    outside_L = np.where(tail_L > 0, tail_L * np.log(np.maximum(tail_L, 1e-300) / rest_L), 0.0)
    return np.asarray(np.maximum(inside_L + outside_L, 0.0))


def _codes(p_LK: Array, grid: Grid) -> Array:
    """[L, K]; 0 where an entry is dropped. Entries come in descending order."""
    total_L1 = np.maximum(p_LK.sum(-1, keepdims=True), np.float32(1e-30))
    if grid.keep_mass < 1.0:
        share_LK = p_LK / total_L1
        p_LK = np.where(np.cumsum(share_LK, axis=-1) - share_LK < grid.keep_mass, p_LK, 0.0)
        total_L1 = np.maximum(p_LK.sum(-1, keepdims=True), np.float32(1e-30))
    codes_LK = np.rint(np.sqrt(p_LK / total_L1) * np.float32(grid.levels)).astype(np.int32)
    # However flat it is, the first token stays: a position without any would be a position without targets.
    codes_LK[:, 0] = np.where(p_LK[:, 0] > 0, np.maximum(codes_LK[:, 0], 1), 0)
    return np.asarray(np.minimum(codes_LK, grid.levels))


def _tail_code(mass_L: Array, kept_L: Array) -> Array:
    code_L = np.rint(np.arcsin(np.sqrt(np.clip(mass_L, 0.0, 1.0))) * (2 / np.pi * TAIL_LEVELS))
    # All of the mass would leave nothing to the kept tokens.
    return np.where(kept_L > 0, np.minimum(code_L, TAIL_LEVELS - 1), TAIL_LEVELS)


def _tail_after_drop(logprobs_LK: Array, kept_LK: Array, tail_L: Array, temperature: float) -> Array:
    """The tail's mass at a temperature, with that of the dropped tokens: softmax over the stored ones is known."""
    scaled_LK = np.exp((logprobs_LK - logprobs_LK[:, :1]).astype(np.float64) / temperature)
    stored_L = scaled_LK.sum(-1)
    return np.asarray(tail_L + (1.0 - tail_L) * (scaled_LK * ~kept_LK).sum(-1) / np.maximum(stored_L, 1e-30))


def _true_code(targets: SparseTargets, b: int) -> Array:
    surprise_L = -targets.true_logprobs_BL[b].astype(np.float64)
    code_L = np.minimum(np.rint(np.maximum(surprise_L, 0.0) * TRUE_PER_NAT), TRUE_LEAST)
    return np.where(np.isnan(surprise_L), TRUE_UNKNOWN, code_L)


def _by_id(ids_LK: Array, codes_LK: Array, kept_LK: Array, kept_L: Array, grid: Grid) -> tuple[Array, Array]:
    """Differences of ascending ids, and the codes in that order, without gaps: [L · K] each."""
    shift = grid.key_dtype(grid.code_bits)
    keys_LK = (ids_LK.astype(grid.key_dtype) << shift) | codes_LK.astype(grid.key_dtype)
    # Dropped ones behind all others: their key is larger than any.
    keys_LK = np.sort(np.where(kept_LK, keys_LK, np.iinfo(grid.key_dtype).max), axis=-1)
    first_LK = np.arange(ids_LK.shape[1]) < kept_L[:, None]
    sorted_ids_LK = (keys_LK >> shift).astype(np.int64)
    deltas_LK = np.diff(sorted_ids_LK, axis=-1, prepend=-1) - 1
    mask = grid.key_dtype((1 << grid.code_bits) - 1)
    return _close_up(deltas_LK, first_LK, np.uint32), _close_up(keys_LK & mask, first_LK, grid.code_dtype)


def _close_up(values_LK: Array, valid_LK: Array, dtype: Any) -> Array:
    """The valid values one after another, then zeros: [L · K]."""
    flat = np.zeros(values_LK.size, dtype=dtype)
    valid = values_LK[valid_LK]
    flat[: valid.size] = valid
    return flat


def decode(arrays: Arrays, grid: Grid, k: int, temperatures: Sequence[float], *, entropy: bool) -> SparseTargets:
    """The targets of blocks, in descending order of probability; equal codes in ascending order of id.

    Args:
        arrays: as in the module's docstring, with a first axis of blocks.

    Raises:
        ValueError: the arrays hold what no encoder writes.
    """
    scalars_BRL = arrays["scalars"]
    kept_BL = scalars_BRL[:, 0].astype(np.int64)
    if kept_BL.max(initial=0) > k or arrays["codes"].max(initial=0) > grid.levels:
        raise ValueError("it keeps more tokens than there are, or codes beyond the grid")
    if scalars_BRL[:, 1].max(initial=0) > TAIL_LEVELS:
        raise ValueError("it holds tails beyond the grid")
    tail_BL = _tail_mass(scalars_BRL[:, 1])
    ids_BLK, codes_BLK = _descending(arrays, kept_BL, k, grid)
    table = np.full(grid.levels + 1, -np.inf, dtype=np.float32)
    table[1:] = 2 * np.log(np.arange(1, grid.levels + 1))
    squares_BL = (codes_BLK.astype(np.float32) ** 2).sum(-1, dtype=np.float64)
    # log p = 2 log c − log Σ c² + log(1 − r); a position without tokens has only entries of −inf.
    with np.errstate(divide="ignore"):
        offset_BL = np.where(kept_BL > 0, np.log1p(-tail_BL) - np.log(np.maximum(squares_BL, 1.0)), 0.0)
    logprobs_BLK = table[codes_BLK]
    logprobs_BLK += offset_BL[..., None].astype(np.float32)
    row = 3
    entropy_BL = None
    if entropy:
        entropy_BL = (scalars_BRL[:, row] / np.float32(ENTROPY_PER_NAT)).astype(np.float32)
        row += 1
    tail_mass_at = {}
    for temperature in temperatures:
        tail_mass_at[temperature] = _tail_mass(scalars_BRL[:, row]).astype(np.float32)
        row += 1
    sampled = _drawn(arrays, scalars_BRL[:, row].astype(np.int64)) if "drawn_counts" in arrays else None
    return SparseTargets(
        ids_BLK=ids_BLK,
        logprobs_BLK=logprobs_BLK,
        tail_mass_BL=tail_BL.astype(np.float32),
        true_logprobs_BL=true_logprobs(scalars_BRL),
        entropy_BL=entropy_BL,
        sampled=sampled,
        tail_mass_at=tail_mass_at,
    )


def true_logprobs(scalars_BRL: Array) -> npt.NDArray[np.float32]:
    """[B, L] float32 of the true tokens; NaN where unknown."""
    code_BL = scalars_BRL[:, 2]
    values_BL = code_BL / np.float32(-TRUE_PER_NAT)
    return np.where(code_BL == TRUE_UNKNOWN, np.float32(np.nan), values_BL).astype(np.float32)


def _tail_mass(code_BL: Array) -> Array:
    return np.asarray(np.sin(code_BL.astype(np.float64) * (np.pi / 2 / TAIL_LEVELS)) ** 2)


def _descending(arrays: Arrays, kept_BL: Array, k: int, grid: Grid) -> tuple[Array, Array]:
    """Ids [B, L, K] int32 and codes [B, L, K] in descending order of code."""
    valid_BLK = np.arange(k) < kept_BL[..., None]
    ids_BLK = np.cumsum(_spread(arrays["id_deltas"], valid_BLK, kept_BL) + valid_BLK, axis=-1, dtype=np.int32) - 1
    if int(np.where(valid_BLK, ids_BLK, 0).view(np.uint32).max(initial=0)) >= grid.vocab_size:
        raise ValueError("it holds ids that are no tokens")
    codes_BLK = _spread(arrays["codes"], valid_BLK, kept_BL)
    id_bits = max(int(grid.vocab_size - 1).bit_length(), 1)
    dtype: type[Any] = np.uint32 if id_bits + grid.code_bits <= 32 else np.uint64
    # One number that sorts by falling code, then by rising id; what is no entry (code 0, id 0) comes last.
    top = dtype(grid.levels)
    keys_BLK = ((top - codes_BLK.astype(dtype)) << dtype(id_bits)) | np.where(valid_BLK, ids_BLK, 0).astype(dtype)
    keys_BLK.sort(axis=-1)
    codes_BLK = (top - (keys_BLK >> dtype(id_bits))).astype(np.intp)
    return (keys_BLK & dtype((1 << id_bits) - 1)).astype(np.int32), codes_BLK


def _spread(flat_BF: Array, valid_BLK: Array, kept_BL: Array) -> Array:
    """The reverse of `_close_up`, for many blocks; zeros where there is no entry."""
    if valid_BLK.all():
        return flat_BF.reshape(valid_BLK.shape)
    used_BF = np.arange(flat_BF.shape[1]) < kept_BL.sum(-1)[:, None]
    spread = np.zeros(valid_BLK.shape, dtype=flat_BF.dtype)
    spread[valid_BLK] = flat_BF[used_BF]
    return spread


def _drawn(arrays: Arrays, distinct_BL: Array) -> SampledTokens:
    positions = distinct_BL.shape[1]
    draws = arrays["drawn_counts"].shape[1] // positions
    if distinct_BL.max(initial=0) > draws:
        raise ValueError("it holds more draws than were made")
    valid_BLD = np.arange(draws) < distinct_BL[..., None]
    deltas_BLD = _spread(arrays["drawn_id_deltas"], valid_BLD, distinct_BL)
    ids_BLD = np.cumsum((deltas_BLD >> 1) + valid_BLD, axis=-1, dtype=np.int32) - 1
    again_BLD = (deltas_BLD & 1).astype(bool)
    more_BLD = _spread(arrays["drawn_counts"], again_BLD, again_BLD.sum(-1)).astype(np.int32)
    counts_BLD = np.where(again_BLD, more_BLD + 2, valid_BLD).astype(np.int32)
    return SampledTokens(ids_BLN=np.where(valid_BLD, ids_BLD, 0).astype(np.int32), counts_BLN=counts_BLD)
