"""The pipelines as Prefect flows. Each takes sections of the configuration as its parameters.

    pack_corpus    documents → blocks            cache_teacher   blocks → teacher targets
    select_blocks  blocks and targets → which blocks to train on, of domains with `select`
    train          intervals of training, each followed by gap and mixture; ends with student and report
    rebalance      gap of the newest checkpoint → the next mixture
    report         a run's report, at any time   distill         all of it, in order

Every stage skips complete work, so any stage may be run again, alone. A stage that runs alone plans its own stores;
`distill` plans once for all of its stages.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

from prefect import Flow, flow, runtime
from pydantic import Field

from ddk.errors import UserError
from ddk.mixture import caught_up
from ddk.packing import PackingConfig
from ddk.train_config import StudentConfig
from flows.capture_parts import capture_run_name, other_parts
from flows.config import Config
from storage.corpus.domain import DomainConfig, selects_blocks
from storage.files.claims import remove_claims
from storage.runs.folder import RunFolder, name_to_make_again
from storage.runs.mixtures import MixtureRecord
from storage.stores.layout import Kind
from tasks.capture.cache_targets import cache_targets
from tasks.capture.import_targets import import_targets
from tasks.packing.pack_corpus import pack_corpus as pack_domain
from tasks.packing.pack_rows import pack_rows
from tasks.planning.complete_runs import remember_complete
from tasks.planning.preflight import check_student_if_there
from tasks.planning.selection_plan import plan_selections
from tasks.planning.store_plan import Plan, plan_stores
from tasks.reporting.now import show_stage
from tasks.running.loopback import loopback_past_proxies
from tasks.running.plain_errors import plain_errors
from tasks.running.sharing import alone
from tasks.running.storage_block import use_storage_block
from tasks.selecting.select_blocks import select_domain
from tasks.showing.progress import logger
from tasks.teachers.config import TeacherConfig
from tasks.teachers.sources import open_teacher
from tasks.training.finish import report_run, save_final_student
from tasks.training.overtraining import reason_to_stop
from tasks.training.run_inputs import RunInputs, check_leaves_of_mixture, check_run
from tasks.training.session import StudentSession, evaluate_gap, train_interval, update_mixture

# In every process that runs a flow.
plain_errors()
loopback_past_proxies()

OPTIONS = {
    "force": "Redo a complete stage into a new store or run; existing ones are kept.",
    "evaluation": "Benchmarks to run, and their options.",
    "part": "Number of this run, if several runs capture together.",
}
"""What the form says of parameters that are no section of the configuration."""
Force = Annotated[bool, Field(description=OPTIONS["force"])]
Part = Annotated[int, Field(ge=1, description=OPTIONS["part"])]

_PLANNED: ContextVar[Plan | None] = ContextVar("planned", default=None)
"""The stores of a flow that runs several stages: these take them from here, and do not look everything up again."""


@contextmanager
def _planned(plan: Plan) -> Iterator[None]:
    token = _PLANNED.set(plan)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def _plan_of_stage(
    root: str,
    domains: dict[str, DomainConfig],
    packing: PackingConfig,
    teacher: TeacherConfig,
    make_again: Collection[Kind],
    student: StudentConfig | None,
) -> Plan:
    """That of the flow which runs the stage, and has looked at the student; else its own."""
    planned = _PLANNED.get()
    if planned is not None and not make_again:
        return planned
    plan = plan_stores(root, domains, packing, teacher, make_again, student)
    check_student_if_there(student, plan)
    return plan


def by_sections(*, name: str, flow_run_name: str) -> Callable[[Callable[..., Any]], Flow[..., Any]]:
    """Make a flow of a function of the whole configuration, with each section as a parameter of its own.

    A deployment overrides parameters one by one, each whole; a single `config` parameter would be replaced with all
    its sections. Names, types and defaults are those of `Config`, and stand there alone. What else the function takes
    is a parameter too.
    """
    parameters = [
        inspect.Parameter(
            section,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.get_default(),
            annotation=field.annotation,
        )
        for section, field in Config.model_fields.items()
    ]

    def decorate(function: Callable[..., Any]) -> Flow[..., Any]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def call(**given: Any) -> Any:
            config = Config(**{section: given[section] for section in given if section in Config.model_fields})
            use_storage_block(config.storage_block)
            return function(config, **{one.name: given[one.name] for one in own if one.name in given})

        call.__name__, call.__qualname__ = function.__name__, function.__qualname__
        call.__module__, call.__doc__ = function.__module__, function.__doc__
        # What Prefect reads for its form, and pydantic for its checks.
        every = [*parameters, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own)]
        call.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return flow(name=name, flow_run_name=flow_run_name, persist_result=False)(call)

    return decorate


@flow(name="pack-corpus", flow_run_name="pack", persist_result=False)
def pack_corpus(
    root: str,
    domains: dict[str, DomainConfig],
    teacher: TeacherConfig,
    packing: PackingConfig,
    storage_block: str | None = None,
    force: Force = False,
    student: StudentConfig | None = None,
) -> list[dict[str, Any]]:
    """Documents of every domain → token blocks.

    Documents end with the student's end of text, unless `packing` names it; without a student, with the teacher's.

    Returns:
        What `tasks.packing.pack_corpus.pack_corpus` says of each domain.
    """
    use_storage_block(storage_block)
    plan = _plan_of_stage(root, domains, packing, teacher, ["blocks"] if force else (), student)
    return [
        pack_rows(plan, domain) if plan[domain].corpus.imported else pack_domain(plan, domain)
        for domain in plan.domains
    ]


@flow(name="cache-teacher", flow_run_name=capture_run_name, persist_result=False)
def cache_teacher(
    root: str,
    domains: dict[str, DomainConfig],
    teacher: TeacherConfig,
    packing: PackingConfig,
    storage_block: str | None = None,
    force: Force = False,
    part: Part = 1,
    student: StudentConfig | None = None,
) -> list[dict[str, Any]]:
    """Token blocks of every domain → teacher targets, with one engine for all; imported ones need none.

    With `teacher.workers` above 1 it starts further runs of its deployment, which share the shards with it.

    Returns:
        What `tasks.capture.cache_targets.cache_targets` says of each domain.
    """
    use_storage_block(storage_block)
    plan = _plan_of_stage(root, domains, packing, teacher, ["targets"] if force else (), student)
    done = {domain: import_targets(plan, domain) for domain in plan.domains if plan[domain].corpus.imported}
    if len(done) == len(plan.domains):
        return list(done.values())
    with (
        other_parts(plan, teacher, part, dict(runtime.flow_run.parameters)),
        open_teacher(
            teacher.model_copy(update={"model": plan.teacher_folder, "revision": None}),
            seq_len=packing.seq_len,
            vocab_size=plan.vocab_size,
        ) as engine,
    ):
        return [
            done.get(domain) or cache_targets(plan, domain, engine, part, teacher.workers, teacher.max_bytes)
            for domain in plan.domains
        ]


@by_sections(name="select-blocks", flow_run_name="select {run}")
def select_blocks(config: Config) -> list[dict[str, Any]]:
    """Choose the train blocks of every domain with `select`; needs complete stores of blocks and targets.

    Returns:
        What `tasks.selecting.select_blocks.select_domain` says of each such domain.
    """
    plan = plan_of(config)
    found = plan_selections(config.root, plan, config.student)
    done = [select_domain(config.root, plan, one, config.student, config.train) for one in found.values()]
    for domain, times in repeats(config, {one["domain"]: one["kept"] for one in done}, len(plan.domains)).items():
        logger.warning(
            "select %s: drawn as often as the others, each kept block is trained on %.1f times in this run; keep more, "
            "or train fewer steps, where that is too often",
            *(domain, times),
        )
    return done


def repeats(config: Config, kept: Mapping[str, int], domains: int) -> dict[str, float]:
    """How often each kept block would be drawn under equal sampling, of the domains where that is more than once."""
    each = config.train.steps * config.train.batch_size / domains
    return {domain: each / count for domain, count in kept.items() if each > count}


@by_sections(name="train-student", flow_run_name="train {run}")
def train_student(config: Config, force: Force = False) -> dict[str, Any]:
    """Train the student interval by interval; needs complete stores of blocks and targets.

    Returns:
        `{"run", "student", "report", "done_before"}`: the run's name (another than was asked for where it is made
        again), and the URLs of the final student and of the report's page.
    """
    if force:
        config = config.model_copy(update={"run": name_to_make_again(config.root, config.run)})
        logger.info("train: the new run is called '%s'", config.run)
    with open_session(config) as session:
        done = session.run.summary()
        done_before = done is not None
        student_url = _as_it_was_saved(session, done) if done is not None else _train_alone(session)
        remove_claims(session.run.url)  # there is nothing to work on any more
    urls = report_run(config.root, config.run)
    return {"run": config.run, "student": student_url, "report": urls["index.html"], "done_before": done_before}


@by_sections(name="rebalance", flow_run_name="rebalance {run}")
def rebalance(config: Config) -> dict[str, Any]:
    """Measure the newest checkpoint's gap and append the mixture that follows; a second time changes nothing.

    Returns:
        The mixture record as plain data.
    """
    with open_session(config) as session:
        found = session.history.at_step(session.step)
        if found is not None:
            logger.info("rebalance %s: step %d is measured already (version %d)", config.run, found.step, found.version)
        return (found or _measure(session)).model_dump()


@flow(name="report", flow_run_name="report {run}", persist_result=False)
def report(run: str, root: str, storage_block: str | None = None) -> dict[str, str]:
    """Write the report of a run, finished or not.

    Returns:
        The URL of each file by its name.
    """
    use_storage_block(storage_block)
    return report_run(root, run)


@by_sections(name="distill", flow_run_name="distill {run}")
def distill(config: Config) -> dict[str, Any]:
    """All stages in order; what is complete is skipped.

    Returns:
        What `train_student` says.
    """
    plan = plan_of(config)
    digest = config.sources.digest()
    # What does not fit is better said before the capture: of the mixture where which leaves there are is in the
    # records, and of the models. Of these once more when there are blocks, whose tokens the student must have.
    check_leaves_of_mixture(config.settings, plan)
    folder = RunFolder(config.root, config.run)
    stages = ["pack", "cache", *(["select"] if selects_blocks(config.domains) else []), "train"]
    with _planned(plan):
        for stage in (pack_corpus, cache_teacher):
            show_stage(folder, stages, 0 if stage is pack_corpus else 1)
            check_run(config.settings, plan)
            stores = (config.root, config.domains, config.teacher, config.packing, config.storage_block)
            stage(*stores, student=config.student)
        if selects_blocks(config.domains):
            show_stage(folder, stages, stages.index("select"))
            select_blocks(**flow_parameters(config))
        show_stage(folder, stages, len(stages) - 1)
        result: dict[str, Any] = train_student(**flow_parameters(config))
        show_stage(folder, stages, len(stages))
    if digest == config.sources.digest():  # nothing has changed while it ran
        remember_complete(config.sources, plan.urls, digest)
    return result


def flow_parameters(config: Config) -> dict[str, Any]:
    """The sections as the parameters of `train_student`, `rebalance` and `distill`."""
    return {name: getattr(config, name) for name in Config.model_fields}


def open_session(config: Config) -> StudentSession:
    """The run's session."""
    return StudentSession(RunInputs(config.settings, plan_of(config)), config.model_dump(mode="json"))


