"""Stages 3 and 4: the student trains interval by interval, and its gap to the teacher decides the next mixture.

The flow owns the loop: `train_interval`, `evaluate_gap`, `update_mixture`, and again. Each is idempotent by what is
stored (checkpoints, mixture history), so that a flow that died is simply run again. Between the tasks the student
stays in memory, in a `StudentSession`; a session that starts anew loads the newest checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from ddk.data import TrainData
from ddk.gap import domain_gap, perplexity
from ddk.loss import LossConfig
from ddk.methods import METHODS, MethodName, effective_loss, mixture_after
from ddk.mixture import MixtureConfig
from ddk.sampler import SamplerState
from ddk.student import StudentConfig, load_student
from ddk.trainer import StepReport, TrainConfig, Trainer, TrainerState
from ddk.types import BlockReader, DomainGap
from storage.blocks import open_blocks
from storage.checkpoints import CheckpointFolder
from storage.digests import DigestCache
from storage.mixtures import MixtureHistory, MixtureRecord, make_record
from storage.runs import RunFolder
from storage.targets import open_targets, teacher_perplexity
from storage.uri import join
from tasks.models import check_same_tokenizer, local_folder, weight_digests
from tasks.plan import Plan
from tasks.progress import logger, meter

# What changes how a run goes but not which student comes out (on one machine).
_OPERATIONAL = {"device", "keep_checkpoints", "log_every"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Everything that a run's training is determined by, besides its stores."""

    root: str
    run: str
    method: MethodName
    seed: int
    student: StudentConfig
    loss: LossConfig
    train: TrainConfig
    mixture: MixtureConfig


class StudentSession:
    """One run's student, loaded once and kept between the intervals.

    Opening a session claims the run's folder.

    Args:
        settings: see there.
        plan: the stores, all complete.
        config: the whole resolved configuration, kept in the run's folder for the reader.

    Raises:
        RunMismatchError: the folder holds another run.
        UserError: the student does not fit the teacher.
    """

    def __init__(self, settings: RunSettings, plan: Plan, config: Mapping[str, Any]) -> None:
        self.settings = settings
        self.plan = plan
        self.run = RunFolder(settings.root, settings.run)
        self.history = MixtureHistory(self.run.url)
        self.checkpoints = CheckpointFolder(self.run.url)
        self.student_folder = local_folder(settings.student.model, settings.student.revision, "student.model")
        check_same_tokenizer(plan.teacher_folder, self.student_folder)
        self.run.claim(self._identity(), config)

    @cached_property
    def trainer(self) -> Trainer:
        """The student in training, where the newest checkpoint left it."""
        settings = self.settings
        loss = effective_loss(settings.method, settings.loss)
        trainer = Trainer(
            load_student(
                settings.student.model_copy(update={"model": self.student_folder, "revision": None}),
                self.plan.vocab_size,
            ),
            self._data(reads_targets=loss.gamma > 0.0),
            config=settings.train,
            loss=loss,
            vocab_size=self.plan.vocab_size,
            seed=settings.seed,
        )
        steps = self.checkpoints.steps()
        if steps:
            self._load(trainer, steps[-1])
        return trainer

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer.state.step

    @property
    def tokens_seen(self) -> int:
        """Positions trained on."""
        return sum(self.trainer.state.sampler.drawn.values()) * self._seq_len

    @cached_property
    def teacher_ppl(self) -> dict[str, float]:
        """ℓ_T by domain, from the stored log-probabilities."""
        return {domain: teacher_perplexity(store.targets_url) for domain, store in self.plan.domains.items()}

    @cached_property
    def validation(self) -> dict[str, BlockReader]:
        return {domain: open_blocks(store.blocks_url, "validation") for domain, store in self.plan.domains.items()}

    @property
    def _seq_len(self) -> int:
        return next(iter(self.plan.domains.values())).blocks_dims["seq_len"]

    def save(self) -> None:
        """A checkpoint of the present state; those beyond `keep_checkpoints` go."""
        tensors = self.trainer.tensors()
        state = self.trainer.state
        self.checkpoints.save(
            state.step,
            {f"{name}.safetensors": _writer(group) for name, group in tensors.items()},
            {
                "step": state.step,
                "drawn": dict(state.sampler.drawn),
                "mixture_versions": list(state.mixture_versions),
            },
        )
        self.checkpoints.prune(self.settings.train.keep_checkpoints)

    def _load(self, trainer: Trainer, step: int) -> None:
        stored = self.checkpoints.state(step)
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in ("model", "optimizer"):
            with self.checkpoints.file(step, f"{name}.safetensors") as path:
                tensors[name] = safetensors.torch.load_file(path)
        sampler = SamplerState(step=stored["step"], drawn=stored["drawn"])
        trainer.load(TrainerState(sampler=sampler, mixture_versions=tuple(stored["mixture_versions"])), tensors)
        logger.info("train: resumed from the checkpoint at step %d of %d", step, trainer.config.steps)

    def _data(self, *, reads_targets: bool) -> TrainData:
        stores = self.plan.domains
        return TrainData(
            blocks={domain: open_blocks(store.blocks_url) for domain, store in stores.items()},
            targets={domain: open_targets(store.targets_url) for domain, store in stores.items()}
            if reads_targets
            else None,
        )

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        digests = DigestCache(join(settings.root, "digests.json"))
        identity = {
            "method": settings.method,
            "seed": settings.seed,
            "student": weight_digests(self.student_folder, digests, "student.model"),
            "loss": effective_loss(settings.method, settings.loss).model_dump(),
            "train": settings.train.model_dump(exclude=_OPERATIONAL),
            "mixture": settings.mixture.model_dump(),
            "stores": {
                domain: {"blocks": store.blocks_url.split("/")[-2], "targets": store.targets_url.split("/")[-2]}
                for domain, store in self.plan.domains.items()
            },
        }
        return dict(json.loads(json.dumps(identity)))


