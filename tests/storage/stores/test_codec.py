"""What the codecs keep, what they lose, and that what they write is what they say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ddk.errors import UserError
from ddk.values import SampledTokens, SparseTargets
from storage.errors import StoreMissingError
from storage.stores import compact
from storage.stores.codec import PLAIN, CodecConfig, Distortion, TargetFormat, decode, divergences, encode
from storage.targets import TargetWriter, distortion, open_targets, teacher_perplexity


def make_targets(
    vocab: int, k: int, *, blocks: int = 2, positions: int = 7, seed: int = 0, scale: float = 3.0, **more: Any
) -> tuple[SparseTargets, np.ndarray]:
    """Targets of a random distribution, and that distribution's log-probabilities [B, L, V] in float64."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((blocks, positions, vocab)) * scale
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-log_p, axis=-1, kind="stable")[..., :k]
    kept = np.take_along_axis(log_p, ids, -1)
    true = rng.integers(0, vocab, (blocks, positions, 1))
    values: dict[str, Any] = {
        "ids_BLK": ids.astype(np.int32),
        "logprobs_BLK": kept.astype(np.float32),
        "tail_mass_BL": np.maximum(1 - np.exp(kept).sum(-1), 0.0).astype(np.float32),
        "true_logprobs_BL": np.take_along_axis(log_p, true, -1)[..., 0].astype(np.float32),
        "entropy_BL": -(np.exp(log_p) * log_p).sum(-1).astype(np.float32),
    }
    return SparseTargets(**(values | more)), log_p


def form_of(levels: int = 254, keep_mass: float = 1.0, **more: Any) -> TargetFormat:
    codec = CodecConfig(levels=levels, keep_mass=keep_mass)
    return TargetFormat(**({"codec": codec, "entropy": True, "draws": 0, "temperatures": ()} | more))


def check_shape_of(stored: SparseTargets) -> None:
    """What every reader may rely on."""
    kept = stored.logprobs > -np.inf
    assert (np.diff(kept.astype(int), axis=-1) <= 0).all(), "what is no entry lies behind the entries"
    assert (stored.ids[~kept] == 0).all()
    both = np.maximum(stored.logprobs, -1e30)
    assert (np.diff(both, axis=-1) <= 0).all(), "in descending order"
    assert all(len({*ids[flags]}) == flags.sum() for ids, flags in zip(_rows(stored.ids), _rows(kept), strict=True))
    mass = np.exp(stored.logprobs, dtype=np.float64).sum(-1) + stored.tail_mass
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from([2, 3, 100, 5000, 152_064]),
    st.integers(1, 200),
    st.sampled_from([16, 100, 254, 255, 4000]),
    st.sampled_from([1.0, 0.99, 0.5]),
    st.floats(0.0, 12.0),
    st.integers(0, 2**31),
)
@example(vocab=152_064, k=1, levels=4000, keep_mass=1.0, scale=0.0, seed=0)
def test_compact_targets_are_what_the_grid_allows(
    vocab: int, k: int, levels: int, keep_mass: float, scale: float, seed: int
) -> None:
    k = min(k, vocab)
    targets, _ = make_targets(vocab, k, seed=seed, scale=scale, blocks=1, positions=3)
    arrays, lost = encode(targets, form_of(levels, keep_mass), vocab)
    stored = decode(arrays, form_of(levels, keep_mass), k, vocab)
    check_shape_of(stored)
    assert lost is not None
    assert lost.largest >= 0.0
    for row in range(3):
        kept = stored.logprobs[0, row] > -np.inf
        assert kept[0], "no position loses everything"
        found = dict(zip(stored.ids[0, row][kept].tolist(), stored.logprobs[0, row][kept].tolist(), strict=True))
        given_p = dict(zip(targets.ids[0, row].tolist(), np.exp(targets.logprobs[0, row].astype(float)), strict=True))
        assert set(found) <= set(given_p)
        mass, stored_mass = sum(given_p[i] for i in found), sum(np.exp(log_q) for log_q in found.values())
        assert stored_mass == pytest.approx(1 - stored.tail_mass[0, row], abs=1e-5)
        # Not of 1 − tail: where little is kept, that is the difference of two numbers in float32.
        # √p of each kept token, as a share of what is kept, is off by half a step, and a little by renormalising.
        for i, log_q in found.items():
            share_q = np.exp(log_q) / stored_mass
            assert abs(np.sqrt(share_q) - np.sqrt(given_p[i] / mass)) < 1.5 / levels + np.sqrt(len(found)) / levels
        dropped = 1 - mass - targets.tail_mass[0, row]
        assert stored.tail_mass[0, row] == pytest.approx(targets.tail_mass[0, row] + dropped, abs=2e-3)
    np.testing.assert_allclose(stored.true_logprobs, np.maximum(targets.true_logprobs, -128), atol=1.01e-3)
    np.testing.assert_allclose(stored.entropy, targets.entropy, atol=4.1e-3)


