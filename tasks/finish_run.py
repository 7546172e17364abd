"""Stage 5: the report of a run, at any time; and at its end the student as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.errors import UserError
from ddk.methods.registry import METHODS
from ddk.student import load_tokenizer
from storage.mixtures import MixtureHistory, MixtureRecord
from storage.runs import RunFolder
from storage.uri import put_folder
from tasks.model_card import render_model_card
from tasks.progress import logger
from tasks.report import write_report
from tasks.report_data import IntervalRecord, RunSummary
from tasks.retries import RETRIES
from tasks.run_artifacts import publish_report
from tasks.train_student import StudentSession


@task(task_run_name="report {run}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def report_run(root: str, run: str) -> dict[str, str]:
    """Write the report of a run, finished or not, and publish it as artifacts.

    Returns:
        The URL of each file by its name, `index.html` among them.

    Raises:
        UserError: there is no such run, or nothing has been measured in it.
    """
    folder = RunFolder(root, run)
    records = interval_records(folder)
    summary = summarise(folder, records)
    urls = write_report(summary, records, folder.report_url)
    publish_report(folder, summary, records, urls)
    logger.info("report: %s", urls["index.html"])
    return urls


@task(task_run_name="save student {session.run.name}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def save_final_student(session: StudentSession, stopped_early: str | None) -> str:
    """Write the trained student, its tokenizer and its model card; the run is complete when this returns.

    Returns:
        The folder's URL.
    """
    folder = session.run
    has_tokenizer = os.path.exists(os.path.join(session.student_folder, "tokenizer.json"))
    tokenizer = load_tokenizer(session.student_folder if has_tokenizer else session.plan.teacher_folder)
    summary = {
        "steps": session.step,
        "tokens_seen": session.tokens_seen,
        "stopped_early": stopped_early,
        "training_seconds": round(sum(row["seconds"] for row in folder.metrics()), 3),
    }
    with tempfile.TemporaryDirectory(prefix="ddk-student-") as local:
        session.training.export(local)
        tokenizer.save_pretrained(local)
        records = interval_records(folder)
        card = render_model_card(summarise(folder, records, summary), records)
        with open(os.path.join(local, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)
        put_folder(local, folder.student_url)
    session.tracking.finish(session.step, summary)
    folder.finish(summary)
    logger.info("student: %s", folder.student_url)
    return folder.student_url


def interval_records(folder: RunFolder) -> list[IntervalRecord]:
    """The run's mixture history, as the report takes it.

    Raises:
        UserError: nothing has been measured yet.
    """
    records = MixtureHistory(folder.url).records()
    if not records:
        raise UserError(f"run '{folder.name}' has measured nothing yet ({folder.url}); run `ddk train` first")
    return [_interval(record) for record in records]


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
        wall_seconds=done.get("training_seconds"),
        stopped_early=done.get("stopped_early"),
    )


def effective_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's stored configuration with what it was trained with: a method may set fields of the loss whatever the
    file says."""
    fixed = METHODS[config["method"]].loss if config["method"] in METHODS else {}
    return {**config, "loss": {**config["loss"], **fixed}}


def _interval(record: MixtureRecord) -> IntervalRecord:
    return IntervalRecord(
        t=record.version,
        step=record.step,
        tokens_seen=record.tokens_seen,
        gaps=record.gaps,
        mixture=record.mixture,
        blocks_drawn=record.blocks_drawn,
        positions=record.positions or {},
    )
