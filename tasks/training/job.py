"""Everything that a rank needs to train, as plain data, and the stores that it reads. Imports neither torch nor
Prefect."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ddk.data import TrainData
from ddk.known_targets import KnownTargets
from ddk.train_config import LossConfig, StudentConfig, TedConfig, TrainConfig
from ddk.values import Split, TargetReader
from storage.blocks import open_blocks
from storage.targets import open_targets


class TrainingJob(BaseModel):
    """Everything that a rank must know, in plain data: a process of its own is started with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_url: str
    student: StudentConfig
    """A local folder."""
    seed: int
    loss: LossConfig
    """The method's: γ is 0 where no targets are read."""
    train: TrainConfig
    vocab_size: int
    separator: int | tuple[int, ...]
    """The tokens behind which a document begins: EOS, and BOS where there is one."""
    blocks: dict[str, str]
    """URLs of the stores, by domain."""
    targets: dict[str, str]
    ted: TedConfig | None = None
    """Of method ted; then `teacher` is set too."""
    teacher: StudentConfig | None = None
    """A local folder, where the method needs the live teacher."""


def open_data(job: TrainingJob, split: Split = "train") -> TrainData:
    """The blocks and, where its loss has a divergence, the targets that a job reads; of validation, what it measures.

    Raises:
        StoreMissingError: a store is not there, or not complete.
    """
    reads_targets = job.loss.gamma > 0.0
    return TrainData(
        blocks={domain: open_blocks(url, split) for domain, url in job.blocks.items()},
        targets={
            domain: _known_targets(open_targets(url, split), job.vocab_size) for domain, url in job.targets.items()
        }
        if reads_targets
        else None,
    )


def _known_targets(targets: TargetReader, vocab_size: int) -> TargetReader:
    return KnownTargets(targets, vocab_size) if vocab_size < targets.vocab_size else targets