def test_the_divergence_falls_with_the_square_of_the_levels() -> None:
    targets, _ = make_targets(4000, 64, positions=400)
    means = []
    for levels in (32, 64, 128, 254):
        lost = encode(targets, form_of(levels), 4000)[1]
        assert lost is not None
        means.append(lost.mean)
    assert means[0] > means[1] * 2.5 > means[2] * 6 > means[3] * 15
    assert means[3] < 5e-4


def test_the_divergence_is_that_of_the_full_distributions() -> None:
    """With the tail spread evenly in both, the divergence over all V tokens is the one over tokens and bucket."""
    vocab, k = 300, 20
    targets, _ = make_targets(vocab, k, blocks=1, positions=64)
    form = form_of(20, 0.9)
    arrays, lost = encode(targets, form, vocab)
    stored = decode(arrays, form, k, vocab)
    measured = divergences(targets, stored, vocab)[::16]
    assert lost is not None
    assert lost.count == 4
    assert lost.total == pytest.approx(measured.sum(), rel=1e-4), "what the encoder measures by itself"
    assert (stored.logprobs == -np.inf).any(), "something must have been dropped"
    for number, position in enumerate(range(0, 64, 16)):
        p, q = np.empty(vocab), np.empty(vocab)
        for dense, source in ((p, targets), (q, stored)):
            inside = source.logprobs[0, position] > -np.inf
            dense[:] = source.tail_mass[0, position] / (vocab - inside.sum())
            dense[source.ids[0, position][inside]] = np.exp(source.logprobs[0, position][inside].astype(float))
        assert measured[number] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4, abs=1e-7)


def test_percentiles_of_a_distortion_are_bounds_within_a_fifth() -> None:
    values = np.random.default_rng(0).lognormal(-8, 1.5, 5000)
    whole = Distortion.of(values[:2000]) + Distortion.from_json(Distortion.of(values[2000:]).as_json())
    assert whole.count == 5000
    assert whole.mean == pytest.approx(values.mean())
    for percent in (50, 90, 99):
        exact = np.percentile(values, percent)
        assert exact <= whole.percentile(percent) * 1.001
        assert whole.percentile(percent) < exact * 1.25
    assert whole.percentile(100) == values.max()


def test_entries_without_probability_are_no_entries() -> None:
    targets, _ = make_targets(50, 4, blocks=1, positions=3)
    targets.logprobs[0, 1, 2:] = -np.inf
    targets.logprobs[0, 2, :] = -np.inf
    targets.tail_mass[0, 2] = 1.0
    stored = decode(encode(targets, form_of(), 50)[0], form_of(), 4, 50)
    assert (stored.logprobs[0] > -np.inf).sum(-1).tolist() == [4, 2, 0]
    assert stored.tail_mass[0, 2] == 1.0


def test_an_unknown_true_token_stays_unknown() -> None:
    for form in (form_of(), form_of(codec=CodecConfig(name="exact"))):
        targets, _ = make_targets(50, 4)
        targets.true_logprobs[0, 3], targets.true_logprobs[1, 1] = np.nan, -np.inf
        stored = decode(encode(targets, form, 50)[0], form, 4, 50)
        assert np.isnan(stored.true_logprobs[0, 3])
        assert np.isnan(stored.true_logprobs).sum() == 1
        assert stored.true_logprobs[1, 1] < -127


