"""What runs inside vLLM's worker: reduces each prompt position's logits to the targets that are stored.

vLLM mixes `CaptureExtension` into its worker class (`LLM(worker_extension_cls=...)`, an official mechanism, through
`tasks.teachers.vllm_extension`) and calls its methods by `LLM.collective_rpc`. `ddk_install` then shadows two methods
of the worker instance:

    execute_model(scheduler_output)   note which requests run, and how many tokens of each
    sample_tokens(...)                called right after, with the step's hidden states still there: project them to
                                      logits in chunks, reduce each chunk, write the rows where they belong

Results go to a file in shared memory that the front end maps too (`ResultBuffer`); nothing of vocabulary width ever
leaves a chunk. A `done` byte per position tells the front end that nothing was missed.

The names of vLLM that this rests on are used in this file only, checked by `ddk_install`, and were tested with
`TESTED_VERSIONS`. Of ours it imports the reduction alone, so that the engine's process stays lean.

Shape letters: N rows of hidden states, V tokens of the tokenizer, K stored entries, B blocks, L positions, M further
temperatures, D random draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks.teachers.reduction import OUTPUTS, reduce_logits

TESTED_VERSIONS = ("0.32.0",)

ROW_KEY = "ddk_row"
"""In a request's `extra_args`: the block's row in the result buffer."""
LABEL_KEY = "ddk_last_label"
"""Likewise: the token after the prompt's last, which the prompt itself does not hold."""


class ResultBuffer:
    """Arrays in one shared file, by name, each [B · L, …] with a row a position.

    Written by the worker: those of `tasks.teachers.reduction` and `done`. Written by the front end: `uniforms`, the
    random numbers of the draws. `out_of_memory` [1] says why the worker has gone.

    Args:
        sizes: K, M and D.
    """

    def __init__(
        self, path: str, blocks: int, positions: int, sizes: tuple[int, int, int], *, create: bool = False
    ) -> None:
        k, temperatures, draws = sizes
        rows = blocks * positions
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "uniforms": ((rows, draws), "float64"),
            "ids": ((rows, k), "int32"),
            "logprobs": ((rows, k), "float32"),
            "tail_mass": ((rows,), "float32"),
            "true_logprobs": ((rows,), "float32"),
            "entropy": ((rows,), "float32"),
            "tail_mass_at": ((rows, temperatures), "float32"),
            "drawn": ((rows, draws), "int32"),
            "done": ((rows,), "uint8"),
            "out_of_memory": ((1,), "uint8"),
        }
        total = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        mapped = np.memmap(path, dtype=np.uint8, mode="w+" if create else "r+", shape=(total,))
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        offset = 0
        for name, (shape, dtype) in shapes.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            # A plain array on the mapped memory: a memmap's own indexing is slow.
            self.arrays[name] = np.asarray(mapped[offset : offset + size]).view(dtype).reshape(shape)
            offset += size


@dataclass(slots=True)
class _Request:
    row: int
    labels: np.ndarray[Any, Any]
    """[L] the token after each prompt position."""


@dataclass(slots=True)
class _Scheduled:
    """One request's part of a step: prompt positions `start` to `start + count` − 1."""

    req_id: str
    start: int
    count: int


