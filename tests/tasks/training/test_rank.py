"""One rank's part of a training, where it cannot write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ddk import saving
from tasks.training.rank import RankTraining


class FullError(BaseException):
    """As torch's `CheckpointException`, which is no `Exception`."""


def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(trainer: Any, folder: str) -> None:
        os.makedirs(folder)
        Path(folder, "half").write_bytes(b"of it")
        raise FullError

    monkeypatch.setattr(saving, "save", save)
    training = object.__new__(RankTraining)
    training._trainer = None  # type: ignore[assignment]
    with pytest.raises(FullError):
        training._write_part(str(tmp_path / "rank-00000.safetensors.ab.tmp"))
    assert list(tmp_path.iterdir()) == []
