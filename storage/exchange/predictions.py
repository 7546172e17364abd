"""Turns one row's entries into predictions that can be stored: checked, in descending order, with the mass of the tail.

Entries that are not a distribution are refused: a log-probability that is NaN or above 0, an id that is outside the
vocabulary or occurs twice, probabilities that sum to more than 1. With a lossy fit (DistillKit's format), the sum may
differ from 1 by any amount; if it exceeds 1, the probabilities are normalised, and the position is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ddk.errors import UserError
from ddk.values import Float32Array, Int32Array

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

Refuse = Callable[[str, int], UserError]
"""Makes the error of what is wrong with a prediction, by its number in the row."""

_ROUNDING = 1e-6
"""By which a sum of float32 probabilities may exceed 1, and a log-probability 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """What a row says of its P predictions. Letters: K entries, as many as the longest list has."""

    ids_PK: Int64Array
    logprobs_PK: Float64Array
    """−inf where there is no entry."""
    tail_mass_P: Float64Array | None = None
    """None where the row does not say."""
    true_logprobs_P: Float64Array | None = None
    """None where the row does not say; single ones may be NaN."""
    approximate: bool = False
    """Whether the log-probabilities are a lossy fit."""
    most_mass: float = 1.01
    """More than this is no rounding, but no distribution. For a lossy fit nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """One row: n tokens and P = n − 1 predictions; position j predicts token j + 1. K is what is kept of each."""

    tokens_N: Int32Array
    ids_PK: Int32Array
    logprobs_PK: Float32Array
    tail_mass_P: Float32Array
    true_logprobs_P: Float32Array
    """NaN where the row does not say."""
    renormalised_P: BoolArray
    """Where the entries' sum exceeded 1 and was divided out."""
    hit_P: BoolArray
    """Where the true token is among the entries."""
    hit_elsewhere_P: BoolArray
    """Where, under the other shift, the true token would be among the entries."""


def predictions(
    tokens_N: Int32Array, entries: Entries, *, vocab_size: int, k: int, shift: int, refuse: Refuse
) -> Predictions:
    """The row's predictions, with the k most probable entries of each.

    Args:
        tokens_N: below `vocab_size`.
        shift: of the row's lists; see `storage.exchange.foreign`.

    Raises:
        UserError: what `refuse` makes of what is no distribution.
    """
    _check(entries, vocab_size, refuse)
    ids_PK, logprobs_PK = _descending(entries)
    logprobs_PK, tail_P, renormalised_P = _masses(logprobs_PK, entries, refuse)
    is_true_PK = (ids_PK == tokens_N[1:, None]) & (logprobs_PK > -np.inf)
    # Lists with shift 1 stand at the token before the one they predict; under the other shift they predict that one.
    others_P = tokens_N[:-1] if shift == 1 else np.append(tokens_N[2:], np.int32(-1))[: len(tokens_N) - 1]
    cut_P = np.exp(logprobs_PK[:, k:]).sum(axis=1)
    return Predictions(
        tokens_N=tokens_N,
        ids_PK=_to_width(ids_PK, k, 0).astype(np.int32),
        logprobs_PK=_to_width(logprobs_PK, k, -np.inf).astype(np.float32),
        tail_mass_P=np.clip(tail_P + cut_P, 0.0, 1.0).astype(np.float32),
        true_logprobs_P=_true_logprobs(is_true_PK, logprobs_PK, entries, refuse).astype(np.float32),
        renormalised_P=renormalised_P,
        hit_P=is_true_PK.any(axis=1),
        hit_elsewhere_P=((ids_PK == others_P[:, None]) & (logprobs_PK > -np.inf)).any(axis=1),
    )


def _check(entries: Entries, vocab_size: int, refuse: Refuse) -> None:
    ids_PK, logprobs_PK = entries.ids_PK, entries.logprobs_PK
    if (i := _first(~(logprobs_PK < np.inf))) is not None:
        raise refuse("a log-probability is NaN or infinite", i)
    if not entries.approximate and (i := _first(logprobs_PK > _ROUNDING)) is not None:
        raise refuse(
            f"{logprobs_PK[i].max():.4g} is above 0, so no log-probability; logits must be normalised over the whole "
            f"vocabulary (logits - logsumexp) before they are cut to the top k",
            i,
        )
    entry_PK = logprobs_PK > -np.inf
    outside_PK = entry_PK & ((ids_PK < 0) | (ids_PK >= vocab_size))
    if (i := _first(outside_PK)) is not None:
        raise refuse(
            f"id {ids_PK[i][outside_PK[i]][0]} is none of the tokenizer's {vocab_size}; teacher.model must be the "
            f"model (or its tokenizer) that the file was made with",
            i,
        )
    # What is no entry gets a number of its own, below 0.
    sorted_PK = np.sort(np.where(entry_PK, ids_PK, -1 - np.arange(ids_PK.shape[1])), axis=1)
    repeated_PK = sorted_PK[:, 1:] == sorted_PK[:, :-1]
    if (i := _first(repeated_PK)) is not None:
        raise refuse(f"id {sorted_PK[i, 1:][repeated_PK[i]][0]} is there twice; correct or remove the row", i)


