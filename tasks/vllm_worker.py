"""What runs inside vLLM's worker: reduces each prompt position's logits to the targets that are stored.

vLLM mixes `CaptureExtension` into its worker class (`LLM(worker_extension_cls=...)`, an official mechanism) and
calls its methods by `LLM.collective_rpc`. `ddk_install` then shadows two methods of the worker instance:

    execute_model(scheduler_output)   note which requests run, and how many tokens of each
    sample_tokens(...)                called right after, with the step's hidden states still there: project them to
                                      logits in chunks, reduce each chunk, write the rows where they belong

Results go to a file in shared memory that the front end maps too (`ResultBuffer`); nothing of vocabulary width ever
leaves a chunk. A `done` byte per position tells the front end that nothing was missed.

The names of vLLM that this rests on are used in this file only, checked by `ddk_install`, and were tested with
`TESTED_VERSIONS`. This module imports none of ours, so that the engine's process stays lean.

Shape letters: N rows of hidden states, V tokens of the tokenizer, K stored entries, B blocks, L positions.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

TESTED_VERSIONS = ("0.32.0",)

ROW_KEY = "ddk_row"
"""In a request's `extra_args`: the block's row in the result buffer."""
LABEL_KEY = "ddk_last_label"
"""Likewise: the token after the prompt's last, which the prompt itself does not hold."""


class ResultBuffer:
    """Arrays in one shared file: ids and log-probabilities [B, L, K], tail mass, true log-probability, done [B, L]."""

    def __init__(self, path: str, blocks: int, positions: int, k: int, *, create: bool = False) -> None:
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            "ids": ((blocks, positions, k), "int32"),
            "logprobs": ((blocks, positions, k), "float32"),
            "tail_mass": ((blocks, positions), "float32"),
            "true_logprobs": ((blocks, positions), "float32"),
            "done": ((blocks, positions), "uint8"),
        }
        total = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        mapped = np.memmap(path, dtype=np.uint8, mode="w+" if create else "r+", shape=(total,))
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        offset = 0
        for name, (shape, dtype) in shapes.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.arrays[name] = mapped[offset : offset + size].view(dtype).reshape(shape)
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


