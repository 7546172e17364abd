"""Trains the student, one interval at a time, on one process or several.

At every step: the sampler draws a batch under the interval's mixture, each rank takes its share of it, the loader
brings its blocks and targets, they go through the model in micro-batches whose gradients add up to the gradient of the
mean over all positions that carry loss (of all ranks and micro-batches together), the gradient is clipped, AdamW steps
at the step's learning rate.

Everything that the next step depends on is in `TrainerState` (small, JSON) and in the tensors of a checkpoint
(`ddk.saving`); a trainer that loads both continues bit for bit (on the CPU, on as many ranks; on a GPU as far as its
kernels are deterministic). The learning rate is a function of the step, so there is no scheduler to save.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ddk.context import ContextPlan, Stretch
from ddk.data import Batch, TrainData, prefetch
from ddk.errors import UserError
from ddk.gap import HeldOut, held_out
from ddk.loss import Teacher, position_gamma, teacher_of
from ddk.parallel import Precision, World, spread, synchronise, whole
from ddk.sampler import SamplerState, draw, initial_state
from ddk.schedule import learning_rate
from ddk.selection import block_losses
from ddk.student import StudentLoss, layers_of
from ddk.train_config import LossConfig, TrainConfig
from ddk.values import BlockReader, BoolArray, Draw, Mixture, TargetReader


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """The state of a training besides its tensors."""

    sampler: SamplerState
    mixture_versions: tuple[int, ...] = ()
    """Version of the mixture that each interval so far was trained under."""
    optimizer_start: int = 0
    """Step at which the optimizer began with empty moments: above 0 in a run that took another one's weights alone."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.sampler.step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step measured. Sums of a window are for the caller."""

    step: int
    """Steps done, this one included."""
    ce: float
    """Mean cross-entropy per position that carries loss, over the global batch, natural log."""
    kl: float
    """Mean divergence likewise; 0 where no targets are read."""
    loss: float
    """What was trained on, likewise: ce + γ·kl, each position's divergence times its own γ, and ted's term."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Positions of the global batch."""
    seconds: float
    waited_seconds: float
    """The part of `seconds` that the first rank spent waiting for data."""


def resolve_device(config: TrainConfig) -> torch.device:
    """The device that the configuration means on this machine.

    Raises:
        UserError: 'cuda' is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda' and this machine has no usable GPU; set it to 'auto' or 'cpu'")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_processes(config: TrainConfig, device: torch.device) -> int:
    """Processes on this machine.

    Raises:
        UserError: they cannot share the batch.
    """
    automatic = torch.cuda.device_count() if device.type == "cuda" else 1
    processes = automatic if config.processes == "auto" else config.processes
    if device.type == "cuda" and processes > automatic:
        raise UserError(f"train.processes is {processes} and this machine has {automatic} GPUs; lower it")
    try:
        config.share(processes * config.nodes)
    except ValueError as error:
        raise UserError(f"train: {error}; change train.batch_size, or set train.processes") from None
    return processes


def resolve_precision(config: TrainConfig, device: torch.device) -> Precision:
    """bf16 only where asked for, or where 'auto' meets a GPU that computes in it."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


Wrap = Callable[[Any, int, LossConfig], StudentLoss]


