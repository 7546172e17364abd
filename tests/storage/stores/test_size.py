"""What a store takes, before it is there: against stores that are really written, and the measured figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from repository import REPOSITORY

from ddk.values import SampledTokens, SparseTargets
from storage.stores import codec
from storage.stores.codec import CodecConfig, TargetFormat
from storage.stores.layout import array_specs, encode_shard
from storage.stores.manifest import StoreWriter
from storage.stores.size import expected_target_bytes, most_block_bytes, most_store_bytes
from storage.targets import TargetWriter

L, K, V = 64, 16, 5000
MEASURED = REPOSITORY / "benchmarks" / "out" / "capture.json"


def form(
    name: str = "compact", levels: int = 254, draws: int = 0, temperatures: tuple[float, ...] = ()
) -> TargetFormat:
    return TargetFormat(
        codec=CodecConfig(name=name, levels=levels),  # type: ignore[arg-type]
        entropy=True,
        draws=draws,
        temperatures=temperatures,
    )


def targets(blocks: int, of: TargetFormat, k: int = K, vocab: int = V, seed: int = 0) -> SparseTargets:
    """As hard to compress as it gets: even probabilities over ids spread evenly, and draws likewise."""
    random = np.random.default_rng(seed)
    shape = (blocks, L)
    ids = np.stack([random.choice(vocab, k, replace=False) for _ in range(blocks * L)]).reshape(*shape, k)
    p = random.random((*shape, k)) + 0.5
    p = -np.sort(-0.9 * p / p.sum(-1, keepdims=True), axis=-1)
    drawn = None
    if of.draws:
        drawn_ids = np.sort(np.stack([random.choice(vocab, of.draws, replace=False) for _ in range(blocks * L)]), -1)
        drawn = SampledTokens(
            ids_BLN=drawn_ids.reshape(*shape, of.draws).astype(np.int32),
            counts_BLN=np.ones((*shape, of.draws), np.int32),
        )
    return SparseTargets(
        ids_BLK=ids.astype(np.int32),
        logprobs_BLK=np.log(p).astype(np.float32),
        tail_mass_BL=np.float32(1) - p.sum(-1).astype(np.float32),
        true_logprobs_BL=-random.random(shape, np.float32) * 10,
        entropy_BL=random.random(shape, np.float32) * 5,
        sampled=drawn,
        tail_mass_at={t: random.random(shape, np.float32) for t in of.temperatures},
    )


def written_bytes(folder: Path) -> int:
    """Of all shards' objects."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "/c/" in str(path))


@pytest.mark.parametrize(
    "of",
    [
        form(),
        form(levels=1000),
        form("exact"),
        form(draws=8),
        form(draws=8, temperatures=(2.0,)),
        form("exact", draws=4),
    ],
    ids=str,
)
def test_no_store_is_larger_than_its_bound(tmp_path: Path, of: TargetFormat) -> None:
    url = tmp_path / "d.zarr"
    writer = TargetWriter(str(url), {}, {"seq_len": L, "vocab_size": V, "shard_blocks": 4, "k": K}, of)
    for shard in range(2):
        writer.write_shard("train", shard, targets(4, of, seed=shard))
    writer.write_shard("validation", 0, targets(3, of, seed=9))
    writer.finish()
    written = written_bytes(url)
    specs = array_specs("targets", {"seq_len": L, "k": K}, of)
    most = most_store_bytes(specs, (8, 3), 4)
    assert written <= most
    assert written > 0.3 * most, "the bound is of this store, and not of another"


@pytest.mark.parametrize(("blocks", "shard_blocks"), [(8, 8), (5, 8), (8, 4)])
def test_a_store_of_noise_takes_all_of_its_bound(tmp_path: Path, blocks: int, shard_blocks: int) -> None:
    dims = {"seq_len": L, "vocab_size": V, "shard_blocks": shard_blocks, "marked": 1}
    writer = StoreWriter(str(tmp_path / "d.zarr"), "blocks", {}, dims)
    random = np.random.default_rng(0)
    for shard, start in enumerate(range(0, blocks, shard_blocks)):
        rows = min(shard_blocks, blocks - start)
        tokens = random.integers(0, 2**31 - 1, (rows, L + 1), dtype=np.int32)
        noise = random.integers(0, 255, (rows, L + 1), dtype=np.uint8)
        writer.write_shard("train", shard, {"tokens": tokens, "loss": noise})
    writer.finish()
    most = most_store_bytes(array_specs("blocks", dims), (blocks, 0), shard_blocks)
    assert 0.97 * most < written_bytes(tmp_path) <= most


@pytest.mark.parametrize(
    ("k", "levels", "within"), [(32, 254, 0.03), (64, 254, 0.03), (50, 46, 0.03), (128, 390, 0.06)]
)
def test_what_is_expected_is_what_was_measured(k: int, levels: int, within: float) -> None:
    rows = {row["what"]: row["value"] for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]}
    measured = rows[f"k = {k}, {levels} levels: everything that is stored"]
    found = expected_target_bytes(form(levels=levels), seq_len=512, k=k, vocab_size=4090)
    assert found == pytest.approx(measured, rel=within)


def test_random_draws_are_expected_as_measured() -> None:
    rows = {row["what"]: row["value"] for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]}
    more, none = (expected_target_bytes(form(draws=d), seq_len=512, k=64, vocab_size=4090) for d in (50, 0))
    assert more - none == pytest.approx(rows["50 random draws"], rel=0.03)


@pytest.mark.parametrize(("vocab", "zipf"), [(32_000, False), (151_936, False), (151_936, True)])
def test_a_larger_vocabulary_takes_more_as_expected(vocab: int, zipf: bool) -> None:
    """By ids that spread evenly over the vocabulary, and by such as come from a tokenizer whose ids go by frequency."""
    sizes = {}
    for rows in (4090, vocab):
        random = np.random.default_rng(0)
        one = targets(4, form(), k=64, vocab=rows)
        if zipf:
            weights = -np.log(np.arange(rows) + 10.0)
            for place in np.ndindex(4, L):
                one.ids_BLK[place] = np.argpartition(-(weights + random.gumbel(size=rows)), 64)[:64]
        arrays, _ = codec.encode(one, form(), rows)
        specs = array_specs("targets", {"seq_len": L, "k": 64}, form())
        sizes[rows] = sum(len(encode_shard(spec, arrays[spec.name], 4)) for spec in specs) / (4 * L)
    small, large = (expected_target_bytes(form(), seq_len=512, k=64, vocab_size=rows) for rows in (4090, vocab))
    assert sizes[vocab] - sizes[4090] == pytest.approx(large - small, rel=0.4)
    assert large - small == pytest.approx(64 * np.log2(vocab / 4090) / 8)


def test_the_exact_codec_is_its_bound_and_nothing_is_above_it() -> None:
    for of, k, vocab in ((form("exact"), 64, 10**6), (form(), 1, 4090)):
        most = most_block_bytes(array_specs("targets", {"seq_len": 512, "k": k}, of)) / 512
        found = expected_target_bytes(of, seq_len=512, k=k, vocab_size=vocab)
        assert found == most if of.codec.name == "exact" else found <= most
