"""DistillKit's byte format, against a bit unpacker in plain Python and NumPy's own least squares in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_distillkit import plain_decode, plain_unpack
from pydantic import ValidationError

from storage.exchange.distillkit import CompressionConfig, decode, documented, encode, pack_bits, unpack_bits

QWEN = 152_064
PUBLISHED = CompressionConfig(
    d=151_936, k=128, exact_k=32, exact_dtype="float32", polynomial_terms=(0, 1, 2), delta_encoding=True
)


def positions(count: int, config: CompressionConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities as a model has them, and ids that reach the end of the vocabulary."""
    rng = np.random.default_rng(seed)
    steps = rng.exponential(0.6, (count, config.k)) / np.sqrt(np.arange(1, config.k + 1))
    logprobs = (-np.cumsum(steps, axis=1)).astype(np.float32)
    ids = np.stack([rng.choice(config.d, config.k, replace=False) for _ in range(count)]).astype(np.int32)
    ids[:, 0] = config.d - 1 - np.arange(count) % min(config.d, 7)
    return logprobs, ids


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 64), count=st.integers(1, 20), data=st.data())
def test_bits_are_packed_as_plain_python_unpacks_them(bits: int, count: int, data: st.DataObject) -> None:
    numbers = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    rows = data.draw(st.lists(numbers, min_size=1, max_size=4))
    packed = pack_bits(np.array(rows, dtype=np.uint64), bits)
    assert packed.shape == (len(rows), math.ceil(bits * count / 8))
    assert [plain_unpack(row.tobytes(), bits, count) for row in packed] == rows
    assert unpack_bits(packed, bits, count).tolist() == rows


def test_the_worked_example() -> None:
    assert pack_bits(np.array([[1, 2, 3]], dtype=np.uint64), 3).tolist() == [[0b00101001, 0b10000000]]


@settings(deadline=None, max_examples=40)
@given(
    d=st.sampled_from([2, 3, 256, 257, 32_768, 65_536, 65_537, 131_072, 131_073, 151_665, QWEN]), seed=st.integers(0)
)
def test_ids_take_as_few_bits_as_the_vocabulary_needs(d: int, seed: int) -> None:
    k = min(d, 50)
    config = CompressionConfig(d=d, k=k, exact_k=k)
    logprobs, ids = positions(3, config, seed)
    _, packed = encode(logprobs, ids, config)
    assert config.id_bits == math.ceil(math.log2(d))
    assert [plain_unpack(row.tobytes(), config.id_bits, k) for row in packed] == ids.tolist()
    assert (decode(*encode(logprobs, ids, config), config)[1] == ids).all()


def test_ids_from_131072_on_are_not_taken_for_others() -> None:
    config = documented("k50", QWEN)
    logprobs, _ = positions(1, config)
    ids = np.arange(131_072 - 25, 131_072 + 25, dtype=np.int32)[None]
    assert config.id_bits == 18
    assert (decode(*encode(logprobs, ids, config), config)[1] == ids).all()


@st.composite
def configs(draw: st.DrawFn) -> CompressionConfig:
    number = st.sampled_from(["float16", "bfloat16", "float32", "float64"])
    k = draw(st.integers(1, 40))
    exact_k = draw(st.integers(0, k))
    terms = draw(st.lists(st.sampled_from([0, 1, 2, 3, "sqrt"]), max_size=4, unique=True))
    bins, left = [], k - exact_k
    while left and draw(st.booleans()):
        size = draw(st.integers(1, left))
        bins.append({"scale_dtype": draw(number), "element_bits": draw(st.integers(1, 16)), "num_elements": size})
        left -= size
    if exact_k < k and not bins:
        terms = terms or [0]
    return CompressionConfig.model_validate(
        {
            "d": draw(st.integers(max(k, 2), QWEN)),
            "k": k,
            "exact_k": exact_k,
            "exact_dtype": draw(number),
            "polynomial_terms": terms or None,
            "term_dtype": draw(number),
            "residual_bins": bins,
            "delta_encoding": draw(st.booleans()),
            "error_diffusion": draw(st.booleans()),
            "normalize_t": draw(st.booleans()),
        }
    )


@settings(deadline=None, max_examples=150)
@given(config=configs(), seed=st.integers(0, 2**32 - 1))
def test_every_configuration_is_read_as_its_description_says(config: CompressionConfig, seed: int) -> None:
    logprobs, ids = positions(3, config, seed)
    compressed, packed = encode(logprobs, ids, config)
    assert compressed.shape == (3, config.logprob_bytes)
    found, found_ids = decode(compressed, packed, config)
    assert (found_ids == ids).all()
    for row, values in zip(compressed, found, strict=True):
        expected = plain_decode(row.tobytes(), config)
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("config", [documented("k50", QWEN), documented("k128", QWEN)], ids=["k50", "k128"])
def test_the_fit_is_that_of_least_squares(config: CompressionConfig) -> None:
    logprobs, ids = positions(40, config, 3)
    found, _ = decode(*encode(logprobs, ids, config), config)
    t = np.arange(config.fitted, dtype=np.float64)
    basis = np.stack([np.sqrt(t) if term == "sqrt" else t**term for term in config.terms], axis=1)
    for values, decoded in zip(logprobs.astype(np.float64), found, strict=True):
        wanted = basis @ np.linalg.lstsq(basis, values[config.exact_k :], rcond=None)[0]
        # Coefficients are stored in float32; of k128 the terms reach 150 and cancel.
        np.testing.assert_allclose(decoded[config.exact_k :], wanted, atol=2e-4)
        np.testing.assert_allclose(decoded[: config.exact_k], values[: config.exact_k], rtol=2**-8)


