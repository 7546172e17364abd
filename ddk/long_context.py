"""What a model makes of long inputs: its loss at every position, and whether it writes what stands far behind.

One sequence goes through the model at a time, without a cache. Logits are made some positions at a time where they are
a projection of the hidden states, so that their memory does not grow with the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddk.structure import is_projection
from ddk.values import Int32Array

_ROWS = 512
"""Positions whose logits are there at once."""
Float64Array = npt.NDArray[np.float64]


class LongReader:
    """A causal language model that reads long inputs.

    Args:
        model: in evaluation mode, on its device.
        vocab_size: tokens; the model's rows beyond it are padding.
    """

    def __init__(self, model: Any, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._projected = is_projection(model)
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def losses(self, tokens_L1: Int32Array) -> Float64Array:
        """[L], −log-probability in nats of each token after the first."""
        labels_L = self._tensor(tokens_L1[1:])
        found, start = [], 0
        for logits_CV in self._logits(tokens_L1[:-1], 0):
            labels_C = labels_L[start : start + len(logits_CV)]
            found.append(torch.nn.functional.cross_entropy(logits_CV, labels_C, reduction="none").double())
            start += len(logits_CV)
        return torch.cat(found).cpu().numpy()

    @torch.no_grad()
    def would_write(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether the answer is what the model would write behind the prompt, taking the likeliest token each time."""
        tokens = np.array([*prompt, *answer], np.int32)
        likeliest = [logits_CV.argmax(-1) for logits_CV in self._logits(tokens[:-1], len(prompt) - 1)]
        return torch.cat(likeliest).tolist() == list(answer)

    def _logits(self, tokens_L: Int32Array, first: int) -> Iterator[Tensor]:
        """[C, V] float32 each, of the positions from `first` on."""
        tokens = self._tensor(tokens_L)[None]
        if not self._projected:
            logits_LV = self._model(input_ids=tokens, use_cache=False).logits[0, first:, : self._vocab_size]
            yield from (part.float() for part in logits_LV.split(_ROWS))
            return
        head = self._model.get_output_embeddings()
        weight = head.weight[: self._vocab_size]
        bias = None if head.bias is None else head.bias[: self._vocab_size]
        hidden_LD = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, first:]
        for part in hidden_LD.split(_ROWS):
            yield torch.nn.functional.linear(part, weight, bias).float()

    def _tensor(self, tokens: Int32Array) -> Tensor:
        return torch.from_numpy(tokens.astype(np.int64)).to(self._device)


def position_edges(trained: int, longest: int) -> list[int]:
    """Where stretches of positions begin and end: 0, the trained length and its doubles, up to the longest input.

    Example: trained at 256, read to 2,000: [0, 256, 512, 1024, 2000].
    """
    edges = [0]
    while (edge := trained * 2 ** (len(edges) - 1)) < longest:
        edges.append(edge)
    return [*edges, longest]


def mean_perplexity(losses_NL: Float64Array, first: int, last: int) -> tuple[float, float | None]:
    """exp of the mean loss over the positions from `first` up to `last`, and its standard error over the sequences.

    The error is that of the mean of the sequences' mean losses, times the perplexity; None of a single sequence.
    """
    each_N = losses_NL[:, first:last].mean(axis=1)
    mean = float(each_N.mean())
    ppl = math.inf if mean > 709.0 else math.exp(mean)
    if len(each_N) < 2:
        return ppl, None
    return ppl, ppl * float(each_N.std(ddof=1)) / math.sqrt(len(each_N))
