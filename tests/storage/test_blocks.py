"""Which positions of a block carry loss, and the teacher's perplexity over these alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ddk.data import MarkedBlocks
from ddk.values import SparseTargets
from storage import targets as storage_targets
from storage.blocks import open_blocks
from storage.checking.verify_store import uncommit, verify
from storage.errors import StoreDamagedError, StoreMissingError
from storage.files import uri
from storage.fingerprint import fingerprint
from storage.stores.codec import CodecConfig, TargetFormat
from storage.stores.manifest import StoreWriter, read_manifest
from storage.targets import TargetWriter, teacher_perplexity

DIMS = {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4}
MARKED = {**DIMS, "marked": 1}
TARGET_DIMS = {**DIMS, "k": 3}
INPUTS = {"corpus": "chat"}


def marks(blocks: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (blocks, 7)).astype(np.uint8)


@pytest.fixture
def content(maker) -> dict[str, dict[str, np.ndarray]]:
    return {
        "train": {**maker.arrays("blocks", DIMS, 10), "loss": marks(10)},
        "validation": {**maker.arrays("blocks", DIMS, 5, seed=1), "loss": marks(5, 1)},
    }


@pytest.fixture
def marked(place: str, maker, content) -> str:
    maker.write(f"{place}/blocks", "blocks", MARKED, content, **INPUTS)
    return f"{place}/blocks"


def test_a_position_counts_as_the_token_that_it_predicts(marked: str, content) -> None:
    for split, arrays in content.items():
        view = open_blocks(marked, split)
        assert isinstance(view, MarkedBlocks)
        assert view.marked
        for indices in ([3], [4, 0, 4], range(len(view)), np.array([], dtype=np.int64)):
            chosen = np.asarray(indices, dtype=np.int64)
            mask = view.loss_mask(indices)
            assert mask is not None
            assert (mask.dtype, mask.shape) == (np.bool_, (len(chosen), 6))
            for row, block in enumerate(chosen):
                for position in range(6):
                    assert mask[row, position] == (arrays["loss"][block, position + 1] == 1)
            np.testing.assert_array_equal(view.read(indices), arrays["tokens"][chosen], strict=True)


def test_blocks_without_marks_have_no_mask(tmp_path: Path, maker) -> None:
    arrays = maker.arrays("blocks", DIMS, 2)
    maker.write(f"{tmp_path}/a", "blocks", DIMS, {"train": arrays, "validation": arrays})
    view = open_blocks(f"{tmp_path}/a")
    assert not view.marked
    assert view.loss_mask([0, 1]) is None


def test_a_shard_without_its_marks_is_refused(tmp_path: Path, content) -> None:
    writer = StoreWriter(f"{tmp_path}/a", "blocks", INPUTS, MARKED)
    with pytest.raises(ValueError, match=r"a shard takes \['tokens', 'loss'\]"):
        writer.write_shard("train", 0, {"tokens": content["train"]["tokens"][:4]})


# Damage


def test_a_damaged_mark_is_named_and_made_again(marked: str, maker, content) -> None:
    path = f"{marked}/train/loss/c/1/0"
    whole = uri.read_bytes(path)
    assert whole is not None
    uri.write_bytes(path, whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])
    view = open_blocks(marked)
    with pytest.raises(StoreDamagedError, match=r"array 'train/loss' is damaged in shard 1 .*`ddk pack` make it anew"):
        view.loss_mask([4])
    np.testing.assert_array_equal(view.read([4]), content["train"]["tokens"][[4]])
    manifest = read_manifest(marked)
    assert manifest is not None
    damages = verify(marked, manifest, full=True)
    assert [(damage.split, damage.shard, damage.path) for damage in damages] == [("train", 1, "train/loss/c/1/0")]
    assert uncommit(marked, manifest, damages) == {"train": [1, 2]}
    assert uri.size_of(f"{marked}/train/tokens/c/1/0") is None
    writer = StoreWriter(marked, "blocks", INPUTS, MARKED)
    assert maker.write_shards(writer, content) == [("train", 1), ("train", 2)]
    after = writer.finish({"seconds": 1.5})
    assert after == manifest
    assert verify(marked, after, full=True) == []
    assert uri.read_bytes(path) == whole


# The teacher's perplexity


IN_PROMPT = marks(5, 1)[:, 1:] == 0
"""Positions [5, 6] of the validation blocks."""


def write_targets(url: str, codec: str = "exact", in_prompt: float = 0.0, **inputs: str) -> np.ndarray:
    """Targets of ten train and five validation blocks; returns the latter's log-probabilities of the true tokens.

    Args:
        in_prompt: what these are where the true token is a prompt's.
    """
    form = TargetFormat(codec=CodecConfig(name=codec), entropy=False, draws=0, temperatures=())
    writer = TargetWriter(url, inputs, TARGET_DIMS, form)
    true = -np.random.default_rng(0).exponential(2.0, (5, 6)).astype(np.float32)
    true[IN_PROMPT] = in_prompt
    for split, true_BL in (("train", np.zeros((10, 6), np.float32)), ("validation", true)):
        for shard, first in enumerate(range(0, len(true_BL), 4)):
            part = true_BL[first : first + 4]
            targets = SparseTargets(
                ids_BLK=np.broadcast_to(np.arange(3, dtype=np.int32), (*part.shape, 3)),
                logprobs_BLK=np.broadcast_to(np.log(np.float32([0.5, 0.3, 0.1])), (*part.shape, 3)),
                tail_mass_BL=np.full(part.shape, 0.1, np.float32),
                true_logprobs_BL=part,
            )
            writer.write_shard(split, shard, targets)
    writer.finish()
    return true


@pytest.mark.parametrize(("codec", "rel"), [("exact", 1e-12), ("compact", 1e-3)])
@pytest.mark.parametrize("in_prompt", [0.0, -50.0, -np.inf, np.nan])
def test_the_teachers_perplexity_leaves_prompts_out(
    marked: str, place: str, codec: str, rel: float, in_prompt: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = write_targets(f"{place}/targets", codec, in_prompt, blocks=fingerprint(INPUTS))
    counted = [float(t) for t, prompt in zip(true.ravel(), IN_PROMPT.ravel(), strict=True) if not prompt]
    assert 0 < len(counted) < true.size
    expected = pytest.approx(math.exp(-math.fsum(counted) / len(counted)), rel=rel)
    assert teacher_perplexity(f"{place}/targets", marked) == expected
    monkeypatch.setattr(storage_targets, "_BLOCKS_AT_ONCE", 2)
    assert teacher_perplexity(f"{place}/targets", marked) == expected


def test_without_blocks_every_position_counts(marked: str, place: str) -> None:
    true = write_targets(f"{place}/targets")
    everywhere = math.exp(-float(true.mean(dtype=np.float64)))
    assert teacher_perplexity(f"{place}/targets") == pytest.approx(everywhere, rel=1e-12)
    assert teacher_perplexity(f"{place}/targets", marked) > 1.1 * everywhere


def test_a_true_token_that_counts_must_be_known(marked: str, place: str, maker, content) -> None:
    write_targets(f"{place}/targets", in_prompt=np.nan)
    assert math.isfinite(teacher_perplexity(f"{place}/targets", marked))
    everything = {split: {**arrays, "loss": np.ones_like(arrays["loss"])} for split, arrays in content.items()}
    maker.write(f"{place}/everything", "blocks", MARKED, everything)
    for blocks in (None, f"{place}/everything"):
        with pytest.raises(StoreMissingError, match="do not give the probability of every true token"):
            teacher_perplexity(f"{place}/targets", blocks)


def test_blocks_without_marks_change_nothing(tmp_path: Path, maker) -> None:
    arrays = maker.arrays("blocks", DIMS, 5)
    maker.write(f"{tmp_path}/blocks", "blocks", DIMS, {"train": arrays, "validation": arrays})
    write_targets(f"{tmp_path}/targets")
    assert teacher_perplexity(f"{tmp_path}/targets", f"{tmp_path}/blocks") == teacher_perplexity(f"{tmp_path}/targets")


def test_blocks_of_something_else_are_refused(marked: str, place: str, maker, content) -> None:
    write_targets(f"{place}/other", blocks="0123456789abcdef")
    with pytest.raises(StoreMissingError, match=r"other are not of the blocks at .*; correct the URL of the blocks"):
        teacher_perplexity(f"{place}/other", marked)
    write_targets(f"{place}/targets")
    fewer = {"train": content["train"], "validation": content["train"]}
    maker.write(f"{place}/fewer", "blocks", MARKED, fewer)
    with pytest.raises(StoreMissingError, match=r"targets are not of the blocks at .*fewer; correct"):
        teacher_perplexity(f"{place}/targets", f"{place}/fewer")
    with pytest.raises(StoreMissingError, match=r"there is no store at .*nowhere; run `ddk pack` first"):
        teacher_perplexity(f"{place}/targets", f"{place}/nowhere")