def _descending(entries: Entries) -> tuple[Int64Array, Float64Array]:
    logprobs_PK = entries.logprobs_PK if entries.approximate else np.minimum(entries.logprobs_PK, 0.0)
    ids_PK = np.where(logprobs_PK > -np.inf, entries.ids_PK, 0)
    if not (logprobs_PK[:, 1:] > logprobs_PK[:, :-1]).any():
        return ids_PK, logprobs_PK
    order_PK = np.argsort(-logprobs_PK, axis=1, kind="stable")
    return np.take_along_axis(ids_PK, order_PK, 1), np.take_along_axis(logprobs_PK, order_PK, 1)


def _masses(
    logprobs_PK: Float64Array, entries: Entries, refuse: Refuse
) -> tuple[Float64Array, Float64Array, BoolArray]:
    """The log-probabilities, renormalised where their sum exceeds 1; the mass outside them; where that was."""
    log_kept_P = np.logaddexp.reduce(logprobs_PK, axis=1)
    kept_P = np.exp(np.minimum(log_kept_P, 100.0))  # a bad fit may be far above 0
    if not entries.approximate and (i := _first(kept_P > entries.most_mass)) is not None:
        raise refuse(
            f"the entries' probabilities sum to {kept_P[i]:.4f}; they must be log-probabilities under the full "
            f"distribution, at temperature 1",
            i,
        )
    excess_P, tail_P = kept_P > 1.0 + _ROUNDING, np.maximum(1.0 - kept_P, 0.0)
    if entries.tail_mass_P is not None:
        tail_P = entries.tail_mass_P
        wrong_P = ~((tail_P >= 0.0) & (tail_P <= 1.0) & (np.abs(kept_P + tail_P - 1.0) <= 1e-2))
        if not entries.approximate and (i := _first(wrong_P)) is not None:
            raise refuse(
                f"'tail_mass' is {tail_P[i]:.4g} and the entries' probabilities sum to {kept_P[i]:.4g}; together they "
                f"must be 1",
                i,
            )
        # The little that quantising loses is no reason to change the values.
        excess_P = kept_P + tail_P > 1.0 + 1e-3
    logprobs_PK = logprobs_PK - np.where(excess_P, log_kept_P, 0.0)[:, None]
    return logprobs_PK, np.where(excess_P, 0.0, tail_P), excess_P


def _true_logprobs(is_true_PK: BoolArray, logprobs_PK: Float64Array, entries: Entries, refuse: Refuse) -> Float64Array:
    """What the row says of the true token, else its entry's; NaN where it has none."""
    entry_P = np.where(is_true_PK, logprobs_PK, -np.inf).max(axis=1)
    entry_P = np.where(entry_P > -np.inf, entry_P, np.nan)
    true_P = entries.true_logprobs_P
    if true_P is None:
        return entry_P
    if (i := _first(true_P > _ROUNDING)) is not None:
        raise refuse(f"'true_logprobs' is {true_P[i]:.4g}, above 0", i)
    # In probability as well: what a quantised cache keeps of a rare token may be off by a factor. False where unknown.
    apart_P = (np.abs(true_P - entry_P) > 0.5) & (np.abs(np.exp(true_P) - np.exp(entry_P)) > 0.02)
    if not entries.approximate and (i := _first(apart_P)) is not None:
        raise refuse(
            f"'true_logprobs' is {true_P[i]:.4g} and the true token's own entry {entry_P[i]:.4g}; the columns are not "
            f"aligned",
            i,
        )
    return np.where(np.isnan(true_P), entry_P, np.minimum(true_P, 0.0))


def _to_width(values_PK: npt.NDArray[Any], k: int, filler: float) -> npt.NDArray[Any]:
    """The first k columns; filled up where there are fewer."""
    missing = max(0, k - values_PK.shape[1])
    return np.pad(values_PK[:, :k], ((0, 0), (0, missing)), constant_values=filler)


def _first(wrong: BoolArray) -> int | None:
    """The first prediction of which anything is wrong."""
    rows = np.flatnonzero(wrong.any(axis=1) if wrong.ndim == 2 else wrong)
    return int(rows[0]) if rows.size else None