def test_sizes_of_the_documented_configurations() -> None:
    def size(config: CompressionConfig) -> int:
        return config.logprob_bytes + config.id_bytes

    assert size(documented("k50", QWEN)) == 2 + 3 * 4 + 113
    assert size(documented("k128", QWEN)) == 16 * 2 + 6 * 4 + 288 == 344
    assert (PUBLISHED.logprob_bytes, PUBLISHED.id_bytes) == (32 * 4 + 3 * 4, 288)


def test_the_published_configuration_sums_differences() -> None:
    logprobs, ids = positions(20, PUBLISHED, 5)
    found, _ = decode(*encode(logprobs, ids, PUBLISHED), PUBLISHED)
    np.testing.assert_allclose(found[:, :32], logprobs[:, :32], atol=2e-5)
    differences = np.diff(logprobs.astype(np.float64), axis=1, prepend=0)[:, 32:]
    t = np.arange(96, dtype=np.float64)
    basis = np.stack([t**0, t, t**2], axis=1)
    fitted = (basis @ np.linalg.lstsq(basis, differences.T, rcond=None)[0]).T
    np.testing.assert_allclose(found[:, 32:], logprobs[:, 31:32] + np.cumsum(fitted, axis=1), atol=1e-4)


def test_error_diffusion_keeps_sums_of_differences_near() -> None:
    def at_the_end(*, carry: bool) -> float:
        config = CompressionConfig(d=QWEN, k=64, exact_k=64, exact_dtype="bfloat16", error_diffusion=carry)
        logprobs, ids = positions(50, config, 9)
        return float(np.abs(decode(*encode(logprobs, ids, config), config)[0] - logprobs)[:, -1].max())

    assert at_the_end(carry=True) < 0.1 * at_the_end(carry=False)


def test_residual_bins_leave_less_than_the_fit_alone() -> None:
    plain = documented("k50", QWEN)
    errors = []
    for bins in ([], [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 49}]):
        config = CompressionConfig.model_validate({**plain.model_dump(), "residual_bins": bins})
        logprobs, ids = positions(50, config, 11)
        errors.append(np.abs(decode(*encode(logprobs, ids, config), config)[0] - logprobs)[:, 1:].mean())
    assert errors[1] < 0.2 * errors[0]


def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    config = CompressionConfig(d=QWEN, k=1, exact_k=1, exact_dtype="bfloat16", delta_encoding=False)
    values = -np.random.default_rng(0).exponential(3.0, (5000, 1)).astype(np.float32)
    values[:3] = [[-1.00390625], [-1.01171875], [-0.0]]  # halfway between two, both ways
    found, _ = decode(*encode(values, np.zeros((5000, 1), dtype=np.int32), config), config)
    assert (found == torch.from_numpy(values).bfloat16().float().numpy()).all()


def test_many_positions_are_as_each_alone() -> None:
    config = documented("k50", 4090)
    logprobs, ids = positions(4096 + 3, config, 1)
    compressed, packed = encode(logprobs, ids, config)
    whole, _ = decode(compressed, packed, config)
    for i, j in pairwise([0, 1, 4095, 4096, 4099]):
        alone = encode(logprobs[i:j], ids[i:j], config)
        # Sums over another number of rows may differ in the last bit.
        np.testing.assert_allclose(decode(*alone, config)[0], whole[i:j], atol=1e-5)
        assert (alone[1] == packed[i:j]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5, "d": 4}, "k is 5, and d only 4"),
        ({"exact_k": 9}, "exact_k is 9, more than k"),
        ({"polynomial_terms": None}, "it takes polynomial_terms or residual_bins"),
        ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 7}]}, "more elements than"),
        ({"polynomial_terms": [-1]}, "greater than or equal to 0"),
        ({"exact_dtype": "int8"}, "Input should be 'float16'"),
        ({"residuals": []}, "Extra inputs are not permitted"),
    ],
)
def test_configurations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    plain = {"d": 100, "k": 8, "exact_k": 2, "polynomial_terms": [0, 1]}
    with pytest.raises(ValidationError, match=message):
        CompressionConfig.model_validate({**plain, **changes})


def test_what_cannot_be_encoded_or_decoded() -> None:
    config = documented("k50", 4090)
    logprobs, ids = positions(2, config)
    with pytest.raises(ValueError, match=r"must both be \[P, 50\]"):
        encode(logprobs[:, :49], ids[:, :49], config)
    with pytest.raises(ValueError, match="do not fit a vocabulary of 4090"):
        encode(logprobs, ids + 1, config)
    with pytest.raises(ValueError, match="in descending order"):
        encode(logprobs[:, ::-1], ids, config)
    with pytest.raises(ValueError, match="must be finite"):
        encode(np.where(logprobs < -3, -np.inf, logprobs), ids, config)
    compressed, packed = encode(logprobs, ids, config)
    with pytest.raises(ValueError, match=r"positions of 13 and 75 bytes, where the configuration gives 14 .* and 75"):
        decode(compressed[:, :-1], packed, config)