def _writer(tensors: Mapping[str, Tensor]) -> Any:
    return lambda path: safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, path)


@task(task_run_name="train steps from {first_step}", cache_policy=NO_CACHE, persist_result=False)
def train_interval(session: StudentSession, record: MixtureRecord, first_step: int) -> dict[str, Any]:
    """Train one interval under the record's mixture, and write a checkpoint.

    Returns:
        Means over the interval: `{"step", "ce", "kl", "tokens_per_second", "waiting"}`; `waiting` is the share of
        time spent waiting for data.
    """
    trainer, settings = session.trainer, session.settings
    steps = min(settings.mixture.interval, settings.train.steps - first_step)
    reports: list[StepReport] = []
    with meter(f"train from step {first_step}", steps, "steps") as progress:

        def on_step(report: StepReport) -> None:
            reports.append(report)
            progress.advance(1, f"ce {report.ce:.3f}, kl {report.kl:.3f}")
            if report.step % settings.train.log_every == 0:
                logger.info("step %d: cross-entropy %.4f, KL %.4f", report.step, report.ce, report.kl)

        trainer.train_interval(record.mixture, record.version, steps, on_step)
    session.run.write_metrics(first_step, [asdict(report) for report in reports])
    session.save()
    seconds = sum(report.seconds for report in reports)
    result = {
        "step": session.step,
        "ce": sum(report.ce for report in reports) / len(reports),
        "kl": sum(report.kl for report in reports) / len(reports),
        "tokens_per_second": sum(report.tokens for report in reports) / seconds,
        "waiting": sum(report.waited_seconds for report in reports) / seconds,
    }
    logger.info(
        "train: step %d of %d, cross-entropy %.3f, KL %.3f, %s tokens/s, %.1f%% of the time waiting for data",
        session.step,
        settings.train.steps,
        result["ce"],
        result["kl"],
        f"{result['tokens_per_second']:,.0f}",
        100 * result["waiting"],
    )
    return result


@task(task_run_name="gap at step {step}", cache_policy=NO_CACHE, persist_result=False)
def evaluate_gap(session: StudentSession, step: int) -> dict[str, dict[str, float]]:
    """The student's and the teacher's perplexity on every domain's validation blocks.

    Returns:
        `{domain: {"student": ℓ_S, "teacher": ℓ_T}}`.

    Raises:
        ValueError: a perplexity is not finite.
    """
    trainer, train = session.trainer, session.settings.train
    gaps: dict[str, dict[str, float]] = {}
    for domain, blocks in session.validation.items():
        student_ppl = perplexity(
            trainer.model,
            blocks,
            vocab_size=session.plan.vocab_size,
            batch_size=train.micro_batch_size or train.batch_size,
            autocast=trainer.autocast,
        )
        gap = domain_gap(domain, student_ppl, session.teacher_ppl[domain])
        gaps[domain] = {"student": gap.student_ppl, "teacher": gap.teacher_ppl}
    return gaps


@task(task_run_name="mixture at step {step}", cache_policy=NO_CACHE, persist_result=False)
def update_mixture(session: StudentSession, step: int, gaps: Mapping[str, Mapping[str, float]]) -> MixtureRecord:
    """Append the mixture that follows from a measurement (Eq. 1 at first, then the method's rule) to the history."""
    settings, state = session.settings, session.trainer.state
    records = session.history.records()
    measured = [DomainGap(domain=d, student_ppl=g["student"], teacher_ppl=g["teacher"]) for d, g in gaps.items()]
    mixture = mixture_after(
        settings.method,
        records[-1].mixture if records else None,
        measured,
        settings.mixture,
        session.trainer.data.sizes,
    )
    record = make_record(
        version=len(records),
        step=step,
        tokens_seen=session.tokens_seen,
        gaps=measured,
        mixture=mixture,
        blocks_drawn=state.sampler.drawn,
    )
    session.history.append(record)
    worst = max(record.gaps, key=lambda gap: gap.ratio)
    logger.info(
        "gap at step %d: largest ratio %.3f (%s); mixture %s%s",
        step,
        worst.ratio,
        worst.domain,
        ", ".join(f"{domain} {p:.2f}" for domain, p in record.probabilities.items()),
        "" if METHODS[settings.method].follows_gap else " (fixed)",
    )
    return record
