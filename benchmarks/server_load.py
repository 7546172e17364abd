"""The flow runs of bench_server.py: all that `distill` tells Prefect, and nothing of its computation.

The flows, their tasks, lines, artifacts and events are those of a run of five domains with the names of the real ones
(automations go by them); what shows them is the project's own code. A run takes 75 s: 5 domains are packed in a second
each and captured in five, and four intervals of eight seconds are trained. The seconds are spent
computing, on one core a run.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from ddk.values import DomainGap, Mixture
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record
from tasks.reporting.run_artifacts import publish_measurement
from tasks.showing.artifacts import Board, artifact_key, table
from tasks.showing.events import say_event
from tasks.showing.progress import logger, meter

DOMAINS = ("code", "encyclopedia", "law", "math", "news")
INTERVALS, STEPS = 4, 80
SECONDS_OF_A_STEP = 0.1
_BYTES = bytes(1 << 20)
_CONFIG = {
    "method": "ddk",
    "seed": 7,
    "loss": {},
    "packing": {"seq_len": 256},
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
    "train": {"steps": INTERVALS * STEPS},
}


@flow(name="distill", flow_run_name="distill {run}", persist_result=False)
def distill(run: str) -> None:
    """One run, as the stages report it."""
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as root:
        pack_corpus()
        cache_teacher(root)
        train_student(root, run)


@flow(name="pack-corpus", flow_run_name="pack", persist_result=False)
def pack_corpus() -> None:
    for domain in DOMAINS:
        pack(domain)


@task(task_run_name="pack {domain}", cache_policy=NO_CACHE, persist_result=False)
def pack(domain: str) -> None:
    for split in ("train", "validation"):
        with meter(f"pack {domain} {split}", 1e6, "bytes") as progress:
            _work(10, 0.05, lambda: progress.advance(1e5))
    logger.info("pack %s: 4,096 train and 64 validation blocks", domain)


@flow(name="cache-teacher", flow_run_name="cache", persist_result=False)
def cache_teacher(root: str) -> None:
    logger.info("starting vLLM …")
    for domain in DOMAINS:
        capture(root, domain)


@task(task_run_name="capture {domain}", cache_policy=NO_CACHE, persist_result=False)
def capture(root: str, domain: str) -> None:
    with meter(f"capture {domain}", 500, "blocks", positions=256, artifact=f"ddk-bench-capture-{domain}") as progress:
        _work(50, 0.1, lambda: progress.advance(10))
    Board(artifact_key("root", "targets"), "table").show(
        table([{"domain": domain, "retained mass": "99.9%"}]), "what is kept of the teacher"
    )
    logger.info("capture %s: complete in %s", domain, root)


@flow(name="train-student", flow_run_name="train {run}", persist_result=False)
def train_student(root: str, run: str) -> None:
    folder = RunFolder(root, run)
    folder.claim({"name": run, "stores": {}}, _CONFIG)
    evaluate_gap(folder, 0)
    update_mixture(folder, 0)
    for interval in range(INTERVALS):
        train_interval(folder, interval * STEPS)
        evaluate_gap(folder, (interval + 1) * STEPS)
        update_mixture(folder, (interval + 1) * STEPS)


@task(task_run_name="train steps from {first_step}", cache_policy=NO_CACHE, persist_result=False)
def train_interval(folder: RunFolder, first_step: int) -> None:
    shown = artifact_key(folder.name, "training")
    with meter(f"train {folder.name}", INTERVALS * STEPS, "steps", done=first_step, artifact=shown) as progress:
        for step in range(first_step + 1, first_step + STEPS + 1):
            _work(1, SECONDS_OF_A_STEP, lambda: progress.advance(1, "1,234 tokens/s, ce 2.345, kl 0.456"))
            if step % 10 == 0:
                logger.info("step %d: cross-entropy %.4f, KL %.4f", step, 2.345, 0.456)
    say_event("checkpoint.written", folder, "inline", {"step": first_step + STEPS})


@task(task_run_name="gap at step {step}", cache_policy=NO_CACHE, persist_result=False)
def evaluate_gap(folder: RunFolder, step: int) -> None:
    _work(10, 0.1, lambda: None)
    logger.info("gap of %s at step %d", folder.name, step)


@task(task_run_name="mixture at step {step}", cache_policy=NO_CACHE, persist_result=False)
def update_mixture(folder: RunFolder, step: int) -> None:
    history = MixtureHistory(folder.url)
    version = len(history.records())
    ratio = 1.0 + 2.0 / (1 + version)
    record = make_record(
        version=version,
        step=step,
        tokens_seen=2048 * step,
        gaps=[DomainGap(domain=domain, student_ppl=10.0 * ratio, teacher_ppl=10.0) for domain in DOMAINS],
        mixture=Mixture(probabilities=dict.fromkeys(DOMAINS, 1 / len(DOMAINS))),
        blocks_drawn=dict.fromkeys(DOMAINS, step),
    )
    history.append(record)
    say_event("mixture.updated", folder, "inline", {"version": version, "step": step})
    publish_measurement(folder)
    logger.info("gap at step %d: largest ratio %.3f", step, ratio)


def _work(times: int, seconds: float, done: Callable[[], object]) -> None:
    for _ in range(times):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            hashlib.sha256(_BYTES)  # holds no lock of Python's, as little as torch does
        done()
