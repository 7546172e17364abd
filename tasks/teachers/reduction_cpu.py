"""The reduction of logits on a CPU: one compiled pass a row, instead of a chain of passes over the whole chunk.

For each row of V logits, which stays in the core's cache meanwhile:

1. The largest of each column group (V is read once, 16 and more values an instruction). The k-th largest of these is
   a bound: at least k logits reach it, and few more do.
2. The logits of the groups that reach the bound are collected and sorted: the top k.
3. The rest is summed: exp(x), x·exp(x) for the entropy, and exp(x/T) for each further temperature, with an
   exponential of our own that the compiler turns into vector instructions. What is in the top k is left out of these
   sums, so that the mass outside keeps its relative precision however small it is.
4. Random draws, where asked for, are read off the cumulative sum at given uniform numbers.

Rows are shared out among threads; the kernel holds no lock. Compiled by numba when it is first used, about ten
seconds, and kept beside this file (or in `NUMBA_CACHE_DIR`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Float32s = npt.NDArray[np.float32]

_MASKED = np.float32(-1e30)
"""In place of a logit that is not to be summed: its exponential is 0, and so is its product with it."""
_LANES = 256
"""Running sums side by side. Their order is written out, and no fast-math flag lets the compiler choose another: the
code that numba runs right after compiling and the code that it loads later from its cache are optimised differently,
and a shard's bytes must not depend on which of them it is."""
_DRAW_PART = 256


