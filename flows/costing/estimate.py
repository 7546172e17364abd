"""Estimates the disk space, memory and GPU time of a run before it starts: `ddk plan CONFIG --cost`.

The estimate needs only the configuration and the models' configs (`flows.costing.model_configs`), no corpus, weights or
network, and nothing is hashed. Every figure is shown with its calculation.

    positions   steps × batch_size × seq_len for training; the domains' blocks × seq_len for capture
    disk        `storage.stores.size`: the layout's bound, and what was measured; 12 bytes a parameter for a checkpoint
    memory      `tasks.teachers.memory` for the teacher, `ddk.cost.memory` for the student, of one GPU each
    GPU hours   operations (`ddk.cost.shape`) / (a GPU's peak × the utilisation that is assumed)

Capture takes all blocks of a domain, whether training draws them or not. If `max_train_blocks` is not set, the number
of blocks is unknown until the corpus is read; the estimate then assumes an equal share of what training draws, with a
warning.

GPU hours are estimates, not measurements. They depend mainly on the assumed utilisation, and do not include work
outside the GPU (packing, compression, loading) or the training of ted's filters before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddk.context import plan_context
from ddk.cost.memory import Part
from ddk.cost.shape import FLOAT_BYTES
from ddk.errors import UserError
from flows.config import Config
from flows.costing.model_configs import find_shape
from flows.costing.run_size import GPUS, VALIDATION_BLOCKS, Assumptions, RunSize
from storage.stores.layout import BLOCKS_PER_SHARD, array_specs
from storage.stores.size import expected_target_bytes, most_block_bytes, most_store_bytes
from tasks.teachers.config import target_format
from tasks.teachers.memory import engine_bytes, shared_memory

Section = Literal["models", "positions", "disk", "teacher, one GPU", "student, one GPU", "host", "GPU time"]
Unit = Literal["parameters", "positions", "bytes", "FLOP", "GPU hours", "hours", "USD"]
GIB = 2**30
MOST_PADDING = 1024
"""Rows by which two models of one tokenizer differ, at most: vocabularies are padded to multiples of some number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of the estimate."""

    section: Section
    what: str
    value: float
    unit: Unit
    how: str
    """The formula and its numbers, or the assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The whole estimate."""

    assumed: Assumptions
    figures: list[Figure]
    warnings: list[str]

    def value(self, section: Section, what: str) -> float:
        """Of one figure."""
        return next(figure.value for figure in self.figures if (figure.section, figure.what) == (section, what))


def estimate(config: Config, assumed: Assumptions) -> Cost:
    """Calculate the estimate.

    Raises:
        UserError: a model's config is not available, or the GPUs cannot share the batch.
    """
    of_teacher, of_student = config.teacher, config.student
    teacher, student = (
        find_shape(one.model, one.revision, field)
        for one, field in ((of_teacher, "teacher.model"), (of_student, "student.model"))
    )
    size = RunSize(config=config, assumed=assumed, teacher=teacher, student=student)
    figures = [
        *_models(size),
        *_positions(size),
        *_disk(size),
        *_memory("teacher, one GPU", size.teacher_parts()),
        *_memory("student, one GPU", size.student_parts()),
        *_host(size),
        *_time(size),
    ]
    warnings = [*_unknown_blocks(size), *_too_large(size), *_misfits(size)]
    return Cost(assumed=assumed, figures=figures, warnings=warnings)


def _models(size: RunSize) -> Iterator[Figure]:
    config = size.config
    for who, name, shape in (
        ("teacher", config.teacher.model, size.teacher),
        ("student", config.student.model, size.student),
    ):
        how = (
            f"{name}: {shape.kind}, {shape.layers} layers × {shape.width:,}, {shape.heads} heads "
            f"({shape.kv_heads} of keys and values), {shape.rows:,} rows{', tied' if shape.tied else ''}"
        )
        yield Figure(section="models", what=who, value=shape.parameters, unit="parameters", how=how)


def _positions(size: RunSize) -> Iterator[Figure]:
    train, length = size.config.train, size.seq_len
    of_train, of_validation = size.split_blocks("train"), size.split_blocks("validation")
    times = size.trained / (of_train * length)
    rows = (
        (
            "training",
            size.trained,
            f"{train.steps:,} steps × {train.batch_size:,} blocks × {length:,}; a captured block is drawn "
            f"{times:.2f} times on average",
        ),
        (
            "captured",
            size.stored,
            f"({of_train:,} train + {of_validation:,} validation) blocks of {len(size.config.domains)} domains × "
            f"{length:,}",
        ),
        ("gap", size.measured, f"{size.evaluations} evaluations (one first, one an interval) of all validation blocks"),
    )
    for what, value, how in rows:
        yield Figure(section="positions", what=what, value=value, unit="positions", how=how)


def _disk(size: RunSize) -> Iterator[Figure]:
    teacher, train, length = size.config.teacher, size.config.train, size.seq_len
    form = target_format(teacher)
    each = expected_target_bytes(form, seq_len=length, k=teacher.k, vocab_size=size.teacher.rows)
    specs = array_specs("targets", {"seq_len": length, "k": teacher.k}, form)
    kept, trained = train.keep_checkpoints + 1, size.student.parameters + size.filters
    shapes = (size.teacher, size.student)
    rows = [
        (
            "targets, expected",
            each * size.stored,
            f"{each:.0f} bytes a position: a small teacher's, with room for {size.teacher.rows:,} tokens' ids",
        ),
        ("token blocks, at most", _token_bytes(size), "4 bytes a position, before compression, and indices"),
        ("checkpoints", 12 * trained * kept, f"{kept} (one being written) × 12 bytes × {trained:,} parameters"),
        ("student", 2 * size.student.parameters, "in bfloat16"),
        (
            "models as published",
            sum(FLOAT_BYTES.get(shape.dtype, 2) * shape.parameters for shape in shapes),
            " and ".join(shape.dtype for shape in shapes),
        ),
    ]
    rows.append(("total, expected", sum(value for _, value, _ in rows), "all of the above"))
    how = f"{most_block_bytes(specs) / length:.0f} bytes a position: the layout before compression"
    most = sum(most_store_bytes(specs, splits, teacher.shard_blocks) for splits in size.splits.values())
    rows.append(("targets, at most", most, how))
    for what, value, how in rows:
        yield Figure(section="disk", what=what, value=value, unit="bytes", how=how)


def _token_bytes(size: RunSize) -> int:
    """Of all domains' token blocks, at most."""
    found = 0
    for name, splits in size.splits.items():
        corpus = size.config.domains[name]
        marked = corpus.prompt_field is not None or corpus.messages
        specs = array_specs("blocks", {"seq_len": size.seq_len, "marked": int(marked)})
        found += most_store_bytes(specs, splits, BLOCKS_PER_SHARD)
    return found


