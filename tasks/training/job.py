"""Everything that a rank needs to train, as plain data, and the stores that it reads. Imports neither torch nor
Prefect."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from ddk.context import ContextPlan
from ddk.data import TrainData
from ddk.known_targets import KnownTargets
from ddk.selection import Selected
from ddk.train_config import LossConfig, StudentConfig, TedConfig, TrainConfig
from ddk.values import Split, TargetReader
from storage.blocks import open_blocks
from storage.errors import StoreDamagedError
from storage.selections import open_selection
from storage.targets import open_targets


class TrainingJob(BaseModel):
    """Everything that a rank must know, in plain data: a process of its own is started with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_url: str
    student: StudentConfig
    """A local folder."""
    context: ContextPlan | None = None
    """How the student is prepared for longer contexts."""
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
    selections: dict[str, str] = {}
    """URLs of the selections, of the domains whose blocks are chosen."""
    schedule_start: int = 0
    """Step at which the learning rate's warm-up begins."""
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
    # Validation is on all blocks, whatever is trained on.
    chosen = job.selections if split == "train" else {}
    kept = {domain: open_selection(url).read()[0] for domain, url in chosen.items()}
    return TrainData(
        blocks={domain: _kept(open_blocks(url, split), kept.get(domain)) for domain, url in job.blocks.items()},
        targets={
            domain: _kept(_known_targets(open_targets(url, split), job.vocab_size), kept.get(domain))
            for domain, url in job.targets.items()
        }
        if reads_targets
        else None,
    )


def _kept(reader: Any, indices: npt.NDArray[np.int64] | None) -> Any:
    """The blocks that are kept of a reader's.

    Raises:
        StoreDamagedError: the selection is of other blocks.
    """
    if indices is None:
        return reader
    if len(indices) == 0 or indices[-1] >= len(reader):
        raise StoreDamagedError(
            f"a selection of {len(indices)} blocks does not fit the {len(reader)} blocks of a domain; remove it below "
            f"<root>/selections and run `ddk select` again"
        )
    return Selected(reader, indices)


def _known_targets(targets: TargetReader, vocab_size: int) -> TargetReader:
    return KnownTargets(targets, vocab_size) if vocab_size < targets.vocab_size else targets
