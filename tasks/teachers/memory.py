"""What the teacher takes of each GPU's memory while it is captured, worked out from its shape and the configuration.

vLLM always takes `gpu_memory_utilization` of each GPU; this module estimates the memory that it needs at least.
Weights, heads and feed-forward channels are shared by `tensor_parallel_size` GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

from ddk.cost.memory import CONTEXT_BYTES, Part
from ddk.cost.shape import FLOAT_BYTES, ModelShape
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import GPU_CHUNK_BYTES
from tasks.teachers.prompt_teacher import LOGITS_BYTES

QUANTIZED_BYTES = {
    "fp8": 1.0, "fbgemm_fp8": 1.0, "modelopt": 1.0, "experts_int8": 1.0,
    "awq": 0.5, "awq_marlin": 0.5, "gptq": 0.5, "gptq_marlin": 0.5, "bitsandbytes": 0.5, "mxfp4": 0.5,
}  # fmt: skip
"""Of a weight, by the method's name; 4 bits where a method has several widths. Scales are left out."""


def teacher_dtype(config: TeacherConfig, shape: ModelShape) -> str:
    """As `tasks.teachers.config.resolved_dtype`, from the shape."""
    return shape.dtype if config.dtype == "auto" else config.dtype


def weight_bytes(config: TeacherConfig, shape: ModelShape) -> tuple[float, str]:
    """Of all GPUs together, and how that is reckoned. Embeddings and output projection are not quantised."""
    dtype = teacher_dtype(config, shape)
    item = FLOAT_BYTES.get(dtype, 2)
    method = config.quantization or shape.quantization
    if method is None:
        return item * shape.parameters, f"{item} bytes ({dtype}) × {shape.parameters:,} parameters"
    if method not in QUANTIZED_BYTES:
        return item * shape.parameters, f"{item} bytes × {shape.parameters:,}: '{method}' is unknown here, so not less"
    inside = shape.products - shape.head
    each = QUANTIZED_BYTES[method]
    how = f"{each:g} bytes ({method}) × {inside:,}, {item} × the rest of {shape.parameters:,}"
    return each * inside + item * (shape.parameters - inside), how


def teacher_memory(shape: ModelShape, config: TeacherConfig, *, seq_len: int) -> list[Part]:
    """Of one GPU. Empty where the teacher runs on somebody else's server."""
    return [] if config.source == "server" else list(_parts(shape, config, seq_len))


def _parts(shape: ModelShape, config: TeacherConfig, seq_len: int) -> Iterator[Part]:
    ranks, item = config.tensor_parallel_size, FLOAT_BYTES.get(teacher_dtype(config, shape), 2)
    among = f", shared by {ranks} GPUs" if ranks > 1 else ""
    weights, how = weight_bytes(config, shape)
    yield Part(what="weights", bytes=weights / ranks, how=how + among)
    # A request is done with its prompt's last token; the passes in flight are two, and one block may stand half done.
    held = 2 * config.max_batch_tokens + seq_len
    each = shape.cache_bytes(item, ranks)
    how = f"{each:,} bytes × {held:,} positions: two passes of max_batch_tokens and a block"
    yield Part(what="KV cache in use", bytes=each * held, how=how)
    channels = 3 * shape.width + (3 if shape.gated else 2) * shape.inner / ranks
    how = f"{config.max_batch_tokens:,} positions × {channels:,.0f} channels × {item} bytes"
    yield Part(what="activations", bytes=config.max_batch_tokens * channels * item, how=how)
    yield _of_logits(shape, config)
    yield Part(what="CUDA, its libraries, NCCL", bytes=CONTEXT_BYTES, how="assumed")


def _of_logits(shape: ModelShape, config: TeacherConfig) -> Part:
    """`tasks.teachers.reduction`: a chunk in half precision and in float32, its exponentials and the top k's work
    space, and for random draws a float64 copy; vLLM's own way has float32 logits, their log-softmax and a copy."""
    if config.source == "prompt_logprobs":
        step = min(LOGITS_BYTES, 4 * config.max_batch_tokens * shape.rows)
        return Part(what="logits", bytes=3 * step, how=f"3 × {step / 2**20:.0f} MiB")
    copies = 3.5 + (2.0 if config.draws else 0.0)
    chunk = min(GPU_CHUNK_BYTES, 4 * config.max_batch_tokens * shape.rows)
    how = f"{copies:g} × {chunk / 2**20:.0f} MiB, beside what gpu_memory_utilization covers"
    return Part(what="logits of capture", bytes=copies * chunk, how=how)


def engine_bytes(parts: list[Part]) -> float:
    """The part of it that has to fit into `gpu_memory_utilization` of a GPU."""
    return sum(part.bytes for part in parts if not part.what.startswith("logits"))


def shared_memory(config: TeacherConfig, *, seq_len: int) -> float:
    """Bytes in /dev/shm that the engine's worker and the front end share: a shard's results (`ResultBuffer`)."""
    if config.source != "engine":
        return 0.0
    each = 8 * config.k + 4 * (3 + len(config.tail_temperatures)) + 12 * config.draws + 1
    return each * config.shard_blocks * seq_len