def _memory(section: Section, parts: list[Part]) -> Iterator[Figure]:
    for part in parts:
        yield Figure(section=section, what=part.what, value=part.bytes, unit="bytes", how=part.how)
    if parts:
        total = sum(part.bytes for part in parts)
        yield Figure(section=section, what="total", value=total, unit="bytes", how="at the peak")


def _host(size: RunSize) -> Iterator[Figure]:
    teacher, processes = size.config.teacher, size.processes
    shared = shared_memory(teacher, seq_len=size.seq_len)
    how = f"in /dev/shm, a shard of {teacher.shard_blocks} blocks; a container has 64 MB by default"
    yield Figure(section="host", what="shared memory in capture", value=shared, unit="bytes", how=how)
    loading = 4 * size.student.parameters * processes
    how = f"the student in float32 in each of {processes} process{'es' if processes > 1 else ''}, before its GPU has it"
    yield Figure(section="host", what="memory as training starts", value=loading, unit="bytes", how=how)


def _time(size: RunSize) -> Iterator[Figure]:
    assumed, live = size.assumed, ", teacher beside it" if size.live else ""
    again = ", layers once more" if size.config.train.activation_checkpointing else ""
    stages = (
        ("capture", size.captured, size.capture_flops, "forward"),
        ("training", size.trained, size.train_flops, f"forward and backward{again}{live}"),
        ("gap", size.measured, size.gap_flops, "forward"),
    )
    hours = {}
    for stage, positions, flops, passes in stages:
        hours[stage] = assumed.hours(flops * positions)
        how = f"{positions:,} positions × {flops / 1e9:.3g} GFLOP: {passes}"
        yield Figure(section="GPU time", what=f"{stage}, operations", value=flops * positions, unit="FLOP", how=how)
    rate = f"at {GPUS[assumed.gpu].flops / 1e12:.0f} TFLOP/s × {assumed.mfu:g}: an estimate, not measured"
    for stage, value in (hours | {"all": sum(hours.values())}).items():
        yield Figure(section="GPU time", what=stage, value=value, unit="GPU hours", how=rate)
    for what, value, gpus in (
        ("capture, by the clock", hours["capture"], size.config.teacher.tensor_parallel_size),
        ("training and gap, by the clock", hours["training"] + hours["gap"], size.ranks),
    ):
        yield Figure(section="GPU time", what=what, value=value / gpus, unit="hours", how=f"GPU hours / {gpus}")
    if assumed.usd_per_hour is not None:
        price, how = sum(hours.values()) * assumed.usd_per_hour, f"{assumed.usd_per_hour:g} USD × GPU hours"
        yield Figure(section="GPU time", what="price", value=price, unit="USD", how=how)


