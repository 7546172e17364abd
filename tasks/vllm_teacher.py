"""The teacher: a vLLM engine that turns token blocks into sparse targets.

The engine's worker reduces the logits (`tasks.vllm_worker`); this module starts the engine, hands it the blocks of
one shard at a time and reads the results from shared memory. The scheduler is paused while a shard's requests are
queued, so that what runs together does not depend on timing: a shard's bytes are the same whenever it is captured.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from ddk.types import Int32Array, SparseTargets
from tasks.teacher import TeacherConfig, check_fits, on_gpu, resolved_dtype
from tasks.vllm_worker import LABEL_KEY, ROW_KEY, ResultBuffer

WORKER_EXTENSION = "tasks.vllm_worker.CaptureExtension"
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 32 * 2**20, 256 * 2**20
"""Float32 logits reduced at a time. On a CPU about its last-level cache, where every pass over a chunk stays; on a GPU
enough rows to fill it, and little beside the memory that `gpu_memory_utilization` leaves free."""


class VllmTeacher:
    """An engine that starts at the first capture and lives to the end of the `with`; then its processes and their
    memory are gone. Where everything is captured already, it never starts.

    Args:
        config: what to run.
        seq_len: positions in a block, L.
        vocab_size: tokens of the tokenizer.
    """

    def __init__(self, config: TeacherConfig, *, seq_len: int, vocab_size: int) -> None:
        self.config = config
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self._llm: Any = None
        self._buffer: ResultBuffer | None = None
        check_fits(config, seq_len=seq_len, vocab_size=vocab_size)

    def __enter__(self) -> VllmTeacher:
        return self

    def _start(self) -> None:
        with _engine_environment(self.config):
            from vllm import LLM

            self._llm = LLM(
                model=self.config.model,
                revision=self.config.revision,
                skip_tokenizer_init=True,
                dtype=resolved_dtype(self.config),
                quantization=self.config.quantization,
                max_model_len=self.seq_len + 1,
                max_num_batched_tokens=max(self.config.max_batch_tokens, 16),
                max_num_seqs=self.config.shard_blocks,
                enable_chunked_prefill=True,
                enable_prefix_caching=False,
                enable_lora=False,
                tensor_parallel_size=self.config.tensor_parallel_size,
                gpu_memory_utilization=self.config.gpu_memory_utilization,
                enforce_eager=not on_gpu(),
                load_format="safetensors",
                trust_remote_code=self.config.trust_remote_code,
                worker_extension_cls=WORKER_EXTENSION,
                use_tqdm_on_load=False,
                disable_log_stats=True,
                seed=0,
            )
        try:
            chunk_bytes = GPU_CHUNK_BYTES if on_gpu() else CPU_CHUNK_BYTES
            self._llm.collective_rpc("ddk_install", args=(self.vocab_size, self.config.k, chunk_bytes, os.getpid()))
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's processes and free its memory. Harmless when called twice."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        self._buffer = None

    def capture(self, tokens_BL1: Int32Array) -> SparseTargets:
        """The teacher's targets at every position of some blocks.

        Args:
            tokens_BL1: [B, L + 1] int32, at most `shard_blocks` blocks.

        Raises:
            RuntimeError: the engine did not run a position (nothing is returned then).
        """
        from vllm import SamplingParams

        if self._llm is None:
            self._start()
        count = len(tokens_BL1)
        arrays = self._result_arrays()
        arrays["done"][:] = 0
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
        if not arrays["done"][:count].all():
            missed = int((arrays["done"][:count] == 0).sum())
            raise RuntimeError(f"the engine missed {missed} of {count * self.seq_len} positions; nothing was stored")
        return SparseTargets(
            ids_BLK=arrays["ids"][:count].copy(),
            logprobs_BLK=arrays["logprobs"][:count].copy(),
            tail_mass_BL=arrays["tail_mass"][:count].copy(),
            true_logprobs_BL=arrays["true_logprobs"][:count].copy(),
        )

    def _generate(self, prompts: list[dict[str, list[int]]], parameters: list[Any]) -> None:
        core = self._llm.llm_engine.engine_core
        # Paused, the engine queues what it is given; so the first step sees the whole shard, not what was in time.
        core.call_utility("pause_scheduler", "keep", False)
        self._llm.enqueue(prompts, parameters, use_tqdm=False)
        core.call_utility("resume_scheduler")
        self._llm.wait_for_completion(use_tqdm=False)

    def _result_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        if self._buffer is None:
            folder = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: S108 (shared memory is what is meant)
            shape = (self.config.shard_blocks, self.seq_len)
            with tempfile.NamedTemporaryFile(prefix="ddk-capture-", dir=folder) as file:
                self._buffer = ResultBuffer(file.name, *shape, self.config.k, create=True)
                self._llm.collective_rpc("ddk_map", args=(file.name, *shape))
            # Both sides have mapped it, and the name is gone: however this ends, the memory is given back.
        return self._buffer.arrays


@contextlib.contextmanager
def _engine_environment(config: TeacherConfig) -> Iterator[None]:
    """What the engine's processes read from the environment when they start; put back afterwards."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    wanted = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Spawned, whatever the front end has started before: a forked child of a process with threads may hang.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(config.cpu_kv_cache_gib),
        # glibc would return every chunk of logits to the system and page-fault the next one.
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
    }
    if not on_gpu() and config.tensor_parallel_size == 1:
        # By default vLLM leaves one core to the front end, which has nothing to do while the worker runs.
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    before = {name: os.environ.get(name) for name in wanted}
    # What the user has set stays, but for what capture cannot do without.
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"}
    os.environ.update({name: v for name, v in wanted.items() if name in forced or name not in os.environ})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
