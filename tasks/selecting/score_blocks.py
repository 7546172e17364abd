"""The losses of a domain's train blocks under the models that its selection asks, in shards: killed, it goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from ddk.errors import UserError
from ddk.parallel import World
from ddk.train_config import LossConfig, StudentConfig, TrainConfig
from ddk.trainer import resolve_device
from ddk.values import BlockReader
from storage.blocks import open_blocks
from storage.corpus.selecting import ByTrajectory
from storage.runs.folder import RunFolder
from storage.stores.manifest import StoreWriter
from tasks.planning.preflight import check_student
from tasks.planning.selection_plan import SelectionPlan
from tasks.planning.store_plan import Plan
from tasks.running.sharing import alone
from tasks.showing.progress import meter
from tasks.training.job import TrainingJob
from tasks.training.rank import RankTraining

_NO_DIVERGENCE = LossConfig(gamma=0.0)


def score_blocks(root: str, plan: Plan, selection: SelectionPlan, student: StudentConfig, train: TrainConfig) -> None:
    """Write the scores of one domain; nothing to do where they are complete.

    Args:
        student: whose settings (not weights) a reference is loaded with.
        train: device and precision of the forward pass.

    Raises:
        StoreMissingError: the domain is not packed.
    """
    writer = StoreWriter(selection.scores_url, "scores", selection.scores_inputs, selection.scores_dims)
    if writer.manifest.complete:
        return
    with alone(selection.scores_url, f"select {selection.domain}"):
        if writer.completed_by_another():
            return
        _write(root, plan, selection, student, train, writer)


def _write(
    root: str, plan: Plan, selection: SelectionPlan, student: StudentConfig, train: TrainConfig, writer: StoreWriter
) -> None:
    blocks = open_blocks(plan[selection.domain].blocks_url, "train")
    shard_blocks = selection.scores_dims["shard_blocks"]
    there = writer.committed("train")
    missing = [number for number in range(-(-len(blocks) // shard_blocks)) if number not in there]
    before = sum(record.blocks for record in there.values())
    label = f"score {selection.domain}"
    with (
        meter(label, len(blocks), "blocks", done=before, positions=plan.seq_len, root=root) as progress,
        _models(root, plan, selection, student, train) as models,
    ):
        for number in missing:
            first = number * shard_blocks
            chosen = np.arange(first, min(first + shard_blocks, len(blocks)))
            losses = models.losses(blocks, chosen)
            if not np.isfinite(losses).all():
                raise UserError(
                    f"{label}: a model gives block {int(chosen[~np.isfinite(losses).all(axis=1)][0])} a loss that is "
                    f"no finite number; try train.precision: fp32, or take another reference"
                )
            writer.write_shard("train", number, {"losses": losses.astype(np.float32)})
            progress.advance(len(chosen))
    writer.finish()


class _Models:
    """The student that scores, and the checkpoints that it takes one after the other."""

    def __init__(self, training: RankTraining, steps: tuple[int, ...]) -> None:
        self._training = training
        self._steps = steps
        self._at: int | None = None

    def losses(self, blocks: BlockReader, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[n, C]"""
        columns = []
        for step in self._steps or (None,):
            if step is not None and step != self._at:
                self._training.load(step)
                self._at = step
            columns.append(self._training.block_losses(blocks, chosen))
        return np.stack(columns, axis=1)


@contextmanager
def _models(
    root: str, plan: Plan, selection: SelectionPlan, student: StudentConfig, train: TrainConfig
) -> Iterator[_Models]:
    world = World(device=resolve_device(train))
    urls = {domain: store.blocks_url for domain, store in plan.domains.items()}
    if isinstance(selection.select, ByTrajectory):
        job = _job_of_run(RunFolder(root, selection.select.run), plan, urls, train)
        yield _Models(RankTraining(job, world), tuple(map(int, selection.models)))
        return
    reference = student.model_copy(update={"model": selection.models[0], "revision": None, "context": None})
    with tempfile.TemporaryDirectory(prefix="ddk-score-") as nowhere:
        job = TrainingJob(
            run_url=nowhere,
            student=reference,
            seed=0,
            loss=_NO_DIVERGENCE,
            train=train,
            vocab_size=check_student(reference, plan).vocab_size,
            separator=plan.eos_id,
            blocks=urls,
            targets={},
        )
        yield _Models(RankTraining(job, world), ())


def _job_of_run(folder: RunFolder, plan: Plan, urls: Mapping[str, str], train: TrainConfig) -> TrainingJob:
    """As the run was trained, on this machine's device.

    Raises:
        UserError: the run had other domains, or trained more than a student.
    """
    config, identity = folder.config(), folder.identity()
    if config is None or identity is None:
        raise UserError(f"there is no run '{folder.name}' in {folder.url}; train it first")
    if set(identity["stores"]) != set(urls):
        raise UserError(
            f"select.run '{folder.name}' was trained on the domains {', '.join(sorted(identity['stores']))}, and not "
            f"on {', '.join(sorted(urls))}; take a run on the same domains"
        )
    if config["method"] == "ted":
        raise UserError(f"select.run '{folder.name}' is of method ted, whose checkpoints hold more than the student")
    own = TrainConfig.model_validate(config["train"])
    student = StudentConfig.model_validate(config["student"])
    return TrainingJob(
        run_url=folder.url,
        student=student,
        seed=0,
        loss=_NO_DIVERGENCE,
        train=own.model_copy(update={"device": train.device, "precision": train.precision, "parallel": "ddp"}),
        vocab_size=int(identity["vocabulary"]),
        separator=plan.eos_id,
        blocks=dict(urls),
        targets={},
    )
