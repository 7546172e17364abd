"""One rank's part of a run's training: the trainer, its stores and its checkpoints. Knows nothing of Prefect.

In one process this is all there is; with several, each holds one of these, and `tasks.training.processes` stands for
them in the flow's process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from ddk import saving
from ddk.context import stretched_config
from ddk.data import First, TrainData
from ddk.gap import HeldOut
from ddk.parallel import World
from ddk.student import StudentLoss, load_student, save_student, student_weights
from ddk.ted.filters import train_filters
from ddk.ted.student import TedStudent
from ddk.train_config import LossConfig
from ddk.trainer import StepReport, Trainer, TrainerState, resolve_precision
from ddk.values import BlockReader, Mixture
from storage.errors import StoreDamagedError, os_error_of
from storage.files import uri
from storage.runs.checkpoints import CheckpointFolder
from tasks.training.job import TrainingJob, open_data
from tasks.training.rank_state import state_as_json, state_from_json

OnStep = Callable[[StepReport], None]


class Training(Protocol):
    """A student in training, here or in processes of its own."""

    @property
    def state(self) -> TrainerState: ...

    def train_interval(self, mixture: Mixture, version: int, steps: int, on_step: OnStep) -> None:
        """See `ddk.trainer.Trainer.train_interval`."""
        ...

    def perplexities(self, sample: Mapping[str, int] | None = None) -> dict[str, float]:
        """ℓ_S by domain, on the validation blocks.

        Args:
            sample: of some domains, on how many of the first blocks, at the positions that the saved student has;
                None: of all, on all, at ordinary positions.
        """
        ...

    def held_out(self) -> dict[str, HeldOut]:
        """By domain, on all validation blocks: ℓ_S and, where the loss reads targets, the divergence from these."""
        ...

    def save(self) -> None:
        """A checkpoint of the present state; those beyond `keep_checkpoints` go."""
        ...

    def export(self, folder: str) -> None:
        """The student as a Hugging Face folder (without tokenizer); a local folder on this machine."""
        ...

    def close(self) -> None:
        """Release everything; this object is not used any more."""
        ...


class RankTraining:
    """The part of one rank. All ranks must call the same methods in the same order.

    Args:
        world: the ranks.
        say: takes a line for the log, on rank 0.
    """

    def __init__(self, job: TrainingJob, world: World, say: Callable[[str], None] = lambda line: None) -> None:
        self._job = job
        self._world = world
        self._checkpoints = CheckpointFolder(job.run_url)
        # One looks, so that all take the same.
        steps = world.from_first(self._checkpoints.steps() if world.is_first else None)
        data = open_data(job)
        self._trainer = Trainer(
            load_student(job.student, job.vocab_size),
            data,
            config=job.train,
            loss=job.loss,
            vocab_size=job.vocab_size,
            seed=job.seed,
            separator=job.separator,
            wrap=StudentLoss if job.ted is None else partial(_with_layers, job, data, world, say, fresh=not steps),
            schedule_start=job.schedule_start,
            world=world,
            context=job.context,
        )
        if steps:
            self._load(steps[-1])
            if world.is_first:
                say(f"train: resumed from the checkpoint at step {self.state.step} of {job.train.steps}")

    @property
    def state(self) -> TrainerState:
        return self._trainer.state

    def train_interval(self, mixture: Mixture, version: int, steps: int, on_step: OnStep) -> None:
        self._trainer.train_interval(mixture, version, steps, on_step)

    def perplexities(self, sample: Mapping[str, int] | None = None) -> dict[str, float]:
        blocks = self._validation.blocks
        chosen = blocks if sample is None else {d: First(blocks[d], n) for d, n in sample.items()}
        return {domain: self._trainer.perplexity(one, as_saved=sample is not None) for domain, one in chosen.items()}

    def held_out(self) -> dict[str, HeldOut]:
        blocks, targets = self._validation.blocks, self._validation.targets
        return {
            domain: self._trainer.held_out(one, targets[domain] if targets is not None else None)
            for domain, one in blocks.items()
        }

    def block_losses(self, blocks: BlockReader, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Mean cross-entropy of each of the given blocks under the student as it is now, [n] in nats."""
        return self._trainer.block_losses(blocks, indices)

    @cached_property
    def _validation(self) -> TrainData:
        return open_data(self._job, "validation")

    def save(self) -> None:
        world, state = self._world, self._trainer.state
        if world.is_first:
            self._checkpoints.begin(state.step)
        world.wait_for_all()
        name = f"rank-{world.rank:05d}.safetensors"
        record = self._checkpoints.put(state.step, name, self._write_part)
        records = world.gather((name, record))
        if world.is_first:
            self._checkpoints.commit(state.step, dict(records), state_as_json(state))
            self._checkpoints.prune(self._job.train.keep_checkpoints)
        world.wait_for_all()

    def _write_part(self, path: str) -> None:
        # torch names the files of a folder itself; a rank's is one, or none where others hold all that it has.
        folder = f"{path}{uri.PARTS}"
        try:
            saving.save(self._trainer, folder)
            written = os.listdir(folder)
            if written:
                os.replace(os.path.join(folder, written[0]), path)
            else:
                safetensors.torch.save_file({}, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, step: int) -> None:
        """Load a checkpoint, or the newest, where this one has made room for newer ones meanwhile."""
        try:
            self.load(step)
        except StoreDamagedError:
            newer = [other for other in self._checkpoints.steps() if other > step]
            if self._world.size > 1 or not newer:
                raise
            self._load(newer[-1])

    def load(self, step: int) -> None:
        """Take up where the checkpoint of a step was saved.

        Raises:
            StoreDamagedError: it cannot be read, or is of another run.
        """
        state = state_from_json(self._checkpoints.state(step), self._checkpoints.url(step))
        # On every rank: a machine's ranks read the same local files, but a file from afar is fetched by each.
        with self._checkpoints.folder(step) as folder:
            saving.load(self._trainer, state, folder)

    def export(self, folder: str) -> None:
        weights = student_weights(self._trainer.model, self._world)
        if self._world.is_first:
            model, context = self._trainer.model, self._job.context
            config = None if context is None else stretched_config(model.config, context.factor, context.target)
            try:
                save_student(model, weights, folder, config)
            except Exception as error:
                if (known := os_error_of(error)) is None:
                    raise
                known.filename = folder
                raise known from error
        self._world.wait_for_all()

    def close(self) -> None:
        pass


def _with_layers(
    job: TrainingJob,
    data: TrainData,
    world: World,
    say: Callable[[str], None],
    model: Any,
    vocab_size: int,
    loss: LossConfig,
    *,
    fresh: bool,
) -> StudentLoss:
    """The student beside its live teacher; its filters are trained here, unless a checkpoint holds them."""
    if job.ted is None or job.teacher is None:
        raise ValueError("method ted needs its section and the teacher's folder")
    precision = resolve_precision(job.train, world.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = load_student(job.teacher, vocab_size, dtype=dtype, field="teacher.model")
    student = TedStudent(model, vocab_size, loss, teacher, job.ted)
    if fresh:
        if world.is_first:
            say(f"ted: {job.ted.filter_steps} steps for the filters of {len(student.student_filters)} layers")
        train_filters(
            student,
            data,
            steps=job.ted.filter_steps,
            batch_size=job.ted.filter_batch_size,
            seed=job.seed,
            device=world.device,
            micro_batch_size=job.train.micro_batch_size,
            precision=precision,
            separator=job.separator if loss.mask_document_starts else None,
        )
    return student
