"""A vLLM engine and its processes: code shared by all modules that start one.

The processes may be killed at any time, mostly by the kernel when memory runs out. Every call goes through `run`, which
notices that.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ddk.errors import LostPartError, UserError
from tasks.running.descendants import Descendants, changed_environment
from tasks.running.uncollected import uncollected
from tasks.showing.waiting import said_if_slow
from tasks.teachers.config import TeacherConfig, load_model_config, on_gpu, resolved_dtype
from tasks.teachers.leftovers import EngineFolder
from tasks.teachers.watched_calls import ChildDiedError, WatchedCalls, ending

_T = TypeVar("_T")
_AGAIN = "Then run the same command again to resume"
_LIKELY = {
    signal.SIGKILL: "probably the machine was out of memory (`dmesg` says so): lower teacher.max_batch_tokens or "
    "teacher.cpu_kv_cache_gib, or run fewer programs beside it",
    signal.SIGBUS: "probably /dev/shm is full: give the container more shared memory (--shm-size), or lower "
    "teacher.shard_blocks",
    signal.SIGILL: "this processor lacks an instruction that vLLM was built with: install a build for it",
    signal.SIGTERM: "somebody ended it",
}
_UNKNOWN = "its last lines above say more, and so may `dmesg`"
_GAVE_UP = f"its lines above say why; if there are none, {_LIKELY[signal.SIGKILL]}"
_FAILED_AT_START = re.compile(r"Failed core proc\(s\): \{[^}]*?: (-\d+)")
"""vLLM's words, with the exit code of the engine's process."""
_ON_GPU_ALONE = {
    *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "falcon_h1"),
    *("nemotron_h", "granitemoehybrid", "plamo2"),
}
"""Model types with Mamba layers, whose kernels are CUDA's and Triton's."""


SECONDS_TO_END = 1.0
"""For the engine's processes to end by themselves; all that they had to say has been read by then. vLLM gives them 5 s,
and on a CPU they take more: Python's last collection of garbage alone."""


class Engine:
    """vLLM's `LLM`, from here until `close`; then its processes and their memory are gone.

    They are gone too when the start fails or is interrupted, and when this process is killed, at any time.

    Args:
        config: what to run.
        settings: of vLLM's `LLM`, besides those that follow from the configuration.

    Raises:
        UserError: the model does not run on this machine.
    """

    def __init__(self, config: TeacherConfig, **settings: Any) -> None:
        self.llm: Any = None
        check_machine(config)
        self._processes = Descendants()
        self.folder = EngineFolder()
        self._calls = WatchedCalls()
        self._calls.on_look = self.folder.list_shared_memory
        try:
            starting = said_if_slow(f"starting vLLM, and loading {config.model}")
            with starting, engine_environment(config, self.folder.path), self._processes.marked():
                with uncollected():
                    from vllm import LLM

                self.llm = self._watched(
                    LLM,
                    model=config.model,
                    revision=config.revision,
                    dtype=resolved_dtype(config),
                    quantization=config.quantization,
                    enable_chunked_prefill=True,
                    enable_prefix_caching=False,
                    tensor_parallel_size=config.tensor_parallel_size,
                    distributed_executor_backend=_executor(config),
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    enforce_eager=not on_gpu(),
                    load_format="safetensors",
                    trust_remote_code=config.trust_remote_code,
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    **settings,
                )
            self.folder.list_shared_memory(self._calls.children)
            self._calls.on_look = lambda children: None  # all that there will be is there
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

    @property
    def children(self) -> list[int]:
        """Process ids of its processes that we have started and that live."""
        return self._calls.children

    def run(self, call: Callable[[Any], _T]) -> _T:
        """What a call of vLLM's `LLM` gives.

        Raises:
            LostPartError: a process of the engine has ended, and nothing more will come from it.
        """
        return self._watched(call, self.llm)

    def _watched(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        try:
            return self._calls(function, *args, **kwargs)
        except ChildDiedError as error:
            raise engine_died(error.exit_code) from error
        except Exception as error:
            if found := _FAILED_AT_START.search(str(error)):
                raise engine_died(int(found[1])) from error
            if type(error).__name__ == "EngineDeadError":  # a worker of it has ended, or raised
                raise LostPartError(f"the engine has given up; {_GAVE_UP}. {_AGAIN}") from error
            raise

    def close(self) -> None:
        """Harmless when called twice, and where vLLM does not manage to end them itself."""
        llm, self.llm = self.llm, None
        try:
            if llm is not None and not self._calls.stuck:
                with contextlib.suppress(ChildDiedError):  # then there is little left to end
                    self._calls(llm.llm_engine.engine_core.shutdown, timeout=SECONDS_TO_END)
        finally:
            self._processes.close()
            self._calls.close()
            self.folder.remove()


def engine_died(exit_code: int) -> LostPartError:
    """The error for an engine whose process has died."""
    likely = _LIKELY.get(signal.Signals(-exit_code), _UNKNOWN) if exit_code < 0 else _UNKNOWN
    return LostPartError(f"the engine's process {ending(exit_code)}; {likely}. {_AGAIN}")


def check_machine(config: TeacherConfig) -> None:
    """That vLLM's build for this machine runs the architecture; it would say so deep in a trace of its own.

    Raises:
        UserError: it does not.
    """
    found = load_model_config(config)
    kind = str(found.get_text_config().model_type)
    if kind in _ON_GPU_ALONE and not on_gpu():
        raise UserError(
            f"'{config.model}' is a {kind} model, and vLLM has its state-space kernels (Mamba) for GPUs alone; use a "
            f"machine with a GPU, or take its predictions from files (domains.*.targets: topk)"
        )
    if not on_gpu() and not _has_int8_products() and activations_are_int8(found):
        raise UserError(
            f"'{config.model}' multiplies activations of 8-bit integers, and this processor (without VNNI) adds such "
            f"products up in 16 bits, where they overflow: its predictions would be wrong. Use a machine with a GPU or "
            f"with VNNI (lscpu names avx512_vnni or avx_vnni), or the weights that are not quantised"
        )


def activations_are_int8(config: Any) -> bool:
    """Whether a model's quantisation, as its `config.json` describes it, rounds activations to 8-bit integers.

    Example: compressed-tensors' `input_activations: {num_bits: 8, type: int}` of a group, as in W8A8 models.
    """
    method = getattr(config, "quantization_config", None)
    if method is None:
        return False
    groups = (method if isinstance(method, dict) else method.to_dict()).get("config_groups")
    inputs = [
        group.get("input_activations")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict)
    ]
    return any(one.get("type") == "int" and one.get("num_bits") == 8 for one in inputs if isinstance(one, dict))


