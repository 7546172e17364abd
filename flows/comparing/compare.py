"""`ddk compare`: several methods and seeds on one teacher cache, as runs that can be resumed, and what they show.

The flow packs and captures what the variants need (once for all that need the same), trains each run by the ordinary
flow `train_student`, and writes the report. Complete work is skipped, so that the same call resumes where it was
stopped. A run that fails is reported as failed, and the others continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from prefect import flow

from ddk.errors import LostPartError, UserError
from flows.comparing.variants import PlannedRun, Request, planned_runs
from flows.config import Config
from flows.stages import cache_teacher, flow_parameters, pack_corpus, plan_of, select_blocks, train_student
from storage.corpus.domain import selects_blocks
from storage.errors import explained
from storage.files import uri
from storage.fingerprint import differences
from storage.runs.folder import RunFolder
from tasks.comparing import report as compare_report
from tasks.comparing.collect import collect
from tasks.comparing.data import ComparedVariant, Comparison
from tasks.planning.store_plan import Plan
from tasks.running.storage_block import use_storage_block
from tasks.showing.progress import logger
from tasks.training.finish import report_run
from tasks.training.run_inputs import RunInputs, check_run


class SomeRunsFailedError(Exception):
    """The comparison is written, without the runs that failed."""


@flow(name="compare", flow_run_name="compare {request.name}", persist_result=False)
def compare(config: Config, request: Request) -> dict[str, str]:
    """Run what is asked for and is not complete, and write the report.

    Returns:
        The URL of each file of the report by its name.

    Raises:
        SomeRunsFailedError: at the end, where runs have failed; the report says which, and why.
    """
    use_storage_block(config.storage_block)
    runs = planned_runs(config, request)
    failures = refusals(config, request)
    for name, reason in failures.items():
        logger.warning("compare: %s cannot be run: %s", name, reason)
    _check_stores(runs, failures)
    plans = _make_stores(runs, failures)
    for number, run in enumerate(runs):
        if run.run not in failures and run.config is not None:
            logger.info("compare: run %d of %d, %s", number + 1, len(runs), run.run)
            _attempt([run.run], failures, partial(_train, run.config, plans))
    urls = compare_report.report_comparison(config.root, found(config, request, failures))
    if failures:
        raise SomeRunsFailedError(f"{len(failures)} of {len(runs)} runs failed: {', '.join(failures)}")
    return urls


def refusals(config: Config, request: Request) -> dict[str, str]:
    """Why the configuration cannot run a variant, by the name of the run."""
    return {run.run: run.refusal for run in planned_runs(config, request) if run.refusal is not None}


def refusals_before_capture(config: Config, request: Request) -> dict[str, str]:
    """Why a variant cannot be run, by the name of the run, as far as that is known without packing or capturing.

    Unlike `refusals`, it reads the models and the corpora.
    """
    failures = refusals(config, request)
    _check_stores(planned_runs(config, request), failures)
    return failures


def earlier_failures(config: Config, request: Request) -> dict[str, str]:
    """Why runs had failed by the last report, of those that are not complete by now; by the name of the run."""
    failures = compare_report.earlier_failures(config.root, request.name)
    return {run: why for run, why in failures.items() if RunFolder(config.root, run).summary() is None}


def found(config: Config, request: Request, failures: Mapping[str, str]) -> Comparison:
    """The comparison as the runs' folders hold it now.

    Args:
        failures: why a run failed, by its name.
    """
    return collect(
        config.root,
        request.name,
        variants=[
            ComparedVariant(name=variant.name, method=variant.method, note=variant.note) for variant in request.variants
        ],
        runs=[(run.variant.name, run.seed, run.run) for run in planned_runs(config, request)],
        baseline=request.baseline,
        failures=failures,
        left_out=request.left_out,
    )


def _attempt(runs: Sequence[str], failures: dict[str, str], work: Callable[[], object]) -> None:
    """Do it; if it fails, that is these runs' failure, and no other's."""
    try:
        work()
    except Exception as error:
        known = error if isinstance(error, UserError | LostPartError) else explained(error)
        reason = str(known) if known is not None else f"{type(error).__name__}: {error}"
        logger.warning("compare: %s failed: %s", ", ".join(runs), reason)
        failures.update(dict.fromkeys(runs, reason))


def _check_stores(runs: Sequence[PlannedRun], failures: dict[str, str]) -> None:
    """Plan the stores of all runs: whoever cannot be served fails now, and not after hours of capture for others."""

    def check(config: Config, readers: Sequence[PlannedRun]) -> None:
        plan = plan_of(config)
        for run in readers:
            if run.config is not None:
                _attempt([run.run], failures, partial(check_run, run.config.settings, plan))

    for config, readers in _by_stores(runs):
        _attempt([run.run for run in readers], failures, partial(check, config, readers))


def _make_stores(runs: Sequence[PlannedRun], failures: dict[str, str]) -> dict[str, Plan]:
    """Blocks and targets, once for all runs that read the same. Returns the plans of the stores by `_stores_of`."""
    plans: dict[str, Plan] = {}

    def make(config: Config) -> None:
        for stage in (pack_corpus, cache_teacher):
            stage(config.root, config.domains, config.teacher, config.packing, student=config.student)
        if selects_blocks(config.domains):
            select_blocks(**flow_parameters(config))
        plans[_stores_of(config)] = plan_of(config)

    for config, readers in _by_stores(runs):
        left = [run.run for run in readers if run.run not in failures]
        if left:
            _attempt(left, failures, partial(make, config))
    return plans


def _by_stores(runs: Sequence[PlannedRun]) -> Iterator[tuple[Config, list[PlannedRun]]]:
    """For each set of stores, a configuration that makes them and the runs that read them."""
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if run.config is not None:
            groups.setdefault(_stores_of(run.config), []).append(run)
    for group in groups.values():
        if group[0].config is not None:
            yield group[0].config, group


def _stores_of(config: Config) -> str:
    return config.model_dump_json(include={"root", "domains", "teacher", "packing", "student"})


def _train(config: Config, plans: Mapping[str, Plan]) -> None:
    """Train one run, unless it is complete: then its folder is left as it is.

    Raises:
        UserError: it is complete, with other settings.
    """
    folder = RunFolder(config.root, config.run)
    if folder.summary() is None:
        train_student(**flow_parameters(config))
        return
    identity = RunInputs(config.settings, plans[_stores_of(config)]).identity
    changed = differences(folder.identity() or {}, identity)
    if changed:
        raise UserError(
            f"run '{config.run}' is complete with other settings ({'; '.join(changed)}); give the comparison another "
            f"--name, or remove that folder"
        )
    logger.info("compare: %s: complete already", config.run)
    if not uri.exists(uri.join(folder.report_url, "index.html")):  # it was killed between the student and its report
        report_run(config.root, config.run)
