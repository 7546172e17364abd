"""Scores and selections, written as the stage writes them and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from storage.errors import StoreDamagedError, StoreMissingError
from storage.fingerprint import fingerprint
from storage.selections import open_scores, open_selection
from storage.stores.layout import Kind
from storage.stores.manifest import StoreWriter

DIMS = {"seq_len": 7, "vocab_size": 20, "shard_blocks": 4}


def write(tmp_path: Path, kind: Kind, dims: dict[str, int], **arrays: np.ndarray[Any, Any]) -> str:
    inputs = {"kind": kind, "of": "test"}
    url = f"{tmp_path}/{kind}/{fingerprint(inputs)}/math.zarr"
    writer = StoreWriter(url, kind, inputs, dims)
    for number, first in enumerate(range(0, len(next(iter(arrays.values()))), 4)):
        writer.write_shard("train", number, {name: array[first : first + 4] for name, array in arrays.items()})
    writer.finish()
    return url


def test_a_selection_comes_back_as_it_was_written(tmp_path: Path) -> None:
    indices, scores = np.array([1, 3, 4, 8, 9, 11], dtype=np.int32), np.linspace(-1, 1, 6, dtype=np.float32)
    url = write(tmp_path, "selections", DIMS, indices=indices, scores=scores)
    found, by = open_selection(url).read()
    assert found.tolist() == indices.tolist()
    assert by.tolist() == scores.tolist()
    assert len(open_selection(url)) == 6
    group = zarr.open_group(url, mode="r")
    assert np.asarray(group["train/indices"]).tolist() == indices.tolist(), "any reader of Zarr opens it"
    assert group["validation/indices"].shape == (0,)


def test_scores_have_a_column_for_each_model(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).random((9, 3)).astype(np.float32)
    url = write(tmp_path, "scores", {**DIMS, "models": 3}, losses=losses)
    assert (open_scores(url).read() == losses).all()
    with pytest.raises(StoreMissingError, match="holds scores, not selections"):
        open_selection(url)


def test_indices_that_do_not_ascend_are_no_selection(tmp_path: Path) -> None:
    scores = np.zeros(3, dtype=np.float32)
    url = write(tmp_path, "selections", DIMS, indices=np.array([1, 1, 2], dtype=np.int32), scores=scores)
    with pytest.raises(StoreDamagedError, match=r"do not ascend.*ddk select"):
        open_selection(url).read()
