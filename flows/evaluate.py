"""The flow `evaluate`: runs benchmarks on a run's three models, and shows the results beside the perplexities.

There is one task run per model. Questions that were answered before are not asked again
(`tasks.evaluation.evaluate_model`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from prefect import flow
from pydantic import ValidationError

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.train_config import StudentConfig
from storage.corpus.domain import DomainConfig
from storage.files.uri import absolute
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from tasks.evaluation.completions import Completion, draw_completions
from tasks.evaluation.local_files import DataFolder
from tasks.evaluation.models import evaluated_models, require_harness
from tasks.evaluation.names import EvaluationConfig, wanted_benchmarks
from tasks.evaluation.validation_texts import ValidationTexts
from tasks.packing.encoder import TextEncoder
from tasks.running.storage_block import use_storage_block
from tasks.teachers.config import TeacherConfig
from tasks.training.finish import report_run

VALIDATION_DOCUMENTS = 500
"""Of a domain, from which lines to complete are drawn: as many as the paper measures perplexities on."""


@flow(name="evaluate", flow_run_name="evaluate {run}", persist_result=False)
def evaluate(
    run: str,
    root: str,
    domains: dict[str, DomainConfig],
    teacher: TeacherConfig,
    student: StudentConfig,
    evaluation: EvaluationConfig,
    storage_block: str | None = None,
    packing: PackingConfig | None = None,
) -> dict[str, Any]:
    """Put a run's models to benchmarks, and write the page that shows them; the run's report shows them too.

    Returns:
        `{"models": [...], "report": {name: URL}}`: what each model was asked, and the page's files.

    Raises:
        UserError: a package, a model, a task or its questions are not there.
    """
    use_storage_block(storage_block)
    require_harness()
    # Heavy, and the harness may be missing.
    from tasks.evaluation.evaluate_model import Evaluation, evaluate_model
    from tasks.evaluation.long_context import evaluate_context, long_inputs
    from tasks.evaluation.questions import build_measures
    from tasks.reporting.scores import report_evaluation

    folder = DataFolder(evaluation.data, evaluation.concept_field) if evaluation.data is not None else None
    texts = ValidationTexts(root, domains)
    benchmarks = wanted_benchmarks(evaluation, lambda: texts.names, folder.tasks if folder is not None else ())
    count = min(evaluation.completions, evaluation.limit or evaluation.completions)

    def completions(domain: str) -> Sequence[Completion]:
        return draw_completions(texts.read(domain, VALIDATION_DOCUMENTS), count, evaluation.seed)

    # Models first: that one is missing is known at once, and a large set of questions takes a while.
    with evaluated_models(evaluation.models, root=root, run=run, student=student, teacher=teacher) as models:
        inputs = None
        if evaluation.context is not None:
            how = packing or PackingConfig()
            inputs = long_inputs(
                texts,
                domains,
                evaluation,
                student=student,
                teacher=teacher,
                packing=how,
                encoder=lambda tokenizer, control: TextEncoder(tokenizer, control=control),
            )
        measures = build_measures(
            benchmarks, folder=folder, completions=completions, limit=evaluation.limit, seed=evaluation.seed
        )
        kept = EvaluationFolder(root, run)
        asked = Evaluation(measures, kept, evaluation)
        done = [evaluate_model(asked, model) for model in models] if measures else []
        if inputs is not None:
            done += [evaluate_context(kept, inputs, model, evaluation) for model in models]
    urls = report_evaluation(root, run)
    if MixtureHistory(RunFolder(root, run).url).records():
        report_run(root, run)  # its page has the scores too
    return {"models": done, "report": urls}


def evaluation_config(
    *, tasks: str | None, data: str | None, models: str, passkey: str | None = None, **further: Any
) -> EvaluationConfig:
    """From what stands on the command line.

    Raises:
        UserError: an option has no such value.
    """
    if passkey is not None:
        further["passkey"] = _names(passkey)
    try:
        return EvaluationConfig(
            tasks=_names(tasks or ""),
            data=absolute(data, os.getcwd()) if data is not None else None,
            models=_names(models),  # type: ignore[arg-type]
            **further,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"--{str(problem['loc'][0]).replace('_', '-')}: {problem['msg']} (it is {problem['input']!r})"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def show_scores(config: Any, report: dict[str, str], say: Callable[[str], None]) -> None:
    """The scores in the terminal, and where the page lies."""
    import sys

    from rich.console import Console

    from tasks.reporting.concepts import terminal_concepts
    from tasks.reporting.context import measured_context, terminal_context
    from tasks.reporting.scores import measured_rows, terminal_scores

    rows, concepts = measured_rows(config.root, config.run)
    context = measured_context(config.root, config.run)
    console = Console(width=None if sys.stdout.isatty() else 200)
    if rows or not context:
        console.print(terminal_scores(rows))
    for table in (*terminal_concepts(concepts), *terminal_context(context)):
        console.print(table)
    for name, url in report.items():
        say(f"{name:<16}{url}")
