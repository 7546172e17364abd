"""The teacher by vLLM's public interface alone: an engine of our own, asked for prompt log-probabilities.

`tasks.teachers.engine_teacher` is faster and gives more, but depends on vLLM's internals. This source uses only what
vLLM documents, so it survives internal changes and can be used to check the other source. A shard is captured so:

1. Each block becomes one request: its first L tokens as the prompt, `prompt_logprobs` for the positions 0 to L − 2.
2. The last position is the one token that the request generates. `allowed_token_ids` leaves it only the block's last
   token to choose, and raw log-probabilities are those from before that choice; so its true token's value and its k
   most probable tokens are exact like all others. (With the whole block as the prompt it would be a prompt position
   too, but vLLM wants room for one generated token behind the prompt, and a block as long as the model's context,
   which every other source takes, would leave none.)
3. The answers are flat lists (`flat_logprobs`), never an object a token, and nothing is detokenised: with either, this
   path is five times slower. The blocks are run in groups, so that these lists stay below some hundred MB; a group
   runs while the one before is turned into arrays.

What it cannot do, and `source: engine` can: random draws, tails at other temperatures, the entropy, exact small tails,
leaving out the probability of padded rows (see `tasks.teachers.prompt_logprobs` for both), equal bytes at every capture
(what runs together depends on timing, so the last digits may differ), and smaller steps after running out of memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ddk.values import Int32Array, SparseTargets
from tasks.teachers.config import TeacherConfig, model_rows
from tasks.teachers.prompt_logprobs import Rows, assemble, entries_to_ask, flat_rows, stacked, warn_of_padding
from tasks.teachers.source import TeacherSource
from tasks.teachers.vllm_engine import Engine

LOGITS_BYTES = 2 * 2**30
"""Float32 logits of one request's part of a step. vLLM makes them whole and outside what it reserves memory for."""
GROUP_ENTRIES = 4 * 2**20
"""Entries of a group of blocks; each takes about 100 bytes until it is in an array."""


class PortableTeacher(TeacherSource):
    """An engine that starts at the first capture and lives to the end of the `with`, as `VllmTeacher` does.

    Arguments and errors are those of every source.
    """

    name = "prompt_logprobs"
    start_seconds = 0.0
    """What starting the engine took; no part of the time of a capture."""

    def __init__(self, config: TeacherConfig, *, seq_len: int, vocab_size: int) -> None:
        super().__init__(config, seq_len=seq_len, vocab_size=vocab_size)
        self._rows = model_rows(config) or vocab_size
        self._asked = entries_to_ask(config.k, vocab_size, self._rows)
        self._engine: Engine | None = None

    def close(self) -> None:
        """End the engine's processes and free its memory. Harmless when called twice."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        """The teacher's targets at every position of some blocks.

        Args:
            tokens_BL1: [B, L + 1] int32, at most `shard_blocks` blocks.

        Raises:
            LostPartError: a process of the engine was killed.
            RuntimeError: the engine's answer lacks a position (nothing is returned then).
        """
        if self._engine is None:
            began = time.monotonic()
            self._start()
            self.start_seconds += time.monotonic() - began
        group = max(1, GROUP_ENTRIES // (self.seq_len * (self._asked + 1)))
        groups = [tokens_BL1[first : first + group] for first in range(0, len(tokens_BL1), group)]
        rows: list[Rows] = []
        with _no_garbage_collection():
            self._enqueue(groups[0])
            for i in range(len(groups)):
                outputs = self._running.run(lambda llm: llm.wait_for_completion(use_tqdm=False))
                if i + 1 < len(groups):
                    self._enqueue(groups[i + 1])
                rows += [self._rows_of(output, tokens) for output, tokens in zip(outputs, groups[i], strict=True)]
        return assemble(stacked(rows), blocks=len(tokens_BL1), k=self.config.k, vocab_size=self.vocab_size)

    def _start(self) -> None:
        warn_of_padding("prompt_logprobs", self.vocab_size, self._rows)
        step = min(self.config.max_batch_tokens, LOGITS_BYTES // (4 * self._rows))
        self._engine = Engine.for_capture(
            self.config,
            seq_len=self.seq_len,
            max_num_batched_tokens=step,
            max_logprobs=self._asked,
            logprobs_mode="raw_logprobs",
        )

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the engine is not running")
        return self._engine

    def _enqueue(self, tokens_GL1: Int32Array) -> None:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                allowed_token_ids=[label],
                ignore_eos=True,
                prompt_logprobs=self._asked,
                logprobs=self._asked,
                flat_logprobs=True,
                detokenize=False,
            )
            for label in tokens_GL1[:, -1].tolist()
        ]
        prompts = [{"prompt_token_ids": row} for row in tokens_GL1[:, :-1].tolist()]
        self._running.run(lambda llm: llm.enqueue(prompts, parameters, use_tqdm=False))

    def _rows_of(self, output: Any, tokens_L1: Int32Array) -> Rows:
        # Nothing predicts the prompt's first token: its place is there, and empty.
        parts = ((output.prompt_logprobs, 1, tokens_L1[1:-1]), (output.outputs[0].logprobs, 0, tokens_L1[-1:]))
        return stacked(
            [
                flat_rows(
                    np.asarray(flat.token_ids, dtype=np.int32),
                    np.asarray(flat.logprobs, dtype=np.float32),
                    np.subtract(flat.end_indices, flat.start_indices)[skip:],
                    labels,
                )
                for flat, skip, labels in parts
            ]
        )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The lists of a group are many and hold no cycles; looking through them again and again costs a twentieth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