def _has_int8_products() -> bool:
    """Of four 8-bit integers at a time, added up in 32 bits. Without them oneDNN adds pairs in 16 bits, saturating.

    Source: oneDNN's developer guide, "Nuances of int8 computations". Measured with a Qwen2 of two layers and random
    weights, on a processor with AVX2 alone: 0.42 nat from a float32 pass over the same rounded weights.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return True
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


def cores() -> list[int]:
    """Those that the engine's CPU threads may use: what VLLM_CPU_OMP_THREADS_BIND says, or all of this process's."""
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", bound):
        ends = [part.split("-") for part in bound.split(",")]
        return sorted({core for part in ends for core in range(int(part[0]), int(part[-1]) + 1)})
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _executor(config: TeacherConfig) -> Any:
    """On a CPU the engine's process computes by itself where one is enough, as on a GPU.

    vLLM starts a process for the worker there, "as it is not possible to set the OMP environment correctly"
    (vllm/platforms/cpu.py); `engine_environment` sets it. That process would import vLLM once more, which takes as long
    as all else in the start of a small model.
    """
    if on_gpu() or config.tensor_parallel_size > 1:
        return None
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    return UniProcExecutor


@contextlib.contextmanager
def engine_environment(config: TeacherConfig, folder: str) -> Iterator[None]:
    """What the engine's processes read from the environment when they start; put back afterwards.

    Args:
        folder: for its sockets and temporary files.
    """
    wanted = {
        "VLLM_RPC_BASE_PATH": folder,
        "TMPDIR": folder,
        # What is compiled is for the next engine too.
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}"),
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
        if ranks == 1:  # see _executor; vLLM sets these for workers alone
            places = ",".join(map(str, ours))
            wanted |= {"OMP_NUM_THREADS": str(len(ours)), "OMP_PLACES": f"{{{places}}}", "OMP_PROC_BIND": "true"}
    # What the user has set stays, but for what capture cannot do without.
    forced = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_RPC_BASE_PATH", "TMPDIR"}
    forced |= {"OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND"}
    with changed_environment({name: v for name, v in wanted.items() if name in forced or name not in os.environ}):
        yield