class Trainer:
    """One student in training: the part of one rank.

    Args:
        model: a causal language model in float32, the same on every rank; moved to the device.
        data: train blocks and, where the loss reads them, targets of every domain.
        vocab_size: tokens of the tokenizer; the model's rows beyond it are padding.
        seed: of the sampler and of whatever the model draws (dropout).
        separator: the token behind which a document begins, or several such, for `loss.mask_document_starts`.
        wrap: makes a module that computes the loss out of model, vocab_size and loss; a method that adds terms has one
            of its own.
        schedule_start: step at which the learning rate's warm-up begins.
        world: the processes; alone by default, on the device of `config`.
        context: how the student is prepared for longer contexts; None: it only sees ordinary positions.

    Raises:
        ValueError: the loss has a KL term and the data no targets, or the ranks cannot share the batch.
        UserError: `context` is given, and the model's rotary embedding cannot be shown other positions.
    """

    def __init__(
        self,
        model: Any,
        data: TrainData,
        *,
        config: TrainConfig,
        loss: LossConfig,
        vocab_size: int,
        seed: int,
        separator: int | tuple[int, ...] | None = None,
        wrap: Wrap = StudentLoss,
        schedule_start: int = 0,
        world: World | None = None,
        context: ContextPlan | None = None,
    ) -> None:
        if loss.gamma > 0.0 and data.targets is None:
            raise ValueError(f"loss.gamma is {loss.gamma} and there are no targets to take the KL with; set it to 0")
        if loss.mask_document_starts and separator is None:
            raise ValueError("loss.mask_document_starts needs to know the token that ends a document")
        self.config = config
        self.loss = loss
        self.context = context
        self.data = data if loss.gamma > 0.0 else replace(data, targets=None)
        self.vocab_size = vocab_size
        self.seed = seed
        self._schedule_start = schedule_start
        self._separator = separator if loss.mask_document_starts else None
        self.world = world or World(device=resolve_device(config))
        self._share = config.share(self.world.size)
        self.device = self.world.device
        self.precision = resolve_precision(config, self.device)
        self.model = model.to(self.device).train()
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student = wrap(self.model, vocab_size, loss)
        if context is not None:
            _ = student.shown  # refuses what it cannot show
        layers = layers_of(self.model)
        if config.compile:
            for layer in layers:
                layer.compile()
        self._student = spread(student, layers, self.world, config.parallel, self.precision == "bf16")
        # Tied weights appear once here, under their first name.
        self.parameters: dict[str, torch.nn.Parameter] = dict(self.model.named_parameters()) | student.extra_parameters
        self.optimizer = self._make_optimizer()
        self.state = TrainerState(sampler=initial_state(data.sizes))

    @property
    def done(self) -> bool:
        return self.state.step >= self.config.steps

    @property
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context of a forward pass."""
        sharded = self.config.parallel == "fsdp" and self.world.size > 1  # FSDP casts by itself
        if self.precision == "fp32" or sharded:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def train_interval(
        self,
        mixture: Mixture,
        version: int,
        steps: int,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        """Train `steps` steps under one mixture (fewer where the training ends before; no interval once it has).

        Args:
            mixture: in force for the whole interval.
            version: its number in the run's history, kept in the state.
            steps: the interval's length K.

        Raises:
            FloatingPointError: the loss is no longer finite; nothing has been changed by that step.
        """
        steps = min(steps, self.config.steps - self.state.step)
        if steps < 1:
            return
        plans, states = self._plan(mixture, steps)
        batches = prefetch(plans, self.data)
        with contextlib.closing(batches):  # type: ignore[type-var]
            for sampler_state in states:
                started = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - started
                ce, kl, loss, norm, rate = self._step(batch)
                self.state = replace(self.state, sampler=sampler_state)
                on_step(
                    StepReport(
                        step=self.state.step,
                        ce=ce,
                        kl=kl,
                        loss=loss,
                        learning_rate=rate,
                        gradient_norm=norm,
                        tokens=self.world.size * batch.tokens_BL1[:, 1:].size,
                        seconds=time.perf_counter() - started,
                        waited_seconds=waited,
                    )
                )
        self.state = replace(self.state, mixture_versions=(*self.state.mixture_versions, version))

    def perplexity(self, blocks: BlockReader, *, as_saved: bool = False) -> float:
        """ℓ of the student as it is now; see `held_out`."""
        return self.held_out(blocks, as_saved=as_saved).ppl

    def held_out(self, blocks: BlockReader, targets: TargetReader | None = None, *, as_saved: bool = False) -> HeldOut:
        """ℓ of the student as it is now, and its divergence from the teacher where there are targets of the blocks.

        Every rank measures its share of the blocks and learns the result. With a `context`, positions are ordinary
        ones (`ContextPlan.gap_scale`).

        Args:
            as_saved: measure at the positions that the saved student has.

        Raises:
            ValueError: there are no blocks, or not as many targets.
        """
        scale = 1.0
        if self.context is not None:
            scale = self.context.factor if as_saved else self.context.gap_scale
        with self.autocast:
            return held_out(
                self._student,
                blocks,
                targets,
                self.loss,
                batch_size=self.config.micro_batch_size or self._share,
                world=self.world,
                scale=scale,
            )

    def block_losses(self, blocks: BlockReader, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Mean cross-entropy of each block under the student as it is now; see `ddk.selection.block_losses`."""
        was_training = self._student.training
        self._student.eval()
        try:
            with self.autocast:
                return block_losses(self._student, blocks, indices, self.device)
        finally:
            self._student.train(was_training)

    def _plan(self, mixture: Mixture, steps: int) -> tuple[list[Sequence[Draw]], list[SamplerState]]:
        """This rank's share of every batch, and the state after it."""
        plans: list[Sequence[Draw]] = []
        states: list[SamplerState] = []
        state, windows = self.state.sampler, self.data.windows(self.config.shuffle_mib)
        for _ in range(steps):
            batch, state = draw(mixture, self.data.sizes, self.seed, state, self.config.batch_size, windows)
            plans.append(self.world.share(batch))
            states.append(state)
        return plans, states

    def _step(self, batch: Batch) -> tuple[float, float, float, float, float]:
        """Returns mean CE, mean KL, the loss, the gradient's norm before clipping, and the learning rate."""
        step = self.state.step
        # Keyed by the step, so that a model with dropout resumes with the same draws; by the rank, so that two ranks
        # draw different ones. Hashed, because torch's generator on the CPU takes the low 32 bits only: a seed in the
        # high ones would change nothing.
        key = [self.seed, step] + ([self.world.rank] if self.world.rank else [])
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        rate = learning_rate(self.config, step, self._schedule_start)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        valid_BL = batch.valid(self._separator)
        positions = self._positions(batch, valid_BL)
        stretch = self._stretch(len(batch.tokens_BL1))
        sums = torch.zeros(3, device=self.device)
        parts = list(self._micro_batches(len(batch.tokens_BL1)))
        for rows in parts:
            synchronise(self._student, rows is parts[-1])
            # Sums over the global batch's positions, so that micro-batches and ranks add up to the mean over all of
            # them; times the ranks, because gradients are averaged over these.
            total, ce, kl = self._forward(batch, valid_BL, rows, self.world.size / positions, stretch)
            total.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([ce, kl, total.detach()])
        norm = whole(
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip or math.inf)
        ).item()
        sum_ce, sum_kl, scaled = self.world.total(sums).tolist()
        mean_ce, mean_kl, loss = sum_ce / positions, sum_kl / positions, scaled / self.world.size
        if not all(map(math.isfinite, (mean_ce, mean_kl, norm))):
            raise FloatingPointError(
                f"step {step}: cross-entropy {mean_ce}, KL {mean_kl}, gradient norm {norm}; the training "
                f"has diverged: lower train.learning_rate and resume from the newest checkpoint"
            )
        self.optimizer.step()
        return mean_ce, mean_kl, loss, norm, rate

    def _positions(self, batch: Batch, valid_BL: BoolArray | None) -> int:
        """That carry loss, in the global batch; at least 1."""
        if valid_BL is None:
            return self.world.size * batch.tokens_BL1[:, 1:].size
        counted = torch.tensor(int(valid_BL.sum()), dtype=torch.int64, device=self.device)
        return max(1, int(self.world.total(counted).item()))

    def _micro_batches(self, blocks: int) -> Iterator[slice]:
        size = self.config.micro_batch_size or blocks
        for start in range(0, blocks, size):
            yield slice(start, start + size)

    def _stretch(self, blocks: int) -> Stretch | None:
        """The positions that this rank's part of the step's batch is shown."""
        if self.context is None:
            return None
        rows = [self.world.rank + self.world.size * row for row in range(blocks)]
        return self.context.draw(self.seed, self.state.step, rows)

    def _forward(
        self, batch: Batch, valid_BL: BoolArray | None, rows: slice, scale: float, stretch: Stretch | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self._on_device(batch.tokens_BL1[rows]).long()
        stretch = None if stretch is None else stretch[rows]
        teacher = self._teacher(batch, rows, stretch)
        valid = None if valid_BL is None else self._on_device(valid_BL[rows])
        with self.autocast:
            found: tuple[Tensor, Tensor, Tensor] = self._student(
                tokens[:, :-1], tokens[:, 1:], valid, teacher, scale, stretch
            )
        return found

    def _teacher(self, batch: Batch, rows: slice, stretch: Stretch | None) -> Teacher | None:
        """What the micro-batch is compared with; None for cross-entropy alone."""
        until, targets = self.loss.gamma_until, batch.targets
        if targets is None or (until is not None and self.state.step >= until):
            return None
        teacher = teacher_of(targets, self.loss, self.device, rows)
        entropy_BL = None if targets.entropy_BL is None else targets.entropy_BL[rows]
        length = targets.tail_mass_BL.shape[1]
        gamma_BL = position_gamma(self.loss, batch.domains[rows], entropy_BL, length)
        if stretch is not None and self.context is not None and not self.context.distil:
            if gamma_BL is None:
                gamma_BL = np.full((len(stretch), length), self.loss.gamma, np.float32)
            gamma_BL[stretch.changed] = 0.0
        return teacher if gamma_BL is None else replace(teacher, gamma_T=self._on_device(gamma_BL).flatten())

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _make_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.parameters.values() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.requires_grad and p.ndim < 2]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.config.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            fused=self.device.type == "cuda",
        )
