"""The harness's own `hf`, with a model that is loaded here, on one device.

Loading is `ddk.student`'s: safetensors alone, every weight there and finite, and the attention that computes what the
model is. Besides that, the harness is told two things: to normalise in float32, whatever the weights' dtype (its option
`softmax_dtype`), and how many requests make a batch. By itself it takes a fixed number, or finds one out by running out
of memory, for logits at every position; here a batch is bounded by its tokens and by the logits that are judged.

Imports the harness; import this module within functions only.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ddk.student import head_rows, load_student
from ddk.train_config import StudentConfig
from tasks.evaluation.harness_model import Asked, checked_tokenizer
from tasks.planning.store_plan import vocabulary

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 32_768
"""Of one forward pass, padding included."""
LOGITS_BYTES = 2**30
"""Float32 logits that are kept of one forward pass, at most."""
ONE_THREAD_PARAMETERS = 50_000_000
"""Below, threads on a CPU wait for each other longer than they compute, and on a busy machine thirty times as long."""
WINDOWS = 4096
"""Of whole texts, that are sorted by length and put into batches together."""

Request = tuple[Any, list[int], list[int]]
"""Texts, tokens of the context, tokens of the continuation."""


class TransformersModel(Asked, HFLM):  # type: ignore[misc]
    """One model on one device.

    Args:
        config: which one.
        tokenizer: folder of its tokenizer.
        dtype: of the weights and the forward pass.
        device: of torch.
        field: of the configuration that names it, for messages.
        on_progress: hears how many requests were answered since its last call.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(
        self,
        config: StudentConfig,
        *,
        tokenizer: str,
        dtype: torch.dtype,
        device: str,
        field: str,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        checked = checked_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code)
        model: Any = load_student(config, vocabulary(checked)[1], dtype=dtype, field=field)
        super().__init__(
            model.to(device), backend="causal", tokenizer=checked, softmax_dtype="float32", batch_size=WINDOWS
        )
        self.longest_judged = self.max_length
        self.report_to(on_progress)
        # A limit in the model's folder would go before the task's, and without an end each text would go on up to it.
        model.generation_config.max_new_tokens = None
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = self.eot_token_id
        self._threads = torch.get_num_threads()
        if device == "cpu" and model.num_parameters() < ONE_THREAD_PARAMETERS:
            torch.set_num_threads(1)
        self._batch_tokens = CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._rows = head_rows(model) or self.vocab_size
        self._batch = (0, 0)
        """Requests of the batch that is being filled, and the place behind its last."""
        self._kept = 0
        """Last positions of that batch whose logits are judged."""

    def close(self) -> None:
        """Free the model's memory."""
        torch.set_num_threads(self._threads)
        del self._model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        bounded = [self._bounded(*request.args) for request in requests]
        longest = max(
            (len(self.tok_encode(prompt)) + options["max_gen_toks"] for prompt, options in bounded), default=1
        )
        self.batch_size_per_gpu = max(1, self._batch_tokens // min(longest, self.max_length))
        try:
            return super().generate_until(requests)
        finally:
            self.batch_size_per_gpu = WINDOWS

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        # Requests that are equal up to their last token share a forward pass. Of those that are split at several places
        # the harness (0.4.13) would take wrong positions, all but the first time.
        splits = {(tuple(context + continuation[:-1]), len(continuation)) for _, context, continuation in requests}
        self.logits_cache = len(splits) == len({tokens for tokens, _ in splits})
        # Told 'auto', the harness asks `_batch_scheduler`.
        self.batch_size_per_gpu = "auto"
        try:
            return super()._loglikelihood_tokens(requests)
        finally:
            self.batch_size_per_gpu = WINDOWS

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Request]) -> int:
        """The harness asks at every request, how many belong into the batch that it goes into."""
        if pos in (0, self._batch[1]):
            count, self._kept = self._fitting(n_reordered_requests, pos)
            self._batch = (count, pos + count)
        return self._batch[0]

    def _fitting(self, requests: Sequence[Request], first: int) -> tuple[int, int]:
        """How many from the first on, which is the longest, and the last positions of them all that are judged."""
        count, kept, longest = 0, 0, self._inputs(requests[first])
        for request in requests[first:]:
            # Padding stands behind, so of all rows those positions are kept that reach from the first to the last.
            more = max(kept, longest - self._inputs(request) + len(request[2])) if self._keeps_logits else longest
            full = (count + 1) * longest > self._batch_tokens or 4 * (count + 1) * more * self._rows > LOGITS_BYTES
            if count and full:
                break
            count, kept = count + 1, more
        return count, kept

    def _inputs(self, request: Request) -> int:
        """Nothing is predicted from the last token."""
        return min(len(request[1]) + len(request[2]) - 1, int(self.max_length))

    @torch.no_grad()
    def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
        """Logits [B, positions, V] at the last positions; the harness counts from behind where some are missing."""
        keep = {"logits_to_keep": self._kept} if self._keeps_logits else {}
        logits: Tensor = self.model(inps, use_cache=False, **keep).logits
        return logits