@intrinsic
def _as_float32(typing_context: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _fma(typing_context: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z with one rounding, as the processor does it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@nb.njit(inline="always")
def _exp(x: Any) -> Any:
    """e^x for x ≤ 0 within 2e-7 relative, 0 below −87: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by Cephes' polynomial."""
    clamped = x if x > np.float32(-87.0) else np.float32(-87.0)
    n = np.floor(_fma(clamped, np.float32(1.4426950408889634), np.float32(0.5)))
    r = _fma(n, np.float32(2.12194440e-4), _fma(n, np.float32(-0.693359375), clamped))
    p = _fma(np.float32(1.9875691500e-4), r, np.float32(1.3981999507e-3))
    p = _fma(p, r, np.float32(8.3334519073e-3))
    p = _fma(p, r, np.float32(4.1665795894e-2))
    p = _fma(p, r, np.float32(1.6666665459e-1))
    p = _fma(p, r, np.float32(5.0000001201e-1))
    power = _as_float32((nb.int32(n) + nb.int32(127)) << nb.int32(23))
    value = (_fma(p, r * r, r) + np.float32(1.0)) * power
    return value if x > np.float32(-87.0) else np.float32(0.0)


@nb.njit
def _group_maxima(row: Float32s, groups: int, maxima: Float32s, sums: Float32s) -> bool:
    """maxima[g] = the largest of row[g], row[g + groups], row[g + 2·groups], …

    Returns whether all are numbers: a NaN, which no comparison shows, is one in its group's sum too.
    """
    maxima[:] = row[:groups]
    sums[:] = row[:groups]
    whole = len(row) // groups
    for i in range(1, whole):
        part = row[i * groups : (i + 1) * groups]
        for g in range(groups):
            v = part[g]
            maxima[g] = v if v > maxima[g] else maxima[g]
            sums[g] += v
    for g in range(len(row) - whole * groups):
        v = row[whole * groups + g]
        maxima[g] = v if v > maxima[g] else maxima[g]
        sums[g] += v
    return not np.isnan(sums).any()


@nb.njit
def _sums(row: Float32s, largest: np.float32, totals: Float32s, weighteds: Float32s) -> Any:
    """Σ e^(x − largest) and Σ (x − largest)·e^(x − largest); the last two arguments are room to work in."""
    totals[:], weighteds[:] = np.float32(0.0), np.float32(0.0)
    whole = len(row) // _LANES
    for i in range(whole):
        part = row[i * _LANES : (i + 1) * _LANES]
        for lane in range(_LANES):
            x = part[lane] - largest
            e = _exp(x)
            totals[lane] += e
            weighteds[lane] += e * (x if x > np.float32(-87.0) else np.float32(-87.0))
    for lane in range(len(row) - whole * _LANES):
        x = row[whole * _LANES + lane] - largest
        e = _exp(x)
        totals[lane] += e
        weighteds[lane] += e * (x if x > np.float32(-87.0) else np.float32(-87.0))
    total = weighted = 0.0
    for lane in range(_LANES):
        total += totals[lane]
        weighted += weighteds[lane]
    return total, weighted


@nb.njit
def _sum_exp(row: Float32s, largest: np.float32, inverse_temperature: np.float32, totals: Float32s) -> Any:
    totals[:] = np.float32(0.0)
    whole = len(row) // _LANES
    for i in range(whole):
        part = row[i * _LANES : (i + 1) * _LANES]
        for lane in range(_LANES):
            totals[lane] += _exp((part[lane] - largest) * inverse_temperature)
    for lane in range(len(row) - whole * _LANES):
        totals[lane] += _exp((row[whole * _LANES + lane] - largest) * inverse_temperature)
    total = 0.0
    for lane in range(_LANES):
        total += totals[lane]
    return total


@nb.njit
def _draw(row: Float32s, largest: np.float32, uniforms: Any, drawn: Any, room: Float32s) -> None:
    """Inverse of the cumulative distribution at ascending uniform numbers; `drawn` comes out ascending."""
    width = _DRAW_PART
    parts = (len(row) + width - 1) // width
    sums = np.empty(parts, np.float64)
    for i in range(parts):
        sums[i] = _sum_exp(row[i * width : (i + 1) * width], largest, np.float32(1.0), room)
    total = sums.sum()
    part, before = 0, 0.0
    for n in range(len(uniforms)):
        target = uniforms[n] * total
        while part < parts - 1 and before + sums[part] <= target:
            before += sums[part]
            part += 1
        reached, chosen = before, -1
        for j in range(part * width, min((part + 1) * width, len(row))):
            e = _exp(row[j] - largest)
            if e > 0.0:
                chosen = j
                reached += e
                if reached > target:
                    break
        drawn[n] = chosen


@nb.njit
def _largest(values: Float32s, k: int) -> Any:
    """The k-th largest; reorders the values (Hoare's selection)."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return values[k - 1]


@nb.njit
def _sort_key(value: np.float32, index: int) -> Any:
    """An unsigned integer that is smaller where the value is larger; equal values: where the index is smaller."""
    bits = np.float32(value).view(np.uint32)
    ordered = ~bits if bits & np.uint32(0x80000000) else bits | np.uint32(0x80000000)
    return (np.uint64(~ordered & np.uint32(0xFFFFFFFF)) << np.uint64(32)) | np.uint64(index)


def _compiled_once(function: Callable[..., None]) -> Any:
    """Kept where numba finds a folder that may be written to; else compiled by every process."""
    try:
        return nb.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return nb.njit(nogil=True)(function)


@_compiled_once
def _reduce(
    logits: Float32s,
    vocab: int,
    labels: Any,
    at: Any,
    k: int,
    inverse_temperatures: Float32s,
    uniforms: Any,
    ids: Any,
    logprobs: Float32s,
    tail: Float32s,
    true: Float32s,
    entropy: Float32s,
    tail_at: Float32s,
    drawn: Any,
) -> None:
    """Rows of `logits` [N, ≥ vocab] into rows `at` of the outputs; overwrites the logits."""
    # Few groups make the bound loose, and each is long to collect from; many cost more to select from. Measured.
    per_k = 2 if vocab < 16_384 else 4 if vocab < 65_536 else 8
    groups = max(1, min(vocab, ((per_k * k + 63) // 64) * 64))
    maxima, scratch = np.empty(groups, np.float32), np.empty(groups, np.float32)
    totals, weighteds = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    keys = np.empty(vocab, np.uint64)
    for n in range(logits.shape[0]):
        row, out = logits[n][:vocab], at[n]
        label_logit = row[labels[n]]
        if not _group_maxima(row, groups, maxima, scratch):
            ids[out, :], logprobs[out, :], tail[out], true[out] = 0, np.nan, np.nan, np.nan
            continue
        scratch[:] = maxima
        bound = _largest(scratch, k) if groups > k else np.float32(-np.inf)
        found = 0
        for g in range(groups):
            if maxima[g] >= bound:
                for j in range(g, vocab, groups):
                    if row[j] >= bound:
                        keys[found] = _sort_key(row[j], j)
                        found += 1
        top = keys[:found]
        top.sort()
        largest = row[np.int64(top[0] & np.uint64(0xFFFFFFFF))]
        if uniforms.shape[1] > 0:
            _draw(row, largest, uniforms[out], drawn[out], totals)
        top_total, top_weighted = 0.0, 0.0
        for i in range(k):
            kept = np.int64(top[i] & np.uint64(0xFFFFFFFF))
            x = row[kept] - largest
            ids[out, i], logprobs[out, i] = kept, x
            row[kept] = _MASKED
            e = np.float64(_exp(x))
            top_total += e
            top_weighted += e * (x if x > np.float32(-87.0) else np.float32(-87.0))
        rest_total, rest_weighted = _sums(row, largest, totals, weighteds)
        total = top_total + rest_total
        log_total = np.log(total)
        tail[out] = rest_total / total
        true[out] = np.float64(label_logit) - np.float64(largest) - log_total
        entropy[out] = log_total - (top_weighted + rest_weighted) / total
        for m in range(len(inverse_temperatures)):
            rest = _sum_exp(row, largest, inverse_temperatures[m], totals)
            inside = 0.0
            for i in range(k):
                inside += _exp(logprobs[out, i] * inverse_temperatures[m])
            tail_at[out, m] = rest / (inside + rest)
        for i in range(k):
            logprobs[out, i] = logprobs[out, i] - log_total


class CpuReducer:
    """Reduces chunks of logits with a few threads of its own.

    Args:
        cores: that the threads may run on; one thread each. The engine pins its own threads, and a thread that one of
            them starts would otherwise share its core.
    """

    def __init__(self, cores: list[int]) -> None:
        self._threads = len(cores)
        free = list(cores)

        def pin() -> None:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, [free.pop()])

        self._pool = ThreadPoolExecutor(max_workers=self._threads, thread_name_prefix="ddk-reduce", initializer=pin)

    def __call__(
        self,
        logits_NP: np.ndarray[Any, Any],
        vocab_size: int,
        labels_N: np.ndarray[Any, Any],
        at_N: np.ndarray[Any, Any],
        inverse_temperatures_M: np.ndarray[Any, Any],
        out: dict[str, np.ndarray[Any, Any]],
    ) -> None:
        """Write rows `at_N` of the arrays in `out`; overwrites the logits.

        Args:
            logits_NP: float32, contiguous; columns from `vocab_size` on are padding and left out.
            labels_N: int64, the true next tokens.
            at_N: int64, the row of each position in the outputs.
            inverse_temperatures_M: float32, 1/T.
            out: `ids` [P, K] int32, `logprobs` [P, K], `tail_mass`, `true_logprobs`, `entropy` [P],
                `tail_mass_at` [P, M] float32, `drawn` [P, D] int32; and to be read, `uniforms` [P, D] float64,
                ascending within a row.
        """
        outputs = [
            out[n] for n in ("ids", "logprobs", "tail_mass", "true_logprobs", "entropy", "tail_mass_at", "drawn")
        ]
        read = (inverse_temperatures_M, out["uniforms"])
        k = out["ids"].shape[1]
        edges = [len(logits_NP) * i // self._threads for i in range(self._threads + 1)]
        parts = [slice(a, b) for a, b in itertools.pairwise(edges) if b > a]
        jobs = [
            self._pool.submit(_reduce, logits_NP[p], vocab_size, labels_N[p], at_N[p], k, *read, *outputs)
            for p in parts
        ]
        for job in jobs:
            job.result()