class CaptureExtension:
    """Mixed into vLLM's worker. Its public methods are called by `LLM.collective_rpc`.

    An extension may not define what the worker has already, so every name starts with `ddk_`.
    """

    ddk_requests: dict[str, _Request]
    ddk_scheduled: dict[str, _Scheduled]

    def ddk_install(
        self,
        vocab_size: int,
        k: int,
        chunk_bytes: int,
        temperatures: Sequence[float] = (),
        draws: int = 0,
        cores: Sequence[int] = (0,),
    ) -> None:
        """Start to listen.

        Args:
            vocab_size: tokens of the tokenizer; the model's rows beyond it are padding and get no probability.
            k: most probable tokens that are kept.
            chunk_bytes: of float32 logits that are reduced at a time; less where a GPU has little memory free.
            temperatures: further ones at which the mass outside the kept tokens is wanted.
            draws: random draws a position.
            cores: that the reduction may use on a CPU.

        Raises:
            RuntimeError: this vLLM is not the one that the extension was written against, or the engine is set up
                in a way under which positions would be missed.
        """
        import vllm
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        worker: Any = self
        config = worker.vllm_config
        runner = worker.model_runner
        missing = [
            name
            for name, holder in (("execute_model_state", runner), ("sample_tokens", worker), ("execute_model", worker))
            if not hasattr(holder, name)
        ]
        if missing or not hasattr(runner.model, "compute_logits"):
            raise RuntimeError(
                f"vLLM {vllm.__version__} lacks {missing or ['compute_logits']}, which capture needs; it was tested "
                f"with {', '.join(TESTED_VERSIONS)}: install one of these"
            )
        for what, wrong in (
            ("prefix caching", config.cache_config.enable_prefix_caching),
            ("speculative decoding", config.speculative_config is not None),
            ("LoRA", config.lora_config is not None),
            ("pipeline parallelism", config.parallel_config.pipeline_parallel_size > 1),
            ("KV sharing in prefill", getattr(config.cache_config, "kv_sharing_fast_prefill", False)),
        ):
            if wrong:
                raise RuntimeError(f"capture does not work with {what}: positions would be missed; switch it off")
        self.ddk_vocab_size = vocab_size
        self.ddk_sizes = (k, len(temperatures), draws)
        self.ddk_temperatures = tuple(temperatures)
        self.ddk_chunk_rows = max(1, _affordable(chunk_bytes) // (4 * vocab_size))
        self.ddk_cpu_reducer: Any = None
        if not torch.cuda.is_available():
            from tasks.teachers.reduction_cpu import CpuReducer

            self.ddk_cpu_reducer = CpuReducer(list(cores))
        self.ddk_writes = get_tensor_model_parallel_rank() == 0
        self.ddk_ranks = get_tensor_model_parallel_world_size()
        self.ddk_requests = {}
        self.ddk_scheduled = {}
        self.ddk_execute_model: Callable[..., Any] = worker.execute_model
        self.ddk_sample_tokens: Callable[..., Any] = worker.sample_tokens
        worker.execute_model = self._ddk_execute_model
        worker.sample_tokens = self._ddk_sample_tokens

    def ddk_map(self, path: str, blocks: int, positions: int) -> None:
        """Where results go from now on; the file is made by the front end."""
        self.ddk_buffer = ResultBuffer(path, blocks, positions, self.ddk_sizes)
        self.ddk_positions = positions
        self.ddk_requests = {}

    def _ddk_execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        for req_id in scheduler_output.finished_req_ids:
            self.ddk_requests.pop(req_id, None)
        starts: dict[str, int] = {}
        for new in scheduler_output.scheduled_new_reqs:
            extra = (new.sampling_params.extra_args or {}) if new.sampling_params is not None else {}
            if ROW_KEY in extra:
                labels = np.array([*new.prompt_token_ids[1:], extra[LABEL_KEY]], dtype=np.int64)
                self.ddk_requests[new.req_id] = _Request(row=extra[ROW_KEY], labels=labels)
                starts[new.req_id] = new.num_computed_tokens
        cached = scheduler_output.scheduled_cached_reqs
        starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self.ddk_scheduled = {
            req_id: _Scheduled(req_id=req_id, start=starts.get(req_id, 0), count=count)
            for req_id, count in scheduler_output.num_scheduled_tokens.items()
        }
        with self._ddk_telling_of_no_memory():
            return self.ddk_execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def _ddk_sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.model_runner  # type: ignore[attr-defined]
        state = runner.execute_model_state
        if state is not None and self.ddk_scheduled:
            # vLLM's first model runner keeps the batch on itself, its second one on the step's state.
            order = (state.input_batch if hasattr(state, "input_batch") else runner.input_batch).req_ids
            with self._ddk_telling_of_no_memory():
                self._ddk_capture(runner.model, state.hidden_states, order)
        self.ddk_scheduled = {}
        return self.ddk_sample_tokens(*args, **kwargs)

    def _ddk_capture(self, model: Any, hidden_ND: torch.Tensor, order: list[str]) -> None:
        """Reduce and write the rows of this step that are prompt positions of ours.

        `order`: request ids in the order in which their rows lie in `hidden_ND`.
        """
        rows, places, labels = [], [], []
        offset = 0
        for req_id in order:
            part = self.ddk_scheduled.get(req_id)
            if part is None:
                continue
            request = self.ddk_requests.get(req_id)
            if request is not None:
                count = min(part.count, len(request.labels) - part.start)
                if count > 0:
                    first = request.row * self.ddk_positions + part.start
                    rows.append(np.arange(offset, offset + count))
                    places.append(np.arange(first, first + count))
                    labels.append(request.labels[part.start : part.start + count])
            offset += part.count
        if not rows:
            return
        rows_N, places_N, labels_N = np.concatenate(rows), np.concatenate(places), np.concatenate(labels)
        start = 0
        while start < len(rows_N):
            chunk = slice(start, start + self.ddk_chunk_rows)
            try:
                self._ddk_capture_chunk(model, hidden_ND, rows_N[chunk], places_N[chunk], labels_N[chunk])
            except torch.OutOfMemoryError:
                # Under tensor parallelism the other ranks have gone on to the next collective.
                if self.ddk_chunk_rows == 1 or self.ddk_ranks > 1:
                    raise
                self.ddk_chunk_rows //= 2
                torch.cuda.empty_cache()
                continue
            start = chunk.stop
        if self.ddk_writes:
            self.ddk_buffer.arrays["done"][places_N] = 1

    def _ddk_capture_chunk(
        self,
        model: Any,
        hidden_ND: torch.Tensor,
        rows_N: np.ndarray[Any, Any],
        places_N: np.ndarray[Any, Any],
        labels_N: np.ndarray[Any, Any],
    ) -> None:
        index = torch.from_numpy(rows_N).to(hidden_ND.device)
        # Under tensor parallelism a collective: every rank calls it, one writes.
        logits = model.compute_logits(hidden_ND.index_select(0, index))
        if logits is None or not self.ddk_writes:
            return
        arrays = self.ddk_buffer.arrays
        if self.ddk_cpu_reducer is not None:
            inverse = 1.0 / np.array(self.ddk_temperatures, dtype=np.float32)
            logits_NP = logits.float().contiguous().numpy()
            self.ddk_cpu_reducer(logits_NP, self.ddk_vocab_size, labels_N, places_N, inverse, arrays)
            return
        logits_NV = logits[:, : self.ddk_vocab_size].float()
        labels = torch.from_numpy(labels_N).to(logits_NV.device)
        uniforms = torch.from_numpy(arrays["uniforms"][places_N])
        reduced = reduce_logits(logits_NV, labels, self.ddk_sizes[0], self.ddk_temperatures, uniforms)
        for name in OUTPUTS:
            arrays[name][places_N] = reduced[name].cpu().numpy()

    @contextlib.contextmanager
    def _ddk_telling_of_no_memory(self) -> Iterator[None]:
        """The engine's death reaches the front end without its reason; this leaves a note."""
        try:
            yield
        except torch.OutOfMemoryError:
            if hasattr(self, "ddk_buffer"):
                self.ddk_buffer.arrays["out_of_memory"][0] = 1
            raise


def _affordable(chunk_bytes: int) -> int:
    """`chunk_bytes`, or an eighth of what is free on the GPU: the chunk, its copies and the top-k's work space."""
    if not torch.cuda.is_available():
        return chunk_bytes
    return min(chunk_bytes, torch.cuda.mem_get_info()[0] // 8)