def plan_of(config: Config) -> Plan:
    """The stores of a whole configuration."""
    return _PLANNED.get() or plan_stores(
        config.root, config.domains, config.packing, config.teacher, student=config.student
    )


def _measure(session: StudentSession) -> MixtureRecord:
    step = session.step
    return update_mixture(session, step, evaluate_gap(session, step))


def _mixture_now(session: StudentSession) -> MixtureRecord:
    """The record to train on from here; measured now, unless that is another flow's business."""
    if session.settings.mixture.evaluation == "scheduled" and not session.done:
        records = session.history.records()
        if records:
            logger.info(
                "train: step %d continues with mixture version %d, measured at step %d",
                *(session.step, records[-1].version, records[-1].step),
            )
            return records[-1]
    # A record of this very step was left by an earlier attempt: the same student, so the same measurement.
    return session.history.at_step(session.step) or _measure(session)


def _train_alone(session: StudentSession) -> str:
    """The final student's URL. Two that train one run would undo each other's checkpoints: the second waits."""
    with alone(session.run.url, f"train {session.run.name}"):
        if session.run.summary() is not None:
            return session.run.student_url
        return save_final_student(session, _train_to_the_end(session))


def _as_it_was_saved(session: StudentSession, summary: Mapping[str, Any]) -> str:
    """The final student's URL of a complete run; the student is saved again where its files are not what they were."""
    run = session.run
    faults = run.student_faults()
    if not faults:
        logger.info("train %s: complete already", run.name)
        return run.student_url
    if session.step != summary["steps"]:
        raise UserError(
            f"{faults[0]}, and the checkpoint of step {summary['steps']} is not there, from which run '{run.name}' "
            f"could save its student again; restore the file, or train anew with --force"
        )
    logger.warning("train %s: %s; the student is saved again from the last checkpoint", run.name, "; ".join(faults))
    return save_final_student(session, summary["stopped_early"])


