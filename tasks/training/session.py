"""Stages 3 and 4: the student trains interval by interval, and its gap to the teacher decides the next mixture.

The flow owns the loop: `train_interval`, `evaluate_gap`, `update_mixture`, and again. Each is idempotent by what is
stored (checkpoints, mixture history), so that a flow that died is simply run again. Between the tasks the student
stays in memory, in a `StudentSession`: in this process, or in one a device; a session that starts anew loads the
newest checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from ddk.data import TrainData
from ddk.domain_tree import depth, rolled_up_mixture
from ddk.errors import UserError
from ddk.gap import domain_gap
from ddk.methods.registry import METHODS, check_method, effective_loss, mixture_after
from ddk.parallel import World
from ddk.train_config import StudentConfig
from ddk.trainer import StepReport, TrainerState, resolve_device, resolve_processes
from ddk.values import DomainGap, Mixture
from storage.blocks import open_blocks
from storage.files.digests import DigestCache
from storage.files.uri import as_json, join
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord, make_record
from storage.targets import teacher_perplexity
from tasks.planning.models import same_weights, weight_digests
from tasks.planning.preflight import StudentFacts, check_live_teacher, check_student
from tasks.planning.store_plan import Plan
from tasks.reporting.run_artifacts import publish_measurement
from tasks.running.retries import RETRIES
from tasks.showing.artifacts import artifact_key
from tasks.showing.events import say_event
from tasks.showing.progress import logger, meter
from tasks.training.processes import TrainingProcesses
from tasks.training.rank import RankTraining, Training, TrainingJob, open_data
from tasks.training.run_settings import RunSettings
from tasks.training.tracking.trackers import Tracking, open_tracking

# What changes how a run goes but not which student comes out (on one machine).
_OPERATIONAL = {
    *("device", "keep_checkpoints", "log_every"),
    *("processes", "nodes", "rendezvous", "parallel", "compile"),
}
_DOMAINS_IN_A_LINE = 12
_SAME_MODEL = 0.002
"""Nats between the perplexities of teacher and student beyond which they are not one model."""
# Added after runs had been started without them: with these values they are those runs' own.
_ADDED_TO_LOSS = ("divergence", "beta", "mask_document_starts")
_ADDED_TO_MIXTURE = ("evaluation", "level", "weights", "doremi_step", "doremi_smoothing", "reference_run")
# These drew every domain equally once, and now in proportion to its size: not the same run.
_MIXTURE_CHANGED = {"kd": "proportional", "cpt": "proportional"}


def check_leaves_of_mixture(settings: RunSettings, plan: Plan) -> None:
    """What the configuration alone cannot tell where records give the paths: that every leaf has its weight.

    Raises:
        UserError: `mixture.weights` are of other domains than the plan's, cut to `mixture.level`.
    """
    try:
        check_method(settings.method, settings.mixture, settings.loss, plan.domains)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_run(settings: RunSettings, plan: Plan) -> StudentFacts:
    """That the run's models can be trained, saved and read by others; nothing need have been captured.

    Raises:
        UserError: they cannot; see `tasks.planning.preflight`.
    """
    if METHODS[settings.method].needs_teacher:
        check_live_teacher(plan)
    return check_student(settings.student, plan)


class StudentSession:
    """One run's student, loaded once and kept between the intervals.

    Opening a session claims the run's folder.

    Args:
        settings: see there.
        plan: the stores, all complete.
        config: the whole resolved configuration, kept in the run's folder for the reader; None only looks, and leaves
            the folder as it is.

    Raises:
        RunMismatchError: the folder holds another run.
        UserError: the student does not fit the teacher, or the mixture's weights not the domains.
    """

    def __init__(self, settings: RunSettings, plan: Plan, config: Mapping[str, Any] | None = None) -> None:
        self.settings = settings
        self.plan = plan
        self._config = dict(config or {})
        check_leaves_of_mixture(settings, plan)
        self.run = RunFolder(settings.root, settings.run)
        self.history = MixtureHistory(self.run.url)
        self.student = check_run(settings, plan)
        if config is not None:
            self.run.claim(self.identity, config)
        self._training: Training | None = None

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
        """Where the run's metrics go besides its own files."""
        gamma = effective_loss(self.settings.method, self.settings.loss).gamma
        return open_tracking(self.settings.tracking, self.run, self._config, gamma)

    @property
    def training(self) -> Training:
        """The student in training, where the newest checkpoint left it; started when first asked for.

        Raises:
            UserError: the machine or the stores do not fit the configuration.
        """
        if self._training is None:
            train = self.settings.train
            device = resolve_device(train)
            processes = resolve_processes(train, device)
            if processes * train.nodes > 1:
                logger.info("train: %d processes on %d machine(s), %s", processes, train.nodes, train.parallel)
                self._training = TrainingProcesses(self.job, processes)
            else:
                self._training = RankTraining(self.job, World(device=device), logger.info)
        return self._training

    @property
    def job(self) -> TrainingJob:
        settings, plan = self.settings, self.plan
        return TrainingJob(
            run_url=self.run.url,
            student=settings.student.model_copy(update={"model": self.student.folder, "revision": None}),
            seed=settings.seed,
            loss=effective_loss(settings.method, settings.loss),
            train=settings.train,
            vocab_size=self.student.vocab_size,
            separator=(plan.eos_id, *plan.bos_ids[-1:]),
            blocks={domain: store.blocks_url for domain, store in plan.domains.items()},
            targets={domain: store.targets_url for domain, store in plan.domains.items()},
            **self._live_teacher(),
        )

    def _live_teacher(self) -> dict[str, Any]:
        if not METHODS[self.settings.method].needs_teacher:
            return {}
        teacher = StudentConfig(model=self.plan.teacher_folder, trust_remote_code=self.settings.trust_teacher_code)
        return {"ted": self.settings.ted, "teacher": teacher}

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
        return sum(self.state.sampler.drawn.values()) * self._seq_len

    @cached_property
    def teacher_ppl(self) -> dict[str, float]:
        """ℓ_T by domain, from the stored log-probabilities."""
        return {
            domain: teacher_perplexity(store.targets_url, store.marked_blocks_url)
            for domain, store in self.plan.domains.items()
        }

    @cached_property
    def reference_ppl(self) -> dict[str, float] | None:
        """ℓ by domain of `mixture.reference_run`'s student, as it was last measured; None where none is named.

        Raises:
            UserError: there is no such run, it is not complete, or it has other domains.
        """
        name = self.settings.mixture.reference_run
        if name is None:
            return None
        folder = RunFolder(self.settings.root, name)
        summary = folder.summary()
        records = MixtureHistory(folder.url).whole(summary)
        if not records or summary is None:
            raise UserError(f"mixture.reference_run '{name}' is no complete run below {self.settings.root}; train it")
        found = {domain: both.student for domain, both in records[-1].perplexities.items()}
        if set(found) != set(self.plan.domains):
            raise UserError(
                f"mixture.reference_run '{name}' has domains {sorted(found)}, this run {sorted(self.plan.domains)}"
            )
        return found

    @cached_property
    def positions(self) -> dict[str, int] | None:
        """Validation positions that carry loss, by domain; None where nothing is to be rolled up."""
        if self.settings.mixture.level is None and not any(depth(domain) > 1 for domain in self.plan.domains):
            return None
        return {
            domain: open_blocks(store.blocks_url, "validation").manifest.positions("validation")
            for domain, store in self.plan.domains.items()
        }

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Train blocks by domain."""
        return self._data.sizes

    @cached_property
    def _data(self) -> TrainData:
        return open_data(self.job)

    @property
    def _shuffled_whole(self) -> bool:
        """Whether every domain finds room in the shuffle, so that `train.shuffle_mib` makes no difference."""
        windows = self._data.windows(self.settings.train.shuffle_mib)
        return all(self.sizes[domain] <= one.shards * one.shard_blocks for domain, one in windows.items())

    @property
    def _seq_len(self) -> int:
        return next(iter(self.plan.domains.values())).blocks_dims["seq_len"]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the trained student, as it is kept in the run's folder."""
        settings = self.settings
        digests = DigestCache(join(settings.root, "digests.json"))
        identity = {
            "method": settings.method,
            **({"drawn": drawn} if (drawn := _MIXTURE_CHANGED.get(settings.method)) else {}),
            "seed": settings.seed,
            "student": weight_digests(self.student.folder, digests, "student.model"),
            # How it computes, where that is not what it was computed by before there was a choice.
            **({"attention": self.student.attention} if self.student.attention is not None else {}),
            **({"vocabulary": of} if (of := self.student.vocab_size) < self.plan.vocab_size else {}),
            "loss": _without_defaults(effective_loss(settings.method, settings.loss), _ADDED_TO_LOSS),
            "train": settings.train.model_dump(
                exclude=_OPERATIONAL | ({"shuffle_mib"} if self._shuffled_whole else set())
            ),
            "mixture": _without_defaults(settings.mixture, _ADDED_TO_MIXTURE),
            **({"ted": settings.ted.model_dump()} if METHODS[settings.method].needs_teacher else {}),
            **({"reference": reference} if (reference := self.reference_ppl) is not None else {}),
            "stores": {
                domain: {"blocks": store.blocks_url.split("/")[-2], "targets": store.targets_url.split("/")[-2]}
                for domain, store in self.plan.domains.items()
            },
        }
        return dict(as_json(identity))