def _unknown_blocks(size: RunSize) -> Iterator[str]:
    domains = size.config.domains
    unknown = [name for name, domain in domains.items() if domain.max_train_blocks is None]
    if unknown:
        each = f"{size.blocks['train'][unknown[0]]:,} blocks each"
        why = "--blocks" if size.assumed.blocks else "an equal share of what training draws"
        yield (
            f"max_train_blocks is not set for {', '.join(unknown)}; assuming {each} ({why}), and capture "
            f"takes all that the files hold: set it, or give --blocks"
        )
    fine = [name for name, domain in domains.items() if domain.path_field is not None]
    if fine:
        yield (
            f"the limits of {', '.join(fine)} hold for each leaf of path_field, whose number only the records tell; "
            f"one is assumed"
        )
    unknown = [name for name, domain in domains.items() if domain.max_validation_blocks is None]
    if unknown:
        yield f"max_validation_blocks is not set for {', '.join(unknown)}; assuming {VALIDATION_BLOCKS} each"


def _too_large(size: RunSize) -> Iterator[str]:
    gib, utilization = size.assumed.gib, size.config.teacher.gpu_memory_utilization
    teacher, student = size.teacher_parts(), sum(part.bytes for part in size.student_parts()) / GIB
    needed, whole = engine_bytes(teacher) / GIB, sum(part.bytes for part in teacher) / GIB
    if needed > utilization * gib or whole > gib:
        yield (
            f"the teacher needs {needed:.1f} GiB of each GPU and {whole - needed:.1f} beside; vLLM may take "
            f"{utilization * gib:.1f} of {gib:g}: raise teacher.tensor_parallel_size, or lower teacher.max_batch_tokens"
        )
    if student > gib:
        yield (
            f"training needs {student:.1f} GiB of each GPU, which has {gib:g}: lower train.micro_batch_size, or set "
            f"train.activation_checkpointing: true, or train.parallel: fsdp"
        )


def _misfits(size: RunSize) -> Iterator[str]:
    student = size.config.student
    if student.context is not None:
        try:
            plan_context(student.context, size.student.positions, size.seq_len, student.model)
        except UserError as error:
            yield str(error)
    for field, shape, needed in (
        ("teacher.model", size.teacher, size.seq_len + 1),
        ("student.model", size.student, size.seq_len),
    ):
        longer = field == "student.model" and student.context is not None
        if not longer and shape.positions is not None and needed > shape.positions:
            yield f"{field} takes {shape.positions:,} positions, and packing.seq_len is {size.seq_len:,}; lower it"
    rows, own = size.teacher.rows, size.student.rows
    if abs(rows - own) > MOST_PADDING:
        yield (
            f"the teacher predicts {rows:,} tokens and the student {own:,}, which is more than padding "
            f"explains; do they share a tokenizer?"
        )
