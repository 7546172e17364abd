"""Trains the student, one interval at a time.

At every step: the sampler draws a batch under the interval's mixture, the loader brings its blocks and targets, the
batch goes through the model in micro-batches whose gradients add up to the gradient of the mean over all positions,
the gradient is clipped, AdamW steps at the step's learning rate.

Everything that the next step depends on is in `TrainerState` (small, JSON) and in the tensors that `tensors`
returns; a trainer that loads both continues bit for bit (on the CPU; on a GPU as far as its kernels are
deterministic). The learning rate is a function of the step, so there is no scheduler to save.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ddk.data import Batch, TrainData, prefetch
from ddk.errors import UserError
from ddk.loss import LossConfig, LossSums, cross_entropy_sum, distillation_sums
from ddk.sampler import SamplerState, draw, initial_state
from ddk.student import forward_logits
from ddk.types import Draw, Mixture


class TrainConfig(BaseModel):
    """How the student is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(ge=1)
    """Optimizer steps in all."""
    batch_size: int = Field(ge=1)
    """Blocks an optimizer step (over all devices)."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Blocks a forward and backward pass; smaller needs less memory. Must divide batch_size. Default: batch_size."""
    learning_rate: float = Field(default=3e-5, gt=0.0)
    """Peak, reached after the warm-up."""
    min_learning_rate: float = Field(default=3e-6, ge=0.0)
    """Where the cosine ends, at the last step."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up from 0."""
    weight_decay: float = Field(default=0.1, ge=0.0)
    """AdamW's, on matrices; biases and norms have none."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's decay of the second moment."""
    gradient_clip: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient; null for no clipping."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """'auto' takes the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward pass; weights and optimizer are always float32. 'auto': bf16 on a GPU that has it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay."""
    log_every: int = Field(default=100, ge=1)
    """Steps between two lines of the log, besides the one at the end of each interval."""

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> TrainConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Where a training stands, besides its tensors."""

    sampler: SamplerState
    mixture_versions: tuple[int, ...] = ()
    """Version of the mixture that each interval so far was trained under."""

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
    """Mean cross-entropy per position of the batch, natural log."""
    kl: float
    """Mean KL per position; 0 where no targets are read."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    """Positions of the batch."""
    seconds: float
    waited_seconds: float
    """The part of `seconds` spent waiting for data."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step `step` (from 0): linear from 0 to the peak over the warm-up, then a cosine down to the minimum.

    Example: warmup_steps 10, steps 110: step 4 has half the peak, step 9 all of it, step 109 the minimum.
    """
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def resolve_device(config: TrainConfig) -> torch.device:
    """The device that the configuration means on this machine.

    Raises:
        UserError: 'cuda' is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda' and this machine has no usable GPU; set it to 'auto' or 'cpu'")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(config: TrainConfig, device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 only where asked for, or where 'auto' meets a GPU that computes in it."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


