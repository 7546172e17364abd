"""The teacher: a vLLM engine that turns token blocks into sparse targets.

The engine's worker reduces the logits (`tasks.teachers.vllm_worker`); this module starts the engine, hands it the
blocks of one shard at a time and reads the results from shared memory. The scheduler is paused while a shard's requests
are queued, so that what runs together does not depend on timing: a shard's bytes are the same whenever it is captured.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from typing import Any

import numpy as np

from ddk.errors import LostPartError, UserError
from ddk.values import Int32Array, SampledTokens, SparseTargets
from tasks.showing.progress import logger
from tasks.teachers.config import TeacherConfig, on_gpu
from tasks.teachers.leftovers import SHARED_MEMORY
from tasks.teachers.reduction import OUTPUTS
from tasks.teachers.source import TeacherSource
from tasks.teachers.vllm_engine import Engine, cores
from tasks.teachers.vllm_worker import LABEL_KEY, ROW_KEY, ResultBuffer

WORKER_EXTENSION = "tasks.teachers.vllm_extension.CaptureExtension"
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 128 * 2**20, 256 * 2**20
"""Float32 logits reduced at a time. On a CPU each row passes through a core's cache by itself, and a chunk need only be
long enough that starting the threads is nothing beside it (32 MiB cost a sixth of the speed at a vocabulary of
152,000); on a GPU enough rows to fill it, and little beside the memory that `gpu_memory_utilization` leaves free."""
MIN_BATCH_TOKENS = 128
"""Of a forward pass. Below this an engine that is out of memory lacks it for another reason."""


class VllmTeacher(TeacherSource):
    """An engine that starts at the first capture and lives to the end of the `with`; then its processes and their
    memory are gone. Arguments and errors are those of every source.
    """

    name = "engine"
    start_seconds = 0.0
    """What starting the engine took, each time; no part of the time of a capture."""

    def __init__(self, config: TeacherConfig, *, seq_len: int, vocab_size: int) -> None:
        super().__init__(config, seq_len=seq_len, vocab_size=vocab_size)
        self.batch_tokens = max(config.max_batch_tokens, MIN_BATCH_TOKENS)
        """Of one forward pass; halved when the engine runs out of memory."""
        self._engine: Engine | None = None
        self._buffer: ResultBuffer | None = None

    def _start(self) -> None:
        self._engine = Engine.for_capture(
            self.config,
            seq_len=self.seq_len,
            max_num_batched_tokens=self.batch_tokens,
            worker_extension_cls=WORKER_EXTENSION,
        )
        wanted = {
            "vocab_size": self.vocab_size,
            "k": self.config.k,
            "chunk_bytes": GPU_CHUNK_BYTES if on_gpu() else CPU_CHUNK_BYTES,
            "temperatures": self.config.tail_temperatures,
            "draws": self.config.draws,
            "cores": cores(),
        }
        try:
            self._engine.run(lambda llm: llm.collective_rpc("ddk_install", kwargs=wanted))
        except BaseException:
            self.close()
            raise

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("the engine is not running")
        return self._engine

    def close(self) -> None:
        """End the engine's processes and free its memory. Harmless when called twice."""
        engine, self._engine, self._buffer = self._engine, None, None
        if engine is not None:
            engine.close()

    def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        """The teacher's targets at every position of some blocks.

        An engine that runs out of memory is started again with half the batch, and captures them then.

        Args:
            tokens_BL1: [B, L + 1] int32, at most `shard_blocks` blocks.

        Raises:
            UserError: out of memory however small the batch.
            LostPartError: a process of the engine was killed.
            RuntimeError: the engine did not run a position (nothing is returned then).
        """
        while True:
            if self._engine is None:
                began = time.monotonic()
                self._start()
                self.start_seconds += time.monotonic() - began
            try:
                return self._capture(tokens_BL1)
            except Exception as error:
                if not self._ran_out_of_memory(error):
                    raise
                self._shrink(error)

    def _capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        from vllm import SamplingParams

        blocks = len(tokens_BL1)
        arrays = self._result_arrays()
        arrays["done"][:] = 0
        if self.config.draws:
            arrays["uniforms"][: blocks * self.seq_len] = self._uniforms(tokens_BL1)
        # The last token is a label only: no prediction is made from it.
        prompts = [{"prompt_token_ids": row[:-1].tolist()} for row in tokens_BL1]
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                extra_args={ROW_KEY: i, LABEL_KEY: int(row[-1])},
            )
            for i, row in enumerate(tokens_BL1)
        ]
        self._generate(prompts, parameters)
        rows = blocks * self.seq_len
        if not arrays["done"][:rows].all():
            missed = int((arrays["done"][:rows] == 0).sum())
            raise RuntimeError(f"the engine missed {missed} of {rows} positions; nothing was stored")
        taken = {name: arrays[name][:rows].reshape(blocks, self.seq_len, *arrays[name].shape[1:]) for name in OUTPUTS}
        return SparseTargets(
            ids_BLK=taken["ids"].copy(),
            logprobs_BLK=taken["logprobs"].copy(),
            tail_mass_BL=taken["tail_mass"].copy(),
            true_logprobs_BL=taken["true_logprobs"].copy(),
            entropy_BL=taken["entropy"].copy(),
            sampled=counted(taken["drawn"]) if self.config.draws else None,
            tail_mass_at={
                temperature: taken["tail_mass_at"][..., m].copy()
                for m, temperature in enumerate(self.config.tail_temperatures)
            },
        )

    def _uniforms(self, tokens_BL1: Int32Array) -> np.ndarray[Any, Any]:
        """[B · L, D] float64, ascending within a row. A block's depend on its tokens and the seed alone."""
        drawn = []
        for row in tokens_BL1:
            digest = hashlib.sha256(row.astype("<i4").tobytes()).digest()
            key = np.array([self.config.draws_seed, int.from_bytes(digest[:8], "little")], dtype=np.uint64)
            drawn.append(np.random.Generator(np.random.Philox(key=key)).random((self.seq_len, self.config.draws)))
        return np.sort(np.concatenate(drawn), axis=-1)

    def _ran_out_of_memory(self, error: Exception) -> bool:
        if self._buffer is not None and self._buffer.arrays["out_of_memory"][0]:
            return True
        # A process that was killed: the machine's memory, not the GPU's, and another start might meet the same end.
        return "out of memory" in str(error).lower() and not isinstance(error, LostPartError)

    def _shrink(self, error: Exception) -> None:
        if self.batch_tokens <= MIN_BATCH_TOKENS:
            raise UserError(
                f"the teacher runs out of memory even at {self.batch_tokens} tokens a pass; lower "
                f"teacher.gpu_memory_utilization or packing.seq_len, or raise teacher.tensor_parallel_size"
            ) from error
        self.close()
        self.batch_tokens = max(self.batch_tokens // 2, MIN_BATCH_TOKENS)
        logger.warning("the teacher ran out of memory; restarting it with %d tokens per pass", self.batch_tokens)

    def _generate(self, prompts: list[dict[str, list[int]]], parameters: list[Any]) -> None:
        def run(llm: Any) -> None:
            core = llm.llm_engine.engine_core
            # Paused, the engine queues what it is given; so the first step sees the whole shard, not what was in time.
            core.call_utility("pause_scheduler", "keep", False)
            llm.enqueue(prompts, parameters, use_tqdm=False)
            core.call_utility("resume_scheduler")
            llm.wait_for_completion(use_tqdm=False)

        self._running.run(run)

    def _result_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        if self._buffer is None:
            engine = self._running
            folder = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else engine.folder.path
            shape = (self.config.shard_blocks, self.seq_len)
            sizes = (self.config.k, len(self.config.tail_temperatures), self.config.draws)
            with tempfile.NamedTemporaryFile(prefix="ddk-capture-", dir=folder) as file:
                engine.folder.list_file(file.name)
                self._buffer = ResultBuffer(file.name, *shape, sizes, create=True)
                engine.run(lambda llm: llm.collective_rpc("ddk_map", args=(file.name, *shape)))
            # Both sides have mapped it, and the name is gone: however this ends, the memory is given back.
        return self._buffer.arrays


def counted(drawn_BLD: Int32Array) -> SampledTokens:
    """Distinct tokens and how often each was drawn, from draws that ascend within a position.

    Example: `[3, 3, 7]` → ids `[3, 7, 0]`, counts `[2, 1, 0]`.
    """
    blocks, positions, draws = drawn_BLD.shape
    drawn_PD = drawn_BLD.reshape(-1, draws)
    first_PD = np.diff(drawn_PD, axis=-1, prepend=-1) > 0
    # The place of every draw's token among its position's distinct ones, over all positions.
    place_PD = np.cumsum(first_PD, axis=-1) - 1 + np.arange(len(drawn_PD))[:, None] * draws
    counts = np.bincount(place_PD.ravel(), minlength=drawn_PD.size).astype(np.int32)
    ids = np.zeros(drawn_PD.size, dtype=np.int32)
    ids[place_PD[first_PD]] = drawn_PD[first_PD]
    shape = (blocks, positions, draws)
    return SampledTokens(ids_BLN=ids.reshape(shape), counts_BLN=counts.reshape(shape))