@pytest.mark.parametrize("name", ["compact", "exact"])
def test_draws_and_further_tails_survive(name: str) -> None:
    vocab, k, draws = 3000, 8, 50
    rng = np.random.default_rng(1)
    ids, counts = np.zeros((2, 2, 7, draws), np.int32)
    for b, j in np.ndindex(2, 7):
        found, often = np.unique(rng.integers(0, rng.integers(1, vocab), draws), return_counts=True)
        ids[b, j, : len(found)], counts[b, j, : len(found)] = found, often
    _, log_p = make_targets(vocab, k)
    tails = {}
    for temperature in (0.5, 2.0):
        scaled = np.exp(log_p / temperature)
        scaled /= scaled.sum(-1, keepdims=True)
        tails[temperature] = (1 - -np.sort(-scaled, axis=-1)[..., :k].sum(-1)).astype(np.float32)
    sampled = SampledTokens(ids_BLN=ids, counts_BLN=counts)
    targets, _ = make_targets(vocab, k, sampled=sampled, tail_mass_at=tails)
    form = form_of(codec=CodecConfig(name=name), draws=draws, temperatures=(0.5, 2.0))
    stored = decode(encode(targets, form, vocab)[0], form, k, vocab)
    assert stored.sampled is not None
    np.testing.assert_array_equal(stored.sampled.ids_BLN, ids)
    np.testing.assert_array_equal(stored.sampled.counts_BLN, counts)
    for temperature, tail in tails.items():
        np.testing.assert_allclose(stored.tail_mass_at[temperature], tail, atol=2e-3)


def test_a_dropped_tokens_mass_is_in_the_tail_at_every_temperature() -> None:
    vocab, k = 400, 40
    targets, log_p = make_targets(vocab, k, positions=50)
    scaled = np.exp(log_p / 2.0)
    scaled /= scaled.sum(-1, keepdims=True)
    tail = 1 - np.take_along_axis(scaled, targets.ids.astype(np.int64), -1).sum(-1)
    targets = dataclasses.replace(targets, tail_mass_at={2.0: tail.astype(np.float32)})
    form = form_of(100, 0.8, temperatures=(2.0,))
    stored = decode(encode(targets, form, vocab)[0], form, k, vocab)
    kept = stored.logprobs > -np.inf
    outside = 1 - (np.take_along_axis(scaled, stored.ids.astype(np.int64), -1) * kept).sum(-1)
    assert kept.mean() < 0.8
    np.testing.assert_allclose(stored.tail_mass_at[2.0], outside, atol=2e-3)


def test_targets_of_another_form_are_refused() -> None:
    targets, _ = make_targets(50, 4)
    for form in (form_of(entropy=False), form_of(draws=5), form_of(temperatures=(2.0,)), PLAIN):
        with pytest.raises(ValueError, match="targets with"):
            encode(targets, form, 50)


# As a store


DIMS = {"seq_len": 7, "vocab_size": 152_064, "shard_blocks": 3, "k": 20}


