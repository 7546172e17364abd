"""How much memory of each GPU a student's training takes, calculated from its shape and the configuration.

With N parameters (Rajbhandari et al. 2020, ZeRO, section 3.1; here weights and gradients are float32 as well):

    weights 4·N, gradients 4·N, AdamW's two moments 8·N      with 'fsdp' divided by the ranks

The rest is counted for the actual code: `ddk.trainer` (autocast), `ddk.fused` (the loss in chunks) and transformers'
decoder layers. For a layer of width D, with A channels of attention (heads · head width) and feed-forward width I,
autograd keeps this many bytes per position:

    bfloat16 autocast    26·D + 8·A + 8·I   (4·I where the feed-forward layer is not gated)
    float32              24·D + 16·A + 16·I (8·I)

    D: the residual stream and the normed one, float32, before attention and before the feed-forward layer; and in
       bfloat16 the copies that autocast makes for each of the products q, k, v, gate and up
    A: queries, keys, values (repeated to all heads) and the attention's output
    I: gate, its activation, up, and their product

Activation checkpointing keeps 4·D, a layer's input, and the whole of the one layer that is being recomputed.
FlashAttention or a similar kernel is assumed, so no matrix of positions by positions is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ddk.cost.shape import ModelShape
from ddk.fused import CHUNK_BYTES
from ddk.train_config import LossConfig, TrainConfig

CONTEXT_BYTES = 3 * 2**29
"""Assumed: what CUDA, its libraries and NCCL take of a GPU before the first tensor (1.5 GiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a memory's or a disk's use."""

    what: str
    bytes: float
    how: str
    """The formula, or the assumption."""


def state_bytes(parameters: int) -> int:
    """Weights, gradients and both of AdamW's moments, in float32."""
    return 16 * parameters


def activation_bytes(shape: ModelShape, *, bf16: bool) -> int:
    """What autograd keeps of one position in one layer; see the module."""
    attention = shape.heads * shape.head_width
    up = 4 if shape.gated else 2
    if bf16:
        return 26 * shape.width + 8 * attention + 2 * up * shape.inner
    return 24 * shape.width + 16 * attention + 4 * up * shape.inner


def student_memory(
    shape: ModelShape, train: TrainConfig, loss: LossConfig, *, seq_len: int, ranks: int, extra: int = 0
) -> list[Part]:
    """Memory of one GPU at the peak of a step.

    Args:
        ranks: processes that train together, over all machines.
        extra: trained parameters besides the model's.

    Raises:
        ValueError: they cannot share the batch.
    """
    bf16 = train.precision != "fp32"
    share = train.share(ranks)
    micro = train.micro_batch_size or share
    sharded = train.parallel == "fsdp" and ranks > 1
    found = [_state(shape.parameters + extra, ranks if sharded else 1)]
    if sharded:
        found += _gathered(shape, bf16=bf16, passes=share // micro)
    elif bf16:
        how = "2 bytes for each weight of a product, which autocast keeps through a pass"
        found.append(Part(what="weights in bfloat16", bytes=2 * shape.products, how=how))
    found += [
        _activations(shape, micro * seq_len, bf16=bf16, checkpointing=train.activation_checkpointing),
        *_of_loss(shape, loss, micro * seq_len, bf16=bf16),
        Part(what="CUDA, its libraries, NCCL", bytes=CONTEXT_BYTES, how="assumed"),
    ]
    return found


def _state(parameters: int, ranks: int) -> Part:
    among = f", a share on each of {ranks} GPUs" if ranks > 1 else ""
    how = f"(4 + 4 + 8) bytes × {parameters:,} parameters{among}"
    return Part(what="weights, gradients, AdamW", bytes=state_bytes(parameters) / ranks, how=how)


def _gathered(shape: ModelShape, *, bf16: bool, passes: int) -> Iterator[Part]:
    """What FSDP2 puts together on every GPU: the root's group for a whole pass, two layers at a time, and, while
    gradients are not exchanged, all of these whole (`FSDPParam.unsharded_accumulated_grad`)."""
    outside = shape.head * (1 if shape.tied else 2)
    layer = (shape.parameters - outside) / shape.layers
    item = 2 if bf16 else 4
    how = f"{item} bytes × (embedding and output projection, and two layers)"
    yield Part(what="gathered weights", bytes=item * (outside + 2 * layer), how=how)
    if passes > 1:
        how = f"4 bytes a parameter, whole while {passes} micro-batches add up"
        yield Part(what="gathered gradients", bytes=4 * shape.parameters, how=how)
    else:
        yield Part(what="gathered gradients", bytes=4 * (outside + 2 * layer), how="4 bytes, likewise")


def _activations(shape: ModelShape, positions: int, *, bf16: bool, checkpointing: bool) -> Part:
    layer = activation_bytes(shape, bf16=bf16)
    if checkpointing:
        kept, how = 4 * shape.width * shape.layers + layer, f"{shape.layers} layers' inputs, and one layer whole"
    else:
        kept, how = layer * shape.layers, f"{layer:,} bytes a position and layer × {shape.layers} layers"
    return Part(what="activations", bytes=positions * kept, how=f"{positions:,} positions × ({how})")


def _of_loss(shape: ModelShape, loss: LossConfig, positions: int, *, bf16: bool) -> Iterator[Part]:
    """`ddk.fused`: the projection's gradient in float32 (in bfloat16 also its cast copy's product), and a chunk's
    logits, of which bfloat16 has a half-size copy beside them, and a temperature other than 1 a second one."""
    how = f"{6 if bf16 else 4} bytes × {shape.rows:,} rows × {shape.width:,}"
    yield Part(what="gradient of the projection", bytes=(6 if bf16 else 4) * shape.head, how=how)
    chunk = min(CHUNK_BYTES["cuda"], 4 * positions * shape.rows)
    copies = (1.5 if bf16 else 1.0) + (loss.temperature != 1.0)
    how = f"{copies:g} × {chunk / 2**20:.0f} MiB, and the hidden states' gradient"
    yield Part(what="logits of the loss", bytes=copies * chunk + 4 * positions * shape.width, how=how)
