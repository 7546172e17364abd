"""The byte format of DistillKit's Parquet columns: a teacher's top k as bit-packed ids and fitted log-probabilities.

A position is two runs of bytes, both as long as the configuration says, whatever they hold:

    bytepacked_indices    k ids, each in as few bits as the vocabulary needs, most significant bit first, end to end;
                          zero bits fill the last byte
    compressed_logprobs   little-endian numbers, end to end:
        exact_k values                              the most probable tokens' log-probabilities (exact_dtype)
        a coefficient for each polynomial term      the least-squares fit of the others (term_dtype)
        for each residual bin a scale, then its elements (packed as ids are): what the fit leaves over

With 2 terms, [0, 'sqrt'], and coefficients a and b, the value at rank exact_k + t is a + b·sqrt(t), t = 0, 1, …
(with `normalize_t` t runs from 0 to 1), and a bin's element is added to it. With `delta_encoding` all this holds for
each value's difference to the one before, and the values are the running sums.

Encoding loses what the exact part's dtype and the fit lose. `encode` and `decode` work in float64, on many positions
at once. Shape letters here: P positions, K the configuration's k, T the fitted values, C the terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ddk.values import Float32Array, Int32Array

Number = Literal["float16", "bfloat16", "float32", "float64"]
Bytes = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]

_SIZES: dict[Number, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_AT_ONCE = 4096
"""Positions; bounds the memory of unpacked bits to some 16 MB."""


MOST_ENTRIES = 1 << 20
"""Of a position: more than any vocabulary has, and few enough that a file cannot take all memory by a number."""
Term = Literal["sqrt", "exp"] | Annotated[int, Field(ge=0, le=64)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ResidualBin(_Section):
    """Some of the differences between the values and the fit, in a few bits each."""

    scale_dtype: Number
    element_bits: int = Field(ge=1, le=64)
    num_elements: int = Field(ge=1, le=MOST_ENTRIES)

    @property
    def element_bytes(self) -> int:
        return -(-self.element_bits * self.num_elements // 8)


class CompressionConfig(_Section):
    """The content of `compression_config.yaml`; defaults are those that DistillKit reads into it."""

    d: int = Field(ge=2, lt=2**31)
    """Vocabulary size; every id is below it."""
    k: int = Field(ge=1, le=MOST_ENTRIES)
    exact_k: int = Field(ge=0, le=MOST_ENTRIES)
    exact_dtype: Number = "float32"
    polynomial_terms: tuple[Term, ...] | None = Field(default=None, max_length=64)
    term_dtype: Number = "float32"
    residual_bins: tuple[ResidualBin, ...] = Field(default=(), max_length=1024)
    delta_encoding: bool = True
    error_diffusion: bool = False
    """Whether the encoder adds each value's rounding error to the next; reading does not depend on it."""
    normalize_t: bool = False

    @model_validator(mode="after")
    def _fits(self) -> CompressionConfig:
        if self.k > self.d:
            raise ValueError(f"k is {self.k}, and d only {self.d}")
        if self.exact_k > self.k:
            raise ValueError(f"exact_k is {self.exact_k}, more than k ({self.k})")
        if self.fitted and not self.terms and not self.residual_bins:
            raise ValueError("exact_k is less than k: it takes polynomial_terms or residual_bins for the others")
        if sum(part.num_elements for part in self.residual_bins) > self.fitted:
            raise ValueError(f"residual_bins hold more elements than k - exact_k ({self.fitted})")
        return self

    @property
    def fitted(self) -> int:
        """Values that are not stored exactly."""
        return self.k - self.exact_k

    @property
    def terms(self) -> tuple[str | int, ...]:
        return self.polynomial_terms or ()

    @property
    def id_bits(self) -> int:
        return (self.d - 1).bit_length()

    @property
    def id_bytes(self) -> int:
        """Of one position's ids."""
        return -(-self.k * self.id_bits // 8)

    @property
    def logprob_bytes(self) -> int:
        """Of one position's log-probabilities."""
        bins = sum(_SIZES[part.scale_dtype] + part.element_bytes for part in self.residual_bins)
        return self.exact_k * _SIZES[self.exact_dtype] + len(self.terms) * _SIZES[self.term_dtype] + bins


def documented(name: Literal["k50", "k128"], vocab_size: int) -> CompressionConfig:
    """One of the two configurations that DistillKit's documentation gives, for a vocabulary of this size."""
    part: dict[str, Any] = {
        "k50": {"k": 50, "exact_k": 1, "polynomial_terms": (0, 1, "sqrt")},
        "k128": {"k": 128, "exact_k": 16, "polynomial_terms": (0, 1, 2, 3, 4, "sqrt")},
    }[name]
    return CompressionConfig(d=vocab_size, exact_dtype="bfloat16", delta_encoding=False, **part)


def encode(
    logprobs_PK: npt.NDArray[np.floating[Any]], ids_PK: npt.NDArray[np.integer[Any]], config: CompressionConfig
) -> tuple[Bytes, Bytes]:
    """`compressed_logprobs` and `bytepacked_indices` of some positions, a row each.

    Raises:
        ValueError: another shape than [P, k], ids outside the vocabulary, or log-probabilities that are not finite or
            not in descending order.
    """
    if logprobs_PK.shape != ids_PK.shape or logprobs_PK.ndim != 2 or ids_PK.shape[1] != config.k:
        raise ValueError(f"log-probabilities {logprobs_PK.shape} and ids {ids_PK.shape} must both be [P, {config.k}]")
    if ids_PK.size and not (ids_PK.min() >= 0 and ids_PK.max() < config.d):
        raise ValueError(f"ids from {ids_PK.min()} to {ids_PK.max()} do not fit a vocabulary of {config.d}")
    if not np.isfinite(logprobs_PK).all() or (np.diff(logprobs_PK, axis=1) > 0).any():
        raise ValueError("log-probabilities must be finite and in descending order")
    compressed = np.empty((len(ids_PK), config.logprob_bytes), dtype=np.uint8)
    packed = np.empty((len(ids_PK), config.id_bytes), dtype=np.uint8)
    for first in range(0, len(ids_PK), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        compressed[part] = _encode_logprobs(logprobs_PK[part].astype(np.float64), config)
        packed[part] = pack_bits(ids_PK[part].astype(np.uint64), config.id_bits)
    return compressed, packed


def decode(compressed: Bytes, packed: Bytes, config: CompressionConfig) -> tuple[Float32Array, Int32Array]:
    """Log-probabilities [P, K] and ids [P, K] of some positions. What the fit gives need not be in descending order.

    Raises:
        ValueError: the rows have other lengths than the configuration gives.
    """
    found = (compressed.shape[1], packed.shape[1])
    if found != (config.logprob_bytes, config.id_bytes) or len(compressed) != len(packed):
        raise ValueError(
            f"positions of {found[0]} and {found[1]} bytes, where the configuration gives {config.logprob_bytes} "
            f"(log-probabilities) and {config.id_bytes} (ids)"
        )
    logprobs = np.empty((len(packed), config.k), dtype=np.float32)
    ids = np.empty((len(packed), config.k), dtype=np.int32)
    for first in range(0, len(packed), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        logprobs[part] = _decode_logprobs(compressed[part], config)
        ids[part] = unpack_bits(packed[part], config.id_bits, config.k)
    return logprobs, ids


def pack_bits(values_PN: npt.NDArray[np.uint64], bits: int) -> Bytes:
    """Rows of numbers below 2**bits as bytes: `[[1, 2, 3]]` in 3 bits each is 001 010 011 0000000, so 0x29 0x80."""
    positions, count = values_PN.shape
    width = _width(bits)
    as_bytes = values_PN.astype(f">u{width}").view(np.uint8).reshape(positions, count, width)
    each = np.unpackbits(as_bytes, axis=-1)[..., 8 * width - bits :]
    return np.packbits(each.reshape(positions, count * bits), axis=-1)


def unpack_bits(packed: Bytes, bits: int, count: int) -> npt.NDArray[np.uint64]:
    """The inverse of `pack_bits`; `count` numbers a row."""
    width = _width(bits)
    each = np.unpackbits(packed, axis=-1, count=count * bits).reshape(len(packed), count, bits)
    whole = np.zeros((len(packed), count, 8 * width), dtype=np.uint8)
    whole[..., 8 * width - bits :] = each
    return np.packbits(whole, axis=-1).view(f">u{width}")[..., 0].astype(np.uint64)


def _width(bits: int) -> int:
    """Bytes of the smallest unsigned number with so many bits."""
    return 1 << max(0, (bits - 1).bit_length() - 3)


def _encode_logprobs(values_PK: Float64Array, config: CompressionConfig) -> Bytes:
    if config.delta_encoding:
        values_PK = np.diff(values_PK, axis=1, prepend=0.0)
    carry = config.error_diffusion
    exact = _quantised(values_PK[:, : config.exact_k], lambda values: _rounded(values, config.exact_dtype), carry)
    parts = [_to_bytes(exact, config.exact_dtype)]
    left_PT = values_PK[:, config.exact_k :]
    if config.terms:
        basis_TC, solver_CT = _fit(config)
        coefficients_PC = _rounded(left_PT @ solver_CT.T, config.term_dtype)
        parts.append(_to_bytes(coefficients_PC, config.term_dtype))
        left_PT = left_PT - coefficients_PC @ basis_TC.T
    first = 0
    for part in config.residual_bins:
        parts += _encode_bin(left_PT[:, first : first + part.num_elements], part, carry)
        first += part.num_elements
    return np.concatenate(parts, axis=1)


def _decode_logprobs(compressed: Bytes, config: CompressionConfig) -> Float64Array:
    at = 0

    def take(size: int) -> Bytes:
        nonlocal at
        at += size
        return compressed[:, at - size : at]

    exact = _from_bytes(take(config.exact_k * _SIZES[config.exact_dtype]), config.exact_dtype)
    fitted_PT = np.zeros((len(compressed), config.fitted))
    if config.terms:
        coefficients_PC = _from_bytes(take(len(config.terms) * _SIZES[config.term_dtype]), config.term_dtype)
        fitted_PT += coefficients_PC @ _fit(config)[0].T
    first = 0
    for part in config.residual_bins:
        scale_P1 = _from_bytes(take(_SIZES[part.scale_dtype]), part.scale_dtype)
        elements = unpack_bits(take(part.element_bytes), part.element_bits, part.num_elements)
        fitted_PT[:, first : first + part.num_elements] += _levels(elements, part.element_bits) * scale_P1
        first += part.num_elements
    values = np.concatenate([exact, fitted_PT], axis=1)
    return np.cumsum(values, axis=1) if config.delta_encoding else values


@lru_cache(maxsize=16)
def _fit(config: CompressionConfig) -> tuple[Float64Array, Float64Array]:
    """The terms at every t [T, C], and what turns values into coefficients [C, T]."""
    count = config.fitted
    t = np.linspace(0.0, 1.0, count) if config.normalize_t else np.arange(count, dtype=np.float64)
    functions = {"sqrt": np.sqrt, "exp": np.exp}
    basis = np.stack([functions[term](t) if isinstance(term, str) else t**term for term in config.terms], axis=1)
    # Columns of equal length: t**4 is 10**8 times t**0, and the pseudo-inverse would drop the small one.
    lengths = np.linalg.norm(basis, axis=0)
    lengths[lengths == 0] = 1.0
    solver: Float64Array = np.linalg.pinv(basis / lengths, rcond=1e-13) / lengths[:, None]
    return basis, solver


def _encode_bin(left_PN: Float64Array, part: ResidualBin, carry: bool) -> list[Bytes]:
    bits = part.element_bits
    if bits == 1:
        scale = np.abs(left_PN).mean(axis=1, keepdims=True)
    else:
        # No element is cut off, though there is one level fewer above zero than below.
        top = 2.0 ** (bits - 1)
        scale = np.maximum(left_PN.max(axis=1, keepdims=True) / (top - 1), -left_PN.min(axis=1, keepdims=True) / top)
    scale = _rounded(scale, part.scale_dtype)
    scale[scale == 0] = 1.0
    levels = _quantised(left_PN / scale, lambda values: _levels(_elements(values, bits), bits), carry)
    return [_to_bytes(scale, part.scale_dtype), pack_bits(_elements(levels, bits), bits)]


def _elements(levels: Float64Array, bits: int) -> npt.NDArray[np.uint64]:
    """The stored number for each value, in units of the scale."""
    if bits == 1:
        return (levels >= 0).astype(np.uint64)
    highest = np.floor(np.nextafter(2.0**bits, 0))
    return np.clip(np.rint(levels) + 2.0 ** (bits - 1), 0, highest).astype(np.uint64)


def _levels(elements: npt.NDArray[np.uint64], bits: int) -> Float64Array:
    """The inverse of `_elements`."""
    if bits == 1:
        return 2.0 * elements.astype(np.float64) - 1.0
    return elements.astype(np.float64) - 2.0 ** (bits - 1)


def _quantised(values_PN: Float64Array, store: Callable[[Float64Array], Float64Array], carry: bool) -> Float64Array:
    """What is stored of each value; with `carry` each one's error is added to the next one before."""
    if not carry:
        return store(values_PN)
    stored, error = np.empty_like(values_PN), np.zeros(len(values_PN))
    for i in range(values_PN.shape[1]):
        wanted = values_PN[:, i] + error
        stored[:, i] = store(wanted)
        error = wanted - stored[:, i]
    return stored


def _rounded(values: Float64Array, number: Number) -> Float64Array:
    """The nearest values that this type has."""
    if number == "bfloat16":
        return _from_bfloat16(_to_bfloat16(values))
    stored: Float64Array = values.astype(number).astype(np.float64)
    return stored


def _to_bytes(values_PN: Float64Array, number: Number) -> Bytes:
    stored = _to_bfloat16(values_PN) if number == "bfloat16" else values_PN.astype(np.dtype(number).newbyteorder("<"))
    return np.ascontiguousarray(stored).view(np.uint8).reshape(len(values_PN), -1)


def _from_bytes(content: Bytes, number: Number) -> Float64Array:
    plain = np.ascontiguousarray(content)
    if number == "bfloat16":
        return _from_bfloat16(plain.view("<u2"))
    values: Float64Array = plain.view(np.dtype(number).newbyteorder("<")).astype(np.float64)
    return values


def _to_bfloat16(values: Float64Array) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _from_bfloat16(halves: npt.NDArray[np.uint16]) -> Float64Array:
    return (halves.astype("<u4") << 16).view("<f4").astype(np.float64)