def _without_defaults(section: BaseModel, added: tuple[str, ...]) -> dict[str, Any]:
    defaults = {name: type(section).model_fields[name].default for name in added}
    return {name: value for name, value in section.model_dump().items() if defaults.get(name, ...) != value}


class _Pace:
    """How fast an interval's steps go so far."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0
        self.tokens = 0

    def add(self, report: StepReport) -> None:
        self.seconds += report.seconds
        self.waited += report.waited_seconds
        self.tokens += report.tokens

    def __str__(self) -> str:
        share = 100 * self.waited / self.seconds
        return f"{self.tokens / self.seconds:,.0f} tokens/s, {share:.1f}% of the time waiting for data"


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
    ended: list[float] = []
    pace = _Pace()
    shown = artifact_key(settings.run, "training")
    with meter(f"train {settings.run}", settings.train.steps, "steps", done=first_step, artifact=shown) as progress:

        def on_step(report: StepReport) -> None:
            reports.append(report)
            ended.append(time.time())
            pace.add(report)
            progress.advance(1, f"{pace}, ce {report.ce:.3f}, kl {report.kl:.3f}")
            if report.step % settings.train.log_every == 0:
                logger.info("step %d: cross-entropy %.4f, KL %.4f", report.step, report.ce, report.kl)

        session.training.train_interval(record.mixture, record.version, steps, on_step)
    session.run.write_metrics(
        first_step, [{**asdict(report), "time": at} for report, at in zip(reports, ended, strict=True)]
    )
    session.training.save()
    session.tracking.update(session.step, trained_from=first_step)
    say_event("checkpoint.written", session.run, settings.mixture.evaluation, {"step": session.step})
    logger.info(
        "train: step %d of %d, cross-entropy %.3f, KL %.3f, %s",
        session.step,
        settings.train.steps,
        sum(report.ce for report in reports) / len(reports),
        sum(report.kl for report in reports) / len(reports),
        pace,
    )


@task(task_run_name="gap at step {step}", cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def evaluate_gap(session: StudentSession, step: int) -> dict[str, dict[str, float]]:
    """The student's and the teacher's perplexity on every domain's validation blocks.

    Returns:
        `{domain: {"student": ℓ_S, "teacher": ℓ_T}}`.

    Raises:
        ValueError: a perplexity is not finite.
    """
    same = step == 0 and same_weights(session.plan.teacher_folder, session.student.folder)
    gaps: dict[str, dict[str, float]] = {}
    for domain, student_ppl in session.training.perplexities().items():
        gap = domain_gap(domain, student_ppl, session.teacher_ppl[domain], step=step)
        gaps[domain] = {"student": gap.student_ppl, "teacher": gap.teacher_ppl}
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
                records[-1].mixture if records else None,
                measured,
                settings.mixture,
                session.sizes,
                session.reference_ppl,
                session.positions,
            ),
            blocks_drawn=state.sampler.drawn,
            positions=session.positions,
        )
        try:
            session.history.append(record)
            break
        except ValueError:
            logger.info("gap at step %d: another evaluator was quicker; looking again", step)
    say_event("mixture.updated", session.run, settings.mixture.evaluation, {"version": record.version, "step": step})
    publish_measurement(session.run)
    worst = max(record.gaps, key=lambda gap: gap.ratio)
    logger.info(
        "gap at step %d: largest ratio %.3f (%s); mixture %s%s",
        step,
        worst.ratio,
        worst.domain,
        ", ".join(f"{domain} {p:.2f}" for domain, p in _shown(record.mixture).probabilities.items()),
        "" if METHODS[settings.method].follows_gap else " (fixed)",
    )
    return record


def _shown(mixture: Mixture) -> Mixture:
    """As a line of the log has room for it: many leaves as the domains that they are of."""
    return mixture if len(mixture.domains) <= _DOMAINS_IN_A_LINE else rolled_up_mixture(mixture, 1)
