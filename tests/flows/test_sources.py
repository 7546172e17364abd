"""`ddk cache` with a source other than the default."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_run import Ddk, write_config

from storage.blocks import open_blocks
from storage.targets import open_targets


@pytest.mark.filterwarnings("default")  # vLLM's own warnings are not ours to mend
@pytest.mark.engine
def test_cache_by_prompt_logprobs(ddk: Ddk, tmp_path: Path, teacher_folder: str) -> None:
    """The quickstart's teacher, whose vocabulary is padded."""
    config = write_config(
        tmp_path,
        teacher={"source": "prompt_logprobs", "codec": {"name": "exact"}},
        domains={"code": None, "zh_books": None},
    )
    for stage in ("pack", "cache"):
        done = ddk(stage, config)
        assert done.code == 0, done.err
    assert "the probability of the other tokens is counted as tail" in done.err
    (blocks_url,) = (tmp_path / "root" / "blocks").glob("*/math.zarr")
    (targets_url,) = (tmp_path / "root" / "targets").glob("*/math.zarr")
    tokens = open_blocks(str(blocks_url), "validation").read(np.arange(2))
    stored = open_targets(str(targets_url), "validation").read(np.arange(2))
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits
    vocab_size = open_targets(str(targets_url), "validation").vocab_size
    assert logits.shape[-1] > vocab_size
    # The padding's probability is in vLLM's normaliser, and in this one.
    best = logits.double().log_softmax(-1)[..., :vocab_size].topk(stored.ids.shape[-1])
    assert (stored.ids == best.indices.numpy()).mean() >= 0.999
    np.testing.assert_allclose(stored.logprobs, best.values.numpy(), atol=1e-4, rtol=0)
