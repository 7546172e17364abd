"""DistillKit's bytes read in plain Python, written from the format's description alone."""

from __future__ import annotations

import math
import struct

from storage.exchange.distillkit import CompressionConfig


def plain_unpack(row: bytes, bits: int, count: int) -> list[int]:
    """Numbers of so many bits each, most significant first, as their definition says."""
    text = "".join(f"{byte:08b}" for byte in row)
    assert set(text[count * bits :]) <= {"0"}, "what fills the last byte is zeros"
    return [int(text[i * bits : (i + 1) * bits], 2) for i in range(count)]


def plain_numbers(row: bytes, dtype: str, count: int) -> list[float]:
    if dtype == "bfloat16":
        return [struct.unpack("<f", b"\0\0" + row[2 * i : 2 * i + 2])[0] for i in range(count)]
    return list(struct.unpack(f"<{count}{ {'float16': 'e', 'float32': 'f', 'float64': 'd'}[dtype] }", row))


def plain_decode(row: bytes, config: CompressionConfig) -> list[float]:
    """One position's log-probabilities, written from the format's description alone."""
    size = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

    def take(length: int) -> bytes:
        nonlocal row
        taken, row = row[:length], row[length:]
        return taken

    values = plain_numbers(take(config.exact_k * size[config.exact_dtype]), config.exact_dtype, config.exact_k)
    terms = config.polynomial_terms or ()
    coefficients = plain_numbers(take(len(terms) * size[config.term_dtype]), config.term_dtype, len(terms))
    fitted = []
    count = config.k - config.exact_k
    for rank in range(count):
        t = rank / (count - 1) if config.normalize_t and count > 1 else 0.0 if config.normalize_t else float(rank)
        shape = [{"sqrt": math.sqrt, "exp": math.exp}[x](t) if isinstance(x, str) else t**x for x in terms]
        fitted.append(math.fsum(a * b for a, b in zip(shape, coefficients, strict=True)))
    at = 0
    for part in config.residual_bins:
        scale = plain_numbers(take(size[part.scale_dtype]), part.scale_dtype, 1)[0]
        packed = take(math.ceil(part.element_bits * part.num_elements / 8))
        for q in plain_unpack(packed, part.element_bits, part.num_elements):
            fitted[at] += (2 * q - 1 if part.element_bits == 1 else q - 2 ** (part.element_bits - 1)) * scale
            at += 1
    assert row == b"", "nothing is left"
    values += fitted
    if config.delta_encoding:
        values = [math.fsum(values[: i + 1]) for i in range(len(values))]
    return values