def write(url: str, form: TargetFormat, blocks: int = 8) -> dict[str, SparseTargets]:
    writer, content = TargetWriter(url, {"x": 1}, DIMS, form), {}
    for split, count in (("train", blocks), ("validation", 2)):
        whole, _ = make_targets(DIMS["vocab_size"], DIMS["k"], blocks=count, seed=count)
        content[split] = whole
        for shard in range(-(-count // 3)):
            part = slice(3 * shard, 3 * shard + 3)
            names = ("ids_BLK", "logprobs_BLK", "tail_mass_BL", "true_logprobs_BL", "entropy_BL")
            writer.write_shard(split, shard, SparseTargets(**{n: getattr(whole, n)[part] for n in names}))
    writer.finish()
    return content


@pytest.mark.parametrize("name", ["compact", "exact"])
def test_a_store_gives_back_what_was_written(place: str, name: str) -> None:
    content = write(place, form_of(codec=CodecConfig(name=name)))
    for split, whole in content.items():
        view = open_targets(place, split)
        for indices in ([0], [len(whole) - 1, 0], range(len(whole)), np.array([1, 1, 0])):
            read = view.read(indices)
            check_shape_of(read)
            chosen = whole.logprobs[np.asarray(indices)]
            atol = 0.0 if name == "exact" else 0.35
            likely = chosen > -3
            np.testing.assert_allclose(read.logprobs[likely], chosen[likely], atol=atol)
            np.testing.assert_array_equal(view.true_logprobs(indices), read.true_logprobs)
    exact = np.exp(-content["validation"].true_logprobs.astype(np.float64).mean())
    assert teacher_perplexity(place) == pytest.approx(exact, rel=1e-12), "from the sums, not from what was rounded"


def test_any_zarr_reader_with_the_documented_decode_gets_the_numbers(tmp_path: Any) -> None:
    """The decode of `storage.stores.compact`'s docstring, token by token, on arrays that Zarr itself reads."""
    url = f"{tmp_path}/a.zarr"
    write(url, form_of(100, 0.95))
    group = zarr.open_group(url, mode="r")["train"]
    scalars, deltas, codes = (group[name][:] for name in ("scalars", "id_deltas", "codes"))
    read = open_targets(url).read(range(8))
    for block in range(8):
        at = 0
        for position in range(7):
            kept, tail, true, entropy = (int(scalars[block, row, position]) for row in range(4))
            tail_mass = np.sin(tail * np.pi / 2 / 1023) ** 2
            ids, token = [], -1
            for delta in deltas[block, at : at + kept].tolist():
                token += delta + 1
                ids.append(token)
            squares = codes[block, at : at + kept].astype(float) ** 2
            expected = dict(zip(ids, np.log((1 - tail_mass) * squares / squares.sum()), strict=True))
            at += kept
            got = read.logprobs[block, position]
            found = dict(zip(read.ids[block, position].tolist(), got, strict=True)) if kept == 20 else None
            found = found or dict(zip(read.ids[block, position][:kept].tolist(), got[:kept], strict=True))
            assert found == pytest.approx(expected, abs=1e-5)
            assert read.true_logprobs[block, position] == pytest.approx(-true / 512)
            assert read.entropy is not None
            assert read.entropy[block, position] == pytest.approx(entropy / 128)
        assert not deltas[block, at:].any()
        assert not codes[block, at:].any()


def test_a_store_says_what_it_lost(tmp_path: Any) -> None:
    url = f"{tmp_path}/a.zarr"
    write(url, form_of(64))
    lost = distortion(open_targets(url).manifest)
    assert lost is not None
    assert lost.count == 8 + 2, "every 16th position of a block, so one of these short ones"
    assert 0 < lost.mean < lost.percentile(99) <= lost.largest
    write(f"{tmp_path}/b.zarr", form_of(codec=CodecConfig(name="exact")))
    assert distortion(open_targets(f"{tmp_path}/b.zarr").manifest) is None


def test_a_teacher_whose_perplexity_is_unknown_is_not_guessed(tmp_path: Any) -> None:
    url = f"{tmp_path}/a.zarr"
    writer = TargetWriter(url, {}, DIMS, form_of())
    targets, _ = make_targets(DIMS["vocab_size"], DIMS["k"])
    writer.write_shard("train", 0, targets)
    targets.true_logprobs[0, 0] = np.nan
    writer.write_shard("validation", 0, targets)
    writer.finish()
    with pytest.raises(StoreMissingError, match="do not give the probability of every true token"):
        teacher_perplexity(url)


def test_more_kept_tokens_than_can_be_counted_are_refused() -> None:
    assert compact.MOST_KEPT == 65534
    with pytest.raises(ValueError, match="at most 65,534 tokens a position"):
        form_of().check(k=70_000)
    form_of(codec=CodecConfig(name="exact")).check(k=70_000)
    with pytest.raises(UserError, match=r"lower teacher\.k, or set teacher\.codec\.name: exact"):
        TargetWriter("unused", {}, {**DIMS, "k": 70_000}, form_of())
