"""Two domains of random blocks with a random teacher, and a student to be trained on them in moments."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from ddk.data import TrainData
from ddk.values import Mixture, SparseTargets

V, PADDED, L, K = 50, 64, 8, 5
SIZES = {"code": 9, "web": 14}
MIXTURE = Mixture(probabilities={"code": 0.6, "web": 0.4})


class Blocks:
    def __init__(self, size: int, seed: int, tokens: np.ndarray | None = None) -> None:
        random = np.random.default_rng(seed)
        self.tokens = random.integers(0, V, (size, L + 1), dtype=np.int32) if tokens is None else tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, indices) -> np.ndarray:
        return self.tokens[np.asarray(indices)]


class Targets:
    """A random teacher over all V tokens; `dense` is the whole, `read` its K most probable entries."""

    k = K
    vocab_size = V

    def __init__(self, size: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        dense = torch.from_numpy(2.0 * random.standard_normal((size, L, V))).log_softmax(-1)
        self.dense = dense.numpy()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.dense)

    def read(self, indices) -> SparseTargets:
        self.reads += 1
        dense = self.dense[np.asarray(indices)]
        ids = np.argsort(-dense, -1)[..., :K]
        kept = np.take_along_axis(dense, ids, -1)
        return SparseTargets(
            ids_BLK=ids.astype(np.int32),
            logprobs_BLK=kept.astype(np.float32),
            tail_mass_BL=(1 - np.exp(kept).sum(-1)).astype(np.float32),
            true_logprobs_BL=np.zeros(ids.shape[:2], np.float32),
        )


def train_data(targets: bool = True, sizes: dict[str, int] = SIZES) -> TrainData:
    return TrainData(
        blocks={domain: Blocks(size, number) for number, (domain, size) in enumerate(sizes.items())},
        targets={domain: Targets(size, 7 + number) for number, (domain, size) in enumerate(sizes.items())}
        if targets
        else None,
    )


def tiny_model(tied: bool = False, dropout: float = 0.0, seed: int = 0, hidden: int = 32) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=PADDED,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            attention_dropout=dropout,
            initializer_range=0.1,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
