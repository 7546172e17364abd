"""From vLLM's prompt log-probabilities to targets: functions on arrays, whoever delivered the numbers.

vLLM gives k + 1 numbers a position, in one of two shapes:

flat  (`FlatLogprobs`, inside one process) the true token first, then the k most probable tokens in order of rank; the
      true token is there twice when it is among them.
      For k = 2 and the true token 7:   ids 7 3 7 | logprobs −1.1 −0.5 −1.1
dict  (a server's JSON) one entry a token id, so k of them or k + 1, in an order that means nothing; each says its rank.
      For the same position:            {"7": rank 2, "3": rank 1}
      For the true token 9 outside:     {"9": rank 40, "3": rank 1, "7": rank 2}

`flat_rows` and `ranked_rows` turn either into `Rows`: one line a position, in order of rank, and the true token's
value apart. `assemble` then drops ids that are no tokens of the tokenizer, keeps k, and computes the tail.

The tail is 1 − Σ kept, summed in float64. What it is summed from are float32 log-probabilities, so its error is
absolute, not relative: 1e-6 at most, mostly 1e-7. A tail smaller than that is noise. An engine of ours that sees the
logits sums the tail itself and has no such limit (`source: engine`).

Rows of the model that are padding (ids of V and more) never become targets. But their probability was in the normaliser
when vLLM computed the log-probabilities, and how much it was cannot be told from k of them: it stays in the tail, and
every kept log-probability is low by −log(1 − padding's mass). A model whose training saw its padding gives it next to
nothing; one whose training left it out may give it whatever it likes (the quickstart's teacher: 1 % on average, 8 % at
the worst position). `source: engine` leaves it out exactly; where a padded vocabulary meets another source, the log
says so (`warn_of_padding`).

Shape letters: N positions, E entries in a row of them all, W entries a position as they came, K entries kept, V tokens
of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk.values import Float32Array, Int32Array, SparseTargets
from tasks.showing.progress import logger

IntArray = npt.NDArray[np.integer[Any]]
ABSENT = -1
"""Id of an entry that is not there."""
_NOT_ITS_OWN = "vLLM's log-probabilities do not name the block's own token at every position; nothing was stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What was said of N positions, each in order of rank; id `ABSENT` and log-probability −inf behind the last."""

    ids_NW: Int32Array
    logprobs_NW: Float32Array
    true_logprobs_N: Float32Array