class Trainer:
    """One student in training on one device.

    Args:
        model: a causal language model in float32; moved to the device.
        data: train blocks and, where the loss reads them, targets of every domain.
        vocab_size: tokens of the tokenizer; the model's rows beyond it are padding.
        seed: of the sampler and of whatever the model draws (dropout).

    Raises:
        ValueError: the loss has a KL term and the data no targets.
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
    ) -> None:
        if loss.gamma > 0.0 and data.targets is None:
            raise ValueError(f"loss.gamma is {loss.gamma} and there are no targets to take the KL with; set it to 0")
        self.config = config
        self.loss = loss
        self.data = data if loss.gamma > 0.0 else replace(data, targets=None)
        self.vocab_size = vocab_size
        self.seed = seed
        self.device = resolve_device(config)
        self.precision = resolve_precision(config, self.device)
        self.model = model.to(self.device).train()
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Tied weights appear once here, under their first name.
        self._parameters: dict[str, torch.nn.Parameter] = dict(self.model.named_parameters())
        self._optimizer = self._make_optimizer()
        self.state = TrainerState(sampler=initial_state(data.sizes))

    @property
    def done(self) -> bool:
        return self.state.step >= self.config.steps

    @property
    def autocast(self) -> torch.autocast | None:
        """The context of a forward pass; None in float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else None

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
                ce, kl, norm, rate = self._step(batch)
                self.state = replace(self.state, sampler=sampler_state)
                on_step(
                    StepReport(
                        step=self.state.step,
                        ce=ce,
                        kl=kl,
                        learning_rate=rate,
                        gradient_norm=norm,
                        tokens=batch.tokens_BL1[:, 1:].size,
                        seconds=time.perf_counter() - started,
                        waited_seconds=waited,
                    )
                )
        self.state = replace(self.state, mixture_versions=(*self.state.mixture_versions, version))

    def _plan(self, mixture: Mixture, steps: int) -> tuple[list[Sequence[Draw]], list[SamplerState]]:
        plans: list[Sequence[Draw]] = []
        states: list[SamplerState] = []
        state = self.state.sampler
        for _ in range(steps):
            batch, state = draw(mixture, self.data.sizes, self.seed, state, self.config.batch_size)
            plans.append(batch)
            states.append(state)
        return plans, states

    def _step(self, batch: Batch) -> tuple[float, float, float, float]:
        """Returns mean CE, mean KL, the gradient's norm before clipping, and the learning rate."""
        step = self.state.step
        # Keyed by the step, so that a model with dropout resumes with the same draws. Hashed, because torch's
        # generator on the CPU takes the low 32 bits only: a seed in the high ones would change nothing.
        torch.manual_seed(int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0]))
        rate = learning_rate(self.config, step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        positions = batch.tokens_BL1[:, 1:].size
        ce = torch.zeros((), device=self.device)
        kl = torch.zeros((), device=self.device)
        for rows in self._micro_batches(len(batch.tokens_BL1)):
            sums = self._forward(batch, rows)
            # Sums over the batch's positions, so that micro-batches add up to the mean over all of them.
            loss: Tensor = (sums.ce + self.loss.gamma * sums.kl) / positions
            loss.backward()  # type: ignore[no-untyped-call]
            ce += sums.ce.detach()
            kl += sums.kl.detach()
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.config.gradient_clip or math.inf)
        mean_ce, mean_kl, gradient_norm = ce.item() / positions, kl.item() / positions, norm.item()
        if not all(map(math.isfinite, (mean_ce, mean_kl, gradient_norm))):
            raise FloatingPointError(
                f"step {step}: cross-entropy {mean_ce}, KL {mean_kl}, gradient norm {gradient_norm}; the training "
                f"has diverged: lower train.learning_rate and resume from the newest checkpoint"
            )
        self._optimizer.step()
        return mean_ce, mean_kl, gradient_norm, rate

    def _micro_batches(self, blocks: int) -> Iterator[slice]:
        size = self.config.micro_batch_size or blocks
        for start in range(0, blocks, size):
            yield slice(start, start + size)

    def _forward(self, batch: Batch, rows: slice) -> LossSums:
        tokens = self._on_device(batch.tokens_BL1[rows]).long()
        logits_TV = forward_logits(self.model, tokens[:, :-1], self.vocab_size, self.autocast).flatten(0, 1)
        labels_T = tokens[:, 1:].flatten()
        if batch.targets is None:
            ce = cross_entropy_sum(logits_TV, labels_T)
            return LossSums(ce=ce, kl=torch.zeros_like(ce))
        return distillation_sums(
            logits_TV,
            labels_T,
            self._on_device(batch.targets.ids_BLK[rows]).long().flatten(0, 1),
            self._on_device(batch.targets.logprobs_BLK[rows]).flatten(0, 1),
            self._on_device(batch.targets.tail_mass_BL[rows]).flatten(),
            tail=self.loss.tail,
            temperature=self.loss.temperature,
        )

    def _on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _make_optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self._parameters.values() if p.requires_grad and p.ndim >= 2]
        others = [p for p in self._parameters.values() if p.requires_grad and p.ndim < 2]
        return torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.config.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            fused=self.device.type == "cuda",
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that the next step depends on: `model` (weights by name) and `optimizer` (`<what>.<name>`)."""
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for what, value in self._optimizer.state.get(parameter, {}).items():
                optimizer[f"{what}.{name}"] = value.detach().cpu()
        return {"model": {name: p.detach().cpu() for name, p in self._parameters.items()}, "optimizer": optimizer}

    def load(self, state: TrainerState, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up where `state` and `tensors` were saved.

        Raises:
            ValueError: the tensors are of another model (the first name that differs is given), the optimizer's do
                not cover it, or the state is of other domains.
        """
        if set(state.sampler.drawn) != set(self.data.sizes):
            raise ValueError(
                f"the checkpoint is of domains {sorted(state.sampler.drawn)}, this run has {sorted(self.data.sizes)}"
            )
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        # A missing moment would restart at zero, and nobody would notice.
        wanted = {f"{what}.{name}" for name in trained for what in ("exp_avg", "exp_avg_sq", "step")}
        if state.step > 0 and (differing := sorted(wanted ^ set(tensors["optimizer"]))):
            raise ValueError(
                f"the checkpoint's optimizer is of another model: '{differing[0]}' is in only one of the two"
            )
        load_weights(self._parameters, tensors["model"])
        self._optimizer.state.clear()
        for key, value in tensors["optimizer"].items():
            what, name = key.split(".", 1)
            parameter = self._parameters[name]
            # AdamW keeps its step count on the CPU unless it is fused.
            device = parameter.device if what != "step" or self.device.type == "cuda" else torch.device("cpu")
            self._optimizer.state[parameter][what] = value.to(device).clone()
        self.state = state


def load_weights(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy saved weights into a model's parameters.

    Raises:
        ValueError: names or shapes differ.
    """
    if differing := sorted(set(parameters) ^ set(weights)):
        raise ValueError(f"the checkpoint is of another model: '{differing[0]}' is in only one of the two")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"the checkpoint is of another model: '{name}' has shape {tuple(weights[name].shape)} there and "
                    f"{tuple(parameter.shape)} here"
                )
            parameter.copy_(weights[name])
