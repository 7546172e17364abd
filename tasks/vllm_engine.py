"""A vLLM engine of our own, and the processes that it consists of: what all that start one share."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

from tasks.orphans import Descendants, changed_environment
from tasks.teacher import TeacherConfig, on_gpu, resolved_dtype


class Engine:
    """vLLM's `LLM`, from here until `close`; then its processes and their memory are gone.

    They are gone too when the start fails or is interrupted, and when this process is killed, at any time.

    Args:
        config: what to run.
        settings: of vLLM's `LLM`, besides those that follow from the configuration.
    """

    def __init__(self, config: TeacherConfig, **settings: Any) -> None:
        self.llm: Any = None
        self._processes = Descendants()
        try:
            with engine_environment(config), self._processes.marked():
                from vllm import LLM

                self.llm = LLM(
                    model=config.model,
                    revision=config.revision,
                    dtype=resolved_dtype(config),
                    quantization=config.quantization,
                    enable_chunked_prefill=True,
                    enable_prefix_caching=False,
                    tensor_parallel_size=config.tensor_parallel_size,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    enforce_eager=not on_gpu(),
                    load_format="safetensors",
                    trust_remote_code=config.trust_remote_code,
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    **settings,
                )
        except BaseException:
            self.close()
            raise

    @classmethod
    def for_capture(cls, config: TeacherConfig, *, seq_len: int, **settings: Any) -> Engine:
        """One that reads token ids alone.

        Args:
            seq_len: longest prompt; the engine makes room for one generated token behind it.
        """
        return cls(
            config,
            skip_tokenizer_init=True,
            max_model_len=seq_len + 1,
            max_num_seqs=config.shard_blocks,
            enable_lora=False,
            seed=0,
            **settings,
        )

    def close(self) -> None:
        """Harmless when called twice, and where vLLM does not manage to end them itself."""
        llm, self.llm = self.llm, None
        try:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
        finally:
            self._processes.close()


def cores() -> list[int]:
    """Those that the engine's CPU threads may use: what VLLM_CPU_OMP_THREADS_BIND says, or all of this process's."""
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bound):
        ends = [part.split("-") for part in bound.split(",")]
        return sorted({core for part in ends for core in range(int(part[0]), int(part[-1]) + 1)})
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def engine_environment(config: TeacherConfig) -> Iterator[None]:
    """What the engine's processes read from the environment when they start; put back afterwards."""
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
    if not on_gpu():
        # By default vLLM leaves one core to the front end, which has little to do while the worker runs, and wants a
        # NUMA node for each rank.
        ranks, ours = config.tensor_parallel_size, cores()
        shares = [ours[len(ours) * i // ranks : len(ours) * (i + 1) // ranks] or ours[-1:] for i in range(ranks)]
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    # What the user has set stays, but for what capture cannot do without.
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"}
    with changed_environment({name: v for name, v in wanted.items() if name in forced or name not in os.environ}):
        yield
