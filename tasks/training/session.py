"""Stages 3 and 4: the student trains interval by interval, and its gap to the teacher decides the next mixture.

The flow owns the loop: `train_interval`, `evaluate_gap`, `update_mixture`, and again. Each is idempotent by what is
stored (checkpoints, mixture history), so that a flow that died is simply run again. Between the tasks the student
stays in memory, in a `StudentSession`: in this process, or in one a device; a session that starts anew loads the
newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.domain_tree import rolled_up_mixture
from ddk.gap import domain_gap
from ddk.methods.base import Interval
from ddk.methods.registry import METHODS, mixture_after
from ddk.mixture import one_domain_alone
from ddk.parallel import World
from ddk.trainer import StepReport, TrainerState, resolve_device, resolve_processes
from ddk.values import DomainGap, Mixture, worst_gap
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord, make_record
from tasks.planning.models import same_weights
from tasks.reporting.now import key_of
from tasks.reporting.run_artifacts import publish_measurement
from tasks.running.retries import RETRIES
from tasks.running.sharing import alone
from tasks.showing.device import device_name
from tasks.showing.events import say_event
from tasks.showing.progress import logger, meter
from tasks.showing.waiting import said_if_slow
from tasks.training.ancestry import Ancestry, branch
from tasks.training.overtraining import say_alarms, with_caps
from tasks.training.processes import TrainingProcesses
from tasks.training.rank import RankTraining, Training
from tasks.training.run_inputs import RunInputs
from tasks.training.tracking.trackers import Tracking, open_tracking

_DOMAINS_IN_A_LINE = 12
_SAME_MODEL = 0.002
"""Nats between the perplexities of teacher and student beyond which they are not one model."""


class StudentSession:
    """One run's student, loaded once and kept between the intervals.

    Opening a session claims the run's folder.

    Args:
        inputs: of the run; the stores are all complete.
        config: the whole resolved configuration, kept in the run's folder for the reader.

    Raises:
        RunMismatchError: the folder holds another run.
    """

    def __init__(self, inputs: RunInputs, config: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.settings = inputs.settings
        self.run = RunFolder(inputs.settings.root, inputs.settings.run)
        self.history = MixtureHistory(self.run.url)
        self._config = dict(config)
        self._training: Training | None = None
        self._counted = time.monotonic()
        """Up to when the session's time is in the run's records."""
        self.run.claim(inputs.identity, config)

        self._branch_off()

    def _branch_off(self) -> None:
        """Begin with another run's checkpoint, where the run goes on from one and has not begun."""
        ancestry, checkpoints = self.inputs.ancestry, CheckpointFolder(self.run.url)
        if ancestry is None or checkpoints.steps():
            return
        with alone(self.run.url, f"train {self.run.name}"):
            if not checkpoints.steps():
                branch(self.settings, ancestry, self.inputs.plan.domains)
        logger.info("train %s: goes on from step %d of run '%s'", self.run.name, ancestry.step, ancestry.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()
        if "tracking" in vars(self):
            self.tracking.close(failed=kind is not None)

    def let_go(self) -> None:
        """Forget the student in memory: it is loaded from the newest checkpoint when it is asked for again."""
        if self._training is not None:
            self._training.close()
            self._training = None

    @cached_property
    def tracking(self) -> Tracking:
        """Where the run's metrics are sent besides its own files."""
        return open_tracking(self.settings.tracking, self.run, self._config)

    @property
    def training(self) -> Training:
        """The student in training, where the newest checkpoint left it; started when first asked for.

        Raises:
            UserError: the machine or the stores do not fit the configuration.
        """
        if self._training is None:
            train, job = self.settings.train, self.inputs.job
            device = resolve_device(train)
            processes = resolve_processes(train, device)
            with said_if_slow(f"train: loading the student {self.settings.student.model}"):
                if processes * train.nodes > 1:
                    logger.info("train: %d processes on %d machine(s), %s", processes, train.nodes, train.parallel)
                    self._training = TrainingProcesses(job, processes)
                else:
                    self._training = RankTraining(job, World(device=device), logger.info)
        return self._training

    @property
    def seconds_not_recorded(self) -> float:
        """Of this session, since the end of the last step that is in the metrics."""
        return time.monotonic() - self._counted

    def write_metrics(
        self, first_step: int, reports: Sequence[StepReport], ended: Sequence[tuple[float, float]]
    ) -> None:
        """Keep what an interval's steps have measured.

        Args:
            ended: when each was done: Unix time, and by the clock that `seconds_not_recorded` goes by.
        """
        rows, before = [], self._counted
        for report, (at, clock) in zip(reports, ended, strict=True):
            # From the end of the step before: measurements, checkpoints and loading are in it.
            rows.append({**asdict(report), "time": at, "wall_seconds": round(clock - before, 6)})
            before = clock
        self.run.write_metrics(first_step, rows)
        self._counted = before

    @property
    def device(self) -> str:
        """What the student is trained on, here and on the other machines."""
        train = self.settings.train
        device = resolve_device(train)
        processes = resolve_processes(train, device)
        name = device_name(gpus=processes if device.type == "cuda" else 0)
        return name if train.nodes == 1 else f"{train.nodes} machines, each {name}"

    @property
    def state(self) -> TrainerState:
        return self.training.state

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def done(self) -> bool:
        return self.step >= self.settings.train.steps

    @property
    def tokens_seen(self) -> int:
        """Positions trained on."""
        before = 0 if self.inputs.ancestry is None else self.inputs.ancestry.tokens
        return before + sum(self.state.sampler.drawn.values()) * self.inputs.seq_len


class _Pace:
    """How fast an interval goes so far, by the clock: what lies between its steps is in it."""

    def __init__(self) -> None:
        self.waited = 0.0
        self.tokens = 0
        self._began = time.monotonic()

    def add(self, report: StepReport) -> None:
        self.waited += report.waited_seconds
        self.tokens += report.tokens

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        share = 100 * self.waited / seconds
        return f"{self.tokens / seconds:,.0f} tokens/s, {share:.1f}% of the time waiting for data"


@task(task_run_name="train steps from {first_step}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def train_interval(session: StudentSession, record: MixtureRecord, first_step: int) -> None:
    """Train one interval under the record's mixture, and write a checkpoint."""
    try:
        # Further already where an earlier attempt failed after its checkpoint.
        if session.step == first_step:
            _train_interval(session, record, first_step)
    except Exception:
        session.let_go()  # it may be anywhere between two checkpoints
        raise


def _train_interval(session: StudentSession, record: MixtureRecord, first_step: int) -> None:
    settings = session.settings
    steps = min(settings.mixture.interval, settings.train.steps - first_step)
    session.tracking.update(first_step)
    reports: list[StepReport] = []
    ended: list[tuple[float, float]] = []
    pace = _Pace()
    shown = key_of(session.run, "training")
    with meter(f"train {settings.run}", settings.train.steps, "steps", done=first_step, artifact=shown) as progress:

        def on_step(report: StepReport) -> None:
            reports.append(report)
            ended.append((time.time(), time.monotonic()))
            pace.add(report)
            progress.advance(1, f"{pace}, ce {report.ce:.3f}, kl {report.kl:.3f}")
            if report.step % settings.train.log_every == 0:
                logger.info("step %d: cross-entropy %.4f, KL %.4f", report.step, report.ce, report.kl)

        session.training.train_interval(record.mixture, record.version, steps, on_step)
    reached = str(pace)
    session.write_metrics(first_step, reports, ended)
    session.training.save()
    session.tracking.update(session.step, trained_from=first_step)
    say_event("checkpoint.written", session.run, settings.mixture.evaluation, {"step": session.step})
    logger.info(
        "train: step %d of %d, cross-entropy %.3f, KL %.3f, %s",
        session.step,
        settings.train.steps,
        sum(report.ce for report in reports) / len(reports),
        sum(report.kl for report in reports) / len(reports),
        reached,
    )


@task(task_run_name="gap at step {step}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def evaluate_gap(session: StudentSession, step: int) -> dict[str, dict[str, float]]:
    """The student's and the teacher's perplexity on every domain's validation blocks, and the divergence of the two.

    Returns:
        `{domain: {"student": ℓ_S, "teacher": ℓ_T, "kl": KL}}`, the last where the loss reads targets.

    Raises:
        ValueError: a perplexity is not finite.
    """
    same = step == 0 and same_weights(session.inputs.plan.teacher_folder, session.inputs.student.folder)
    gaps: dict[str, dict[str, float]] = {}
    for domain, found in session.training.held_out().items():
        gap = domain_gap(domain, found.ppl, session.inputs.teacher_ppl[domain], step=step)
        gaps[domain] = {"student": gap.student_ppl, "teacher": gap.teacher_ppl}
        if found.kl is not None:
            gaps[domain]["kl"] = found.kl
        if same and abs(math.log(gap.ratio)) > _SAME_MODEL:
            logger.warning(
                "gap at step 0: student and teacher are the same weights, and their perplexities on '%s' are %.5g and "
                "%.5g; the targets were made by another model, by another dtype or quantisation, or the two forward "
                "passes differ",
                *(domain, gap.student_ppl, gap.teacher_ppl),
            )
    return gaps


@task(task_run_name="mixture at step {step}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def update_mixture(session: StudentSession, step: int, gaps: Mapping[str, Mapping[str, float]]) -> MixtureRecord:
    """Append the mixture that follows from a measurement (Eq. 1 at first, then the method's rule) to the history.

    Where another evaluator has measured this student meanwhile, or a later one, its record stands and is returned.
    """
    settings, state = session.settings, session.state
    measured = [DomainGap(domain=d, student_ppl=g["student"], teacher_ppl=g["teacher"]) for d, g in gaps.items()]
    while True:
        records = session.history.records()
        if records and records[-1].step >= step:
            newest = records[-1]
            logger.info("gap at step %d: version %d, of step %d, is there already", step, newest.version, newest.step)
            return newest
        record = make_record(
            version=len(records),
            step=step,
            tokens_seen=session.tokens_seen,
            gaps=measured,
            mixture=mixture_after(
                settings.method,
                _past(session.inputs.ancestry, records, measured),
                measured,
                settings.mixture,
                session.inputs.sizes,
                session.inputs.reference_ppl,
                session.inputs.positions,
                progress=step / settings.train.steps,
                accuracies=session.inputs.accuracies,
            ),
            blocks_drawn=state.sampler.drawn,
            positions=session.inputs.positions,
            kl={domain: one["kl"] for domain, one in gaps.items() if "kl" in one} or None,
            train_blocks=session.inputs.sizes,
        )
        record = with_caps(settings, records, record)
        try:
            session.history.append(record)
            break
        except ValueError:
            logger.info("gap at step %d: another evaluator appended first; reading the history again", step)
    say_event("mixture.updated", session.run, settings.mixture.evaluation, {"version": record.version, "step": step})
    say_alarms(settings, session.run, [*records, record])
    publish_measurement(session.run)
    worst = worst_gap(record.gaps)
    logger.info(
        "gap at step %d: largest ratio %.3f (%s); mixture %s%s",
        step,
        worst.ratio,
        worst.domain,
        ", ".join(f"{domain} {p:.2f}" for domain, p in _shown(record.mixture).probabilities.items()),
        "" if METHODS[settings.method].follows_gap and settings.mixture.follow != "accuracy" else " (fixed)",
    )
    if not records and METHODS[settings.method].follows_gap:
        sentence = one_domain_alone(record.mixture, {gap.domain: gap.ratio for gap in record.gaps}, settings.mixture)
        if sentence is not None:
            logger.warning("%s", sentence)
    return record


def _past(ancestry: Ancestry | None, records: Sequence[MixtureRecord], measured: Sequence[DomainGap]) -> list[Interval]:
    """The intervals so far. Of a run that goes on with other domains none is known, but what was drawn before."""
    if not records and ancestry is not None:
        mixture = ancestry.mixture_over([gap.domain for gap in measured])
        return [Interval(step=ancestry.step, gaps=measured, mixture=mixture)]
    return [Interval(step=one.step, gaps=one.gaps, mixture=one.mixture) for one in records]


def _shown(mixture: Mixture) -> Mixture:
    """As a line of the log has room for it: many leaves as the domains that they are of."""
    return mixture if len(mixture.domains) <= _DOMAINS_IN_A_LINE else rolled_up_mixture(mixture, 1)
