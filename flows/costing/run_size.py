"""A run's quantities, from its configuration and its models' shapes: positions, operations, parts of a GPU's memory.

`flows.costing.estimate` turns them into figures. `Assumptions` holds what the configuration does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ddk.cost.memory import Part, student_memory
from ddk.cost.shape import ModelShape
from ddk.errors import UserError
from ddk.methods.registry import METHODS, effective_loss
from ddk.ted.student import matched_layers
from ddk.values import SPLITS, Split
from flows.config import Config
from tasks.teachers.memory import teacher_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """By its vendor's data sheet."""

    flops: float
    """Dense bfloat16 operations a second, at the peak."""
    gib: float
    """Memory."""


GPUS = {
    "a100": Gpu(flops=312e12, gib=80),  # A100 SXM, 80 GB
    "h100": Gpu(flops=989e12, gib=80),  # H100 SXM
    "h200": Gpu(flops=989e12, gib=140),  # H200 SXM
}
VALIDATION_BLOCKS = 500
"""A domain's, where nothing says how many: the paper's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What the configuration does not say.

    Raises:
        UserError: an unknown GPU, or a number out of range.
    """

    gpu: str = "h100"
    """One of `GPUS`."""
    gpu_memory: float | None = None
    """GiB of a GPU; None: what the kind has."""
    gpus: int = 1
    """Of a machine, where `train.processes` is 'auto'."""
    mfu: float = 0.4
    """Model FLOP/s utilisation: the share of the peak that capture and training reach."""
    usd_per_hour: float | None = None
    """Price of a GPU."""
    blocks: int | None = None
    """Train blocks of a domain whose `max_train_blocks` is not set."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu is '{self.gpu}'; there are {', '.join(GPUS)}")
        if self.gpu_memory is not None and not 1.0 <= self.gpu_memory < 1e6:
            raise UserError(f"--gpu-memory is {self.gpu_memory}; it is a number of GiB, e.g. 80")
        if not 0.0 < self.mfu <= 1.0:
            raise UserError(f"--mfu is {self.mfu}; it is a share of the peak, above 0 and at most 1, e.g. 0.4")

    @property
    def gib(self) -> float:
        """Memory of a GPU."""
        return GPUS[self.gpu].gib if self.gpu_memory is None else self.gpu_memory

    def hours(self, flops: float) -> float:
        """GPU hours of so many operations."""
        return flops / (GPUS[self.gpu].flops * self.mfu) / 3600


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """One run."""

    config: Config
    assumed: Assumptions
    teacher: ModelShape
    student: ModelShape

    @property
    def seq_len(self) -> int:
        return self.config.packing.seq_len

    @property
    def processes(self) -> int:
        """On one machine."""
        processes = self.config.train.processes
        return self.assumed.gpus if processes == "auto" else processes

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.processes * self.config.train.nodes

    @property
    def live(self) -> bool:
        """Whether the teacher runs beside the student."""
        return METHODS[self.config.method].needs_teacher

    @property
    def trained(self) -> int:
        """Positions of training."""
        return self.config.train.steps * self.config.train.batch_size * self.seq_len

    @cached_property
    def blocks(self) -> Mapping[Split, Mapping[str, int]]:
        """By split and domain; see `flows.costing.estimate` for what is not set."""
        config, assumed = self.config, self.assumed.blocks
        share = max(1, config.train.steps * config.train.batch_size // len(config.domains))
        limits = {name: (d.max_train_blocks, d.max_validation_blocks) for name, d in config.domains.items()}
        return {
            "train": {name: train or assumed or share for name, (train, _) in limits.items()},
            "validation": {name: validation or VALIDATION_BLOCKS for name, (_, validation) in limits.items()},
        }

    @property
    def splits(self) -> Mapping[str, tuple[int, ...]]:
        """By domain: the blocks of its splits."""
        return {name: tuple(self.blocks[split][name] for split in SPLITS) for name in self.config.domains}

    def split_blocks(self, split: Split) -> int:
        """Of all domains."""
        return sum(self.blocks[split].values())

    @property
    def stored(self) -> int:
        """Positions with targets, of both splits."""
        return self.seq_len * sum(map(self.split_blocks, SPLITS))

    @property
    def captured(self) -> int:
        """Those of them that the teacher runs for; the others' predictions come from files."""
        runs = [name for name, domain in self.config.domains.items() if not domain.imported]
        return self.seq_len * sum(self.blocks[split][name] for split in SPLITS for name in runs)

    @property
    def evaluations(self) -> int:
        """Of the gap: one before the first step, one after each interval."""
        return -(-self.config.train.steps // self.config.mixture.interval) + 1

    @property
    def measured(self) -> int:
        """Positions of all evaluations."""
        return self.evaluations * self.split_blocks("validation") * self.seq_len

    @property
    def pairs(self) -> int:
        """Of layers that method ted matches; 0 with another."""
        if not self.live:
            return 0
        return len(matched_layers(self.student.layers, self.teacher.layers, self.config.ted.layers))

    @property
    def filters(self) -> int:
        """Trained parameters besides the student's: ted's, from its width to the teacher's."""
        return self.pairs * (self.student.width + 1) * self.teacher.width

    def teacher_parts(self) -> list[Part]:
        """Of one GPU, in capture."""
        return teacher_memory(self.teacher, self.config.teacher, seq_len=self.seq_len)

    def student_parts(self) -> list[Part]:
        """Of one GPU, in training.

        Raises:
            UserError: the ranks cannot share the batch.
        """
        loss, train = effective_loss(self.config.method, self.config.loss), self.config.train
        try:
            found = student_memory(
                self.student, train, loss, seq_len=self.seq_len, ranks=self.ranks, extra=self.filters
            )
        except ValueError as error:
            raise UserError(f"train: {error}; change train.batch_size, or the number of GPUs") from None
        return [*found, self._live_teacher()] if self.live else found

    def _live_teacher(self) -> Part:
        item = 4 if self.config.train.precision == "fp32" else 2
        frozen = self.pairs * (self.teacher.width + 1) * self.teacher.width
        how = f"{item} bytes × {self.teacher.parameters:,} parameters, 4 × {frozen:,} of its filters"
        return Part(what="live teacher", bytes=item * self.teacher.parameters + 4 * frozen, how=how)

    @property
    def capture_flops(self) -> float:
        """Operations to capture one position."""
        return self.teacher.forward_flops(self.seq_len)

    @property
    def train_flops(self) -> float:
        """Operations to train on one position."""
        own = self.student.train_flops(self.seq_len, recompute=self.config.train.activation_checkpointing)
        return own + (self.capture_flops if self.live else 0.0)

    @property
    def gap_flops(self) -> float:
        """Operations to evaluate one position."""
        return self.student.forward_flops(self.seq_len)
