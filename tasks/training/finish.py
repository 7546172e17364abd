"""Stage 5: writes the report of a run, at any time, and at its end the student as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.student import load_tokenizer
from ddk.values import worst_gap
from storage.files.uri import put_folder
from storage.runs.folder import RunFolder
from storage.runs.listing import records_of
from storage.runs.overview import own_steps, times_of
from tasks.planning.tokenizer_files import has_tokenizer
from tasks.reporting.model_card import render_model_card
from tasks.reporting.run_artifacts import publish_report
from tasks.reporting.run_summary import interval_records, summarise
from tasks.reporting.scores import evaluation_section
from tasks.reporting.write_report import write_report
from tasks.running.retries import RETRIES
from tasks.showing.events import say_event
from tasks.showing.progress import logger
from tasks.training.saved_student import check_saved_student, sample_of
from tasks.training.session import StudentSession


@task(task_run_name="report {run}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def report_run(root: str, run: str) -> dict[str, str]:
    """Write the report of a run, finished or not, and publish it as artifacts. What `ddk eval` found is in it.

    Returns:
        The URL of each file by its name, `index.html` among them.

    Raises:
        UserError: there is no such run, or nothing has been measured in it.
    """
    folder = RunFolder(root, run)
    records = interval_records(folder)
    summary = summarise(folder, records)
    urls = write_report(summary, records, folder.report_url, evaluation_section(root, run), folder.report_listing)
    publish_report(folder, summary, records, urls)
    logger.info("report: %s", urls["index.html"])
    return urls


def _times(session: StudentSession) -> dict[str, float | int | str | None]:
    """What the run's training took so far, as its summary has it."""
    times = times_of(own_steps(session.run), session.seconds_not_recorded, session.device)
    return {**asdict(times), "training_seconds": times.training_seconds or 0.0}


@task(task_run_name="save student {session.run.name}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def save_final_student(session: StudentSession, stopped_early: str | None) -> str:
    """Write the trained student, its tokenizer and its model card; the run is complete when this returns.

    Returns:
        The folder's URL.
    """
    folder = session.run
    settings, own = session.settings, session.inputs.student.folder
    tokenizer = (
        load_tokenizer(own, trust_remote_code=settings.student.trust_remote_code)
        if has_tokenizer(own)
        else session.inputs.plan.tokenizer()
    )
    step, blocks = session.step, session.inputs.job.blocks
    summary = {"steps": step, "tokens_seen": session.tokens_seen, "stopped_early": stopped_early, **_times(session)}
    with tempfile.TemporaryDirectory(prefix="ddk-student-") as local:
        measured = session.training.perplexities(sample_of(blocks))
        session.training.export(local)
        tokenizer.save_pretrained(local)
        session.let_go()  # two students need not find room at once
        check_saved_student(
            local,
            measured,
            blocks,
            vocab_size=session.inputs.student.vocab_size,
            train=settings.train,
            trust_remote_code=settings.student.trust_remote_code,
        )
        records = interval_records(folder)
        card = render_model_card(summarise(folder, records, summary), records)
        with open(os.path.join(local, "README.md"), "w", encoding="utf-8") as file:
            file.write(card)
        put_folder(local, folder.student_url)
        folder.student_listing.write(records_of(local))
    summary |= _times(session)  # with what measuring and saving took
    session.tracking.finish(step, summary)
    folder.finish(summary)
    worst = worst_gap(records[-1].gaps)
    message = f"Run {folder.name} is complete at step {step}: largest ratio {worst.ratio:.3f} ({worst.domain})"
    if stopped_early is not None:
        message += f"; it ended early: {stopped_early}"
    message += f". {folder.report_url}/index.html"
    say_event("run.finished", folder, settings.mixture.evaluation, {"step": step, "message": message})
    logger.info("student: %s", folder.student_url)
    return folder.student_url