def reduce_logits(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is stored of a chunk of logits; overwrites the logits.

    Args:
        logits_NV: float32, padded vocabulary rows already cut off.
        labels_N: int64, the true next tokens.

    Returns:
        ids [N, K] int64 and log-probabilities [N, K] float32 in descending order, the mass outside them [N] float32
        (summed over what is outside, so that it keeps its relative precision where it is tiny; exactly 0 for
        K = V), and the true tokens' log-probabilities [N] float32.
    """
    top = logits_NV.topk(k, dim=-1)
    largest_N1 = top.values[:, :1]
    true_N = logits_NV.gather(-1, labels_N[:, None])[:, 0]
    outside_NV = logits_NV.sub_(largest_N1).exp_().scatter_(-1, top.indices, 0.0)
    outside_N = outside_NV.sum(-1)
    total_N = (top.values - largest_N1).exp().sum(-1) + outside_N
    normaliser_N = largest_N1[:, 0] + total_N.log()
    return top.indices, top.values - normaliser_N[:, None], outside_N / total_N, true_N - normaliser_N


def end_with(front_end: int, seconds_between_looks: float = 1.0) -> None:
    """End this process, and the engine that started it, once the front end is gone.

    vLLM's processes outlive a front end that was killed with -9, and hold the GPU's memory against the next one.

    Args:
        front_end: process id; alive when this is called.
    """
    owner = psutil.Process(front_end)
    engine = os.getppid()

    def watch() -> None:
        while owner.is_running() and owner.status() != psutil.STATUS_ZOMBIE:
            time.sleep(seconds_between_looks)
        # The worker is the front end's child (one process for engine and worker) or the engine's.
        if engine not in (front_end, 1) and os.getppid() == engine:
            os.kill(engine, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="ddk-end-with-front-end", daemon=True).start()


class CaptureExtension:
    """Mixed into vLLM's worker. Its public methods are called by `LLM.collective_rpc`.

    An extension may not define what the worker has already, so every name starts with `ddk_`.
    """

    ddk_requests: dict[str, _Request]
    ddk_scheduled: dict[str, _Scheduled]

    def ddk_install(self, vocab_size: int, k: int, chunk_bytes: int, front_end: int | None = None) -> None:
        """Start to listen.

        Args:
            vocab_size: tokens of the tokenizer; the model's rows beyond it are padding and get no probability.
            chunk_bytes: of float32 logits that are reduced at a time.
            front_end: process id whose end is to be this process's end too; see `end_with`.

        Raises:
            RuntimeError: this vLLM is not the one that the extension was written against, or the engine is set up
                in a way under which positions would be missed.
        """
        import vllm
        from vllm.distributed import get_tensor_model_parallel_rank

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
        if front_end is not None:
            end_with(front_end)
        self.ddk_vocab_size = vocab_size
        self.ddk_k = k
        self.ddk_chunk_rows = max(1, chunk_bytes // (4 * vocab_size))
        self.ddk_writes = get_tensor_model_parallel_rank() == 0
        self.ddk_requests = {}
        self.ddk_scheduled = {}
        self.ddk_execute_model: Callable[..., Any] = worker.execute_model
        self.ddk_sample_tokens: Callable[..., Any] = worker.sample_tokens
        worker.execute_model = self._ddk_execute_model
        worker.sample_tokens = self._ddk_sample_tokens

    def ddk_map(self, path: str, blocks: int, positions: int) -> None:
        """Where results go from now on; the file is made by the front end."""
        self.ddk_buffer = ResultBuffer(path, blocks, positions, self.ddk_k)
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
        return self.ddk_execute_model(scheduler_output, *args, **kwargs)

    @torch.inference_mode()
    def _ddk_sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.model_runner  # type: ignore[attr-defined]
        state = runner.execute_model_state
        if state is not None and self.ddk_scheduled:
            # vLLM's first model runner keeps the batch on itself, its second one on the step's state.
            order = (state.input_batch if hasattr(state, "input_batch") else runner.input_batch).req_ids
            self._ddk_capture(runner.model, state.hidden_states, order)
        self.ddk_scheduled = {}
        return self.ddk_sample_tokens(*args, **kwargs)

    def _ddk_capture(self, model: Any, hidden_ND: torch.Tensor, order: list[str]) -> None:
        """Reduce and write the rows of this step that are prompt positions of ours.

        `order`: request ids in the order in which their rows lie in `hidden_ND`.
        """
        rows, blocks, positions, labels = [], [], [], []
        offset = 0
        for req_id in order:
            part = self.ddk_scheduled.get(req_id)
            if part is None:
                continue
            request = self.ddk_requests.get(req_id)
            if request is not None:
                count = min(part.count, len(request.labels) - part.start)
                if count > 0:
                    rows.append(np.arange(offset, offset + count))
                    blocks.append(np.full(count, request.row))
                    positions.append(np.arange(part.start, part.start + count))
                    labels.append(request.labels[part.start : part.start + count])
            offset += part.count
        if not rows:
            return
        rows_N, blocks_N = np.concatenate(rows), np.concatenate(blocks)
        positions_N, labels_N = np.concatenate(positions), np.concatenate(labels)
        for start in range(0, len(rows_N), self.ddk_chunk_rows):
            part_of = slice(start, start + self.ddk_chunk_rows)
            index = torch.from_numpy(rows_N[part_of]).to(hidden_ND.device)
            # Under tensor parallelism a collective: every rank calls it, one writes.
            logits = model.compute_logits(hidden_ND.index_select(0, index))
            if logits is None or not self.ddk_writes:
                continue
            logits_NV = logits[:, : self.ddk_vocab_size].float()
            chunk_labels = torch.from_numpy(labels_N[part_of]).to(logits_NV.device)
            reduced = reduce_logits(logits_NV, chunk_labels, self.ddk_k)
            at = (blocks_N[part_of], positions_N[part_of])
            arrays = self.ddk_buffer.arrays
            for name, value in zip(("ids", "logprobs", "tail_mass", "true_logprobs"), reduced, strict=True):
                arrays[name][at] = value.cpu().numpy()
            arrays["done"][at] = 1
