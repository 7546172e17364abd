"""Rows with a teacher's predictions, as somebody else may have written them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.exchange.distillkit import CompressionConfig, encode

V = 4090
"""Of the quickstart's tokenizer."""


def tokenizer_folder(teacher_folder: str, folder: Path) -> str:
    """A model's folder with its tokenizer and nothing else: no weights, no config."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(teacher_folder) / name, folder / name)
    return str(folder)


def topk_rows(lengths: list[int], k: int = 8, seed: int = 0, *, true_known: bool = True) -> list[dict[str, Any]]:
    """Rows of so many tokens. The true token is the second entry; the entries are a multiple of 7 apart.

    Args:
        true_known: whether the true token is among the entries, and there is a column that says so.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        tokens = rng.integers(0, V, length)
        first = rng.integers(0, V, length - 1)
        ids = (first[:, None] + 7 * np.arange(1, k + 1)) % V
        if true_known:
            # Shifted as a whole, so that ids stay distinct.
            ids = (ids - ids[:, 1:2] + tokens[1:, None]) % V
        logprobs = np.log(np.sort(rng.dirichlet(np.ones(k) * 0.5, length - 1) * 0.95 + 1e-4)[:, ::-1]).astype(
            np.float32
        )
        row = {"input_ids": tokens, "topk_ids": ids, "topk_logprobs": logprobs}
        if true_known:
            row["true_logprobs"] = logprobs[:, 1]
        rows.append(row)
    return rows


def write_topk(path: Path, rows: list[dict[str, Any]], row_group_size: int = 5) -> Path:
    columns = {name: pa.array([np.asarray(row[name]).tolist() for row in rows]) for name in rows[0]}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_distillkit(path: Path, rows: list[dict[str, Any]], config: CompressionConfig) -> Path:
    """The rows' predictions in DistillKit's bytes, with the configuration beside the file."""
    import yaml

    packed = []
    for row in rows:
        parts = encode(row["topk_logprobs"], row["topk_ids"], config)
        other = {name: row[name] for name in ("input_ids", "true_logprobs") if name in row}
        packed.append({**other, "compressed_logprobs": parts[0], "bytepacked_indices": parts[1]})
    (path.parent / "compression_config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return write_topk(path, packed)