def _reason_to_stop(session: StudentSession, record: MixtureRecord) -> str | None:
    stop_ratio = session.settings.mixture.stop_ratio
    if caught_up(record.gaps, stop_ratio):
        return f"every domain's ratio is at or below mixture.stop_ratio {stop_ratio} at step {record.step}"
    if session.settings.train.overtrained == "warn":
        return None
    return reason_to_stop(session.settings, session.history.records())


def _train_to_the_end(session: StudentSession) -> str | None:
    """Interval by interval. Returns why it stopped before its last step, or None.

    Raises:
        UserError: `train.max_hours` would be over before the next interval's end.
    """
    began, longest = time.monotonic(), 0.0
    while True:
        record = _mixture_now(session)
        if session.done:
            return None
        reason = _reason_to_stop(session, record)
        if reason is not None:
            if record.step != session.step:  # measured elsewhere: the final student has to be measured too
                _measure(session)
            return reason
        started = time.monotonic()
        if longest and session.settings.train.stops_after(started - began + longest):
            raise UserError(
                f"train {session.run.name}: stopped at step {session.step} of {session.settings.train.steps}, as "
                f"train.max_hours is {session.settings.train.max_hours:g}; the checkpoint is kept: run the same "
                f"command to go on"
            )
        try:
            train_interval(session, record, session.step)
        except FloatingPointError as error:
            raise UserError(str(error)) from error
        longest = max(longest, time.monotonic() - started)
