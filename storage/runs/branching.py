"""A run that goes on from another one's checkpoint: what of that run is copied into the folder of the new one.

Afterwards the new run stands at that step as if it had been killed there: it is resumed like any other, and needs
nothing of the other run any more. The checkpoint is committed last; until then, all of it is copied again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord


def branch_off(
    source: RunFolder, into: RunFolder, step: int, history: Sequence[MixtureRecord], state: Mapping[str, Any]
) -> None:
    """Copy a run up to a checkpoint.

    Args:
        into: claimed already.
        history: the records to begin with, from version 0 on.
        state: of the new run at that step, in place of the other one's.

    Raises:
        StoreDamagedError, FormatVersionError: what is there of the other run is not what was written.
    """
    own = MixtureHistory(into.url)
    there = len(own.records())
    for record in history[there:]:
        own.append(record)
    for first_step in source.measured_intervals():
        if first_step < step:
            rows = [row for row in source.interval_metrics(first_step) if row["step"] <= step]
            into.write_metrics(first_step, rows)
    checkpoints = CheckpointFolder(into.url)
    checkpoints.begin(step)
    with CheckpointFolder(source.url).folder(step) as folder:
        records = {
            name: checkpoints.put(step, name, partial(shutil.copyfile, os.path.join(folder, name)))
            for name in CheckpointFolder(source.url).digests(step)
        }
    checkpoints.commit(step, records, state)