def entries_to_ask(k: int, vocab_size: int, model_rows: int) -> int:
    """How many entries to ask for so that k are left, but for a model that likes its padding.

    A sixteenth more, or four, or as many as there are padded rows; never more than the model has.
    """
    padded = max(model_rows - vocab_size, 0)
    return min(k + min(padded, max(4, k // 16)), model_rows)


def warn_of_padding(source: str, vocab_size: int, model_rows: int) -> None:
    """Say what this source cannot leave out, where there is something to leave out."""
    if model_rows > vocab_size:
        logger.warning(
            "teacher.source '%s': the model predicts %d tokens and the tokenizer has %d; the probability of the "
            "other tokens is counted as tail (source: engine excludes it)",
            source,
            model_rows,
            vocab_size,
        )


def flat_rows(
    ids_E: IntArray, logprobs_E: npt.NDArray[np.floating[Any]], counts_N: IntArray, labels_N: IntArray
) -> Rows:
    """Rows of the flat shape: the true token, then the others in order of rank.

    Args:
        counts_N: entries of each position; they may differ.
        labels_N: the true tokens.

    Raises:
        RuntimeError: a position is missing, or does not begin with its true token.
    """
    if len(counts_N) != len(labels_N) or (counts_N < 1).any():
        raise RuntimeError(f"vLLM answered for {(counts_N > 0).sum()} of {len(labels_N)} positions; nothing was stored")
    ids_NW, logprobs_NW = _padded(ids_E, logprobs_E, counts_N)
    if (ids_NW[:, 0] != labels_N).any():
        raise RuntimeError(_NOT_ITS_OWN)
    return Rows(ids_NW=ids_NW[:, 1:], logprobs_NW=logprobs_NW[:, 1:], true_logprobs_N=logprobs_NW[:, 0])


def ranked_rows(
    ids_E: IntArray,
    logprobs_E: npt.NDArray[np.floating[Any]],
    ranks_E: IntArray,
    counts_N: IntArray,
    labels_N: IntArray,
    width: int,
) -> Rows:
    """Rows of the dict shape: distinct entries in any order, each with its rank.

    Args:
        counts_N: entries of each position.
        labels_N: the true tokens, each among its position's entries.
        width: entries that were asked for; what ranks behind them is the true token and no entry.

    Raises:
        RuntimeError: a true token is missing.
    """
    row_E = np.repeat(np.arange(len(counts_N)), counts_N)
    true_E = ids_E == labels_N[row_E]
    if (np.bincount(row_E[true_E], minlength=len(counts_N)) != 1).any():
        raise RuntimeError(_NOT_ITS_OWN)
    order = np.lexsort((ranks_E, row_E))
    ids_NW, logprobs_NW = _padded(ids_E[order], logprobs_E[order], counts_N)
    return Rows(
        ids_NW=ids_NW[:, :width],
        logprobs_NW=logprobs_NW[:, :width],
        true_logprobs_N=logprobs_E[true_E].astype(np.float32),
    )


def stacked(rows: Sequence[Rows]) -> Rows:
    """The rows of several parts, one after the other; narrower ones are filled up."""
    width = max(part.ids_NW.shape[1] for part in rows)
    return Rows(
        ids_NW=np.concatenate([_widened(part.ids_NW, width, ABSENT) for part in rows]),
        logprobs_NW=np.concatenate([_widened(part.logprobs_NW, width, -np.inf) for part in rows]),
        true_logprobs_N=np.concatenate([part.true_logprobs_N for part in rows]),
    )


def assemble(rows: Rows, *, blocks: int, k: int, vocab_size: int) -> SparseTargets:
    """The targets of some blocks.

    Args:
        rows: of all their positions, block after block.
        k: entries to keep, K.

    Raises:
        RuntimeError: these are no log-probabilities in order of rank.
    """
    ids_NW, logprobs_NW = rows.ids_NW, rows.logprobs_NW
    kept_NW = (ids_NW >= 0) & (ids_NW < vocab_size) & (logprobs_NW != -np.inf)
    if not kept_NW[:, :k].all():
        # A stable sort: what is kept moves to the front and stays in order.
        order = np.argsort(~kept_NW, axis=1, kind="stable")
        ids_NW = np.take_along_axis(np.where(kept_NW, ids_NW, 0), order, axis=1)
        logprobs_NW = np.take_along_axis(np.where(kept_NW, logprobs_NW, -np.inf), order, axis=1)
    ids_NK = _widened(ids_NW[:, :k], k, 0)
    logprobs_NK = _widened(logprobs_NW[:, :k], k, -np.inf)
    mass_N = np.exp(logprobs_NK, dtype=np.float64).sum(-1)
    _check(rows, mass_N)
    tail_N = np.clip(1.0 - mass_N, 0.0, 1.0)
    return SparseTargets(
        ids_BLK=np.ascontiguousarray(ids_NK, dtype=np.int32).reshape(blocks, -1, k),
        logprobs_BLK=np.ascontiguousarray(logprobs_NK, dtype=np.float32).reshape(blocks, -1, k),
        tail_mass_BL=tail_N.astype(np.float32).reshape(blocks, -1),
        true_logprobs_BL=np.ascontiguousarray(rows.true_logprobs_N, dtype=np.float32).reshape(blocks, -1),
    )


def _check(rows: Rows, mass_N: npt.NDArray[np.float64]) -> None:
    # Logits instead of log-probabilities, or columns in another order, would look like targets and be none. NaN passes
    # here: whoever stores the targets names that one.
    if (rows.logprobs_NW > 1e-3).any() or (rows.true_logprobs_N > 1e-3).any() or (mass_N > 1.001).any():
        raise RuntimeError(
            "vLLM returned values that are no log-probabilities; it must run with logprobs_mode raw_logprobs"
        )
    if (rows.logprobs_NW[:, 1:] > rows.logprobs_NW[:, :-1]).any():
        raise RuntimeError("vLLM returned log-probabilities out of order; nothing was stored")


def _padded(
    ids_E: IntArray, logprobs_E: npt.NDArray[np.floating[Any]], counts_N: IntArray
) -> tuple[Int32Array, Float32Array]:
    """One line a position. For counts 2, 1: [a, b, c] → [[a, b], [c, absent]]."""
    width = int(counts_N.max(initial=1))
    if (counts_N == width).all():
        return (
            ids_E.astype(np.int32).reshape(len(counts_N), width),
            logprobs_E.astype(np.float32).reshape(len(counts_N), width),
        )
    there_NW = np.arange(width) < counts_N[:, None]
    ids_NW = np.full(there_NW.shape, ABSENT, dtype=np.int32)
    logprobs_NW = np.full(there_NW.shape, -np.inf, dtype=np.float32)
    ids_NW[there_NW], logprobs_NW[there_NW] = ids_E, logprobs_E
    return ids_NW, logprobs_NW


def _widened(array_NW: npt.NDArray[Any], width: int, value: float) -> npt.NDArray[Any]:
    missing = width - array_NW.shape[1]
    return array_NW if missing <= 0 else np.pad(array_NW, ((0, 0), (0, missing)), constant_values=value)
