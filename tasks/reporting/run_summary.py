"""A run's folder as its report takes it: what it is, and every measurement of the gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddk.errors import UserError
from ddk.methods.registry import METHODS
from ddk.overtraining import Alarm
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from tasks.reporting.ancestry import gone_on_from
from tasks.reporting.costs import costs_of
from tasks.reporting.overtraining import alarms_of, epoch_limit_of
from tasks.reporting.records import IntervalRecord, RunSummary
from tasks.reporting.selections import selections_of


def interval_records(folder: RunFolder) -> list[IntervalRecord]:
    """The run's mixture history, as the report takes it.

    Raises:
        UserError: nothing has been measured yet.
    """
    records = MixtureHistory(folder.url).whole(folder.summary())
    if not records:
        raise UserError(f"run '{folder.name}' has measured nothing yet ({folder.url}); run `ddk train` first")
    raised = alarms_of(records, epoch_limit_of(folder.config()))
    return [_interval(record, raised) for record in records]


def summarise(
    folder: RunFolder, records: list[IntervalRecord], finished: Mapping[str, Any] | None = None
) -> RunSummary:
    """What identifies the run, from its stored configuration.

    Args:
        finished: the run's summary where it is not stored yet.
    """
    config = folder.config()
    if config is None:
        raise UserError(f"there is no run '{folder.name}' in {folder.url}; correct the name, or run `ddk train` first")
    done = finished or folder.summary() or {}
    return RunSummary(
        name=folder.name,
        method=config["method"],
        teacher=config["teacher"]["model"],
        student=config["student"]["model"],
        # Not the configuration's, of which one may stand for many leaves.
        domains=records[0].mixture.domains,
        tokens_seen=records[-1].tokens_seen,
        steps=records[-1].step,
        seq_len=config["packing"]["seq_len"],
        settings=effective_settings(config),
        wall_seconds=done.get("wall_seconds"),
        costs=costs_of(folder, finished),
        stopped_early=done.get("stopped_early"),
        gone_on_from=gone_on_from(folder),
        selections=selections_of(folder),
        context=(folder.identity() or {}).get("context"),
    )


def effective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's stored configuration with what it was trained with: a method may set fields of the loss whatever the
    file says."""
    fixed = METHODS[config["method"]].loss if config["method"] in METHODS else {}
    return {**config, "loss": {**config["loss"], **fixed}}


def _interval(record: MixtureRecord, raised: Sequence[Alarm]) -> IntervalRecord:
    return IntervalRecord(
        t=record.version,
        step=record.step,
        tokens_seen=record.tokens_seen,
        gaps=record.gaps,
        mixture=record.mixture,
        blocks_drawn=record.blocks_drawn,
        positions=record.positions or {},
        kl=record.kl or {},
        train_blocks=record.train_blocks or {},
        alarms=tuple(alarm for alarm in raised if alarm.step == record.step),
        capped=record.capped or (),
    )
