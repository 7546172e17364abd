"""Commands that evaluate results: benchmarks, and comparisons of methods."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ddk.errors import UserError
from flows.commands.app import (
    ConfigPath,
    Overrides,
    Root,
    Run,
    app,
    load,
    loading_libraries,
    run_comparison,
    run_flow,
    say,
    show,
    use_block,
)


@app.command("eval", short_help="Run benchmarks on the student before and after distillation, and on the teacher.")
def evaluate(
    config: ConfigPath,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="A,B@5,…",
            help="Tasks of lm-evaluation-harness; @N sets the number of few-shot examples.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="'paper', 'paper-5shot', 'code', or 'local' (everything in --data).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="FOLDER", help="Folder with files of questions; other tasks use the hub."),
    ] = None,
    concept_field: Annotated[
        str,
        typer.Option(
            "--concept-field",
            metavar="FIELD[,FIELD…]",
            help="Field of the questions in --data with their path (math/algebra), by which accuracies are rolled up.",
        ),
    ] = "concept",
    models: Annotated[
        str, typer.Option("--models", help="Models to evaluate: before, student, teacher.")
    ] = "before,student,teacher",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Ask only this many questions of each task.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            metavar="LENGTH",
            help="Measure perplexity by position on long validation documents up to this length, and hide passkeys; "
            "alone, it runs no benchmark.",
        ),
    ] = None,
    passkey: Annotated[
        str | None,
        typer.Option(
            "--passkey",
            metavar="N,N,…",
            help="With --context: lengths of texts with a passkey, in multiples of the length that the student was "
            "trained at. By default 1,2,4,8; empty for none.",
        ),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Execute programs that the models wrote, in a sandbox.")
    ] = False,
    allow_unisolated: Annotated[
        bool, typer.Option("--allow-code-unisolated", help="Execute them without a sandbox. Dangerous.")
    ] = False,
    backend: Annotated[str, typer.Option("--backend", help="'auto', 'hf' or 'vllm'.")] = "auto",
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
) -> None:
    """Run benchmarks on the student before distillation, the distilled student and the teacher.

    Questions that were answered before, in this run or another run of the same root, are not asked again.
    """
    # tqdm reads it when it is first imported; the harness has a bar for every one of its loops.
    os.environ.setdefault("TQDM_DISABLE", "1")
    loaded = load(config, overrides, root, run)
    with loading_libraries():
        from flows.evaluate import evaluation_config, show_scores

    evaluation = evaluation_config(
        tasks=tasks,
        preset=preset,
        data=data,
        concept_field=concept_field,
        models=models,
        limit=limit,
        allow_code="unisolated" if allow_unisolated else "isolated" if allow_code else "no",
        backend=backend,
        context=context,
        passkey=passkey,
    )
    done = run_flow("evaluate", loaded, module="flows.evaluate", evaluation=evaluation)
    show_scores(loaded, done["report"], say)


@app.command(short_help="Compare methods and seeds on one teacher cache.")
def compare(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="The run's YAML file; with --runs, --root can stand for it.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", metavar="A,B,…", help="Methods to compare; by default all that need no live teacher."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,N,…", help="Seeds of each variant.")] = "0,1,2",
    sweeps: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SECTION.FIELD=V,V,…", help="Compare one variant per value; may be repeated."),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", metavar="'NAME: FIELD=V; FIELD=V'", help="Add one variant with these fields; may be repeated."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="Variant that the others are compared with; by default ddk."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the comparison; by default the file's `run`.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report existing results.")] = False,
    runs: Annotated[
        list[str] | None,
        typer.Option("--runs", metavar="PATTERN", help="Run nothing; compare the runs with these names (weekly-*)."),
    ] = None,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Run several methods and seeds on one teacher cache, and report how they differ; the same call resumes.

    If some runs fail, the others are still compared, and the exit code is 1. With --runs, runs that are there are
    compared over time, and nothing is run.
    """
    if runs:
        given = {"--methods": methods, "--sweep": sweeps, "--variant": variants, "--baseline": baseline}
        _compare_existing(config, runs, name, overrides, root, [option for option, value in given.items() if value])
        return
    if config is None:
        raise UserError("name the run's YAML file (`ddk compare CONFIG`), or give --runs PATTERN with --root ROOT")
    with loading_libraries():
        from flows.comparing import compare as comparing
        from flows.comparing.variants import request, whole_numbers
        from tasks.comparing.report import write_comparison

    loaded = load(config, overrides, root, None)
    asked = request(
        loaded,
        os.path.dirname(os.path.abspath(config)),
        name=name,
        methods=[method.strip() for method in methods.split(",")] if methods else (),
        seeds=whole_numbers(seeds, "--seeds"),
        sweeps=sweeps or (),
        variants=variants or (),
        baseline=baseline,
    )
    if report_only:
        use_block(loaded.storage_block)
        failures = comparing.earlier_failures(loaded, asked) | comparing.refusals(loaded, asked)
        write_comparison(loaded.root, comparing.found(loaded, asked, failures))
    else:
        run_comparison(loaded, asked)
    if not _show_comparison(loaded.root, asked.name):
        raise typer.Exit(1)


def _compare_existing(
    config: str | None,
    runs: list[str],
    name: str | None,
    overrides: list[str] | None,
    root: str | None,
    others: list[str],
) -> None:
    if others:
        raise UserError(
            f"--runs compares runs that are there, and {', '.join(others)} asks for new ones; leave one out"
        )
    if config is None and root is None:
        raise UserError("--runs needs the root of the runs: name it with --root ROOT, or by the run's YAML file")
    loaded = None if config is None else load(config, overrides, root, None)
    block = None if loaded is None else loaded.storage_block
    place = str(root) if loaded is None else loaded.root
    with loading_libraries():
        from flows.comparing.existing import report_existing

    use_block(block)
    if not _show_comparison(place, report_existing(place, runs, name, block)):
        raise typer.Exit(1)


def _show_comparison(root: str, name: str) -> bool:
    """Print the table, the failures and the report's URL. Returns whether nothing failed."""
    from tasks.comparing.page import in_words, terminal_comparison
    from tasks.comparing.report import comparison_url, read_comparison

    folder = comparison_url(root, name)
    comparison = read_comparison(root, name)
    show(terminal_comparison(comparison))
    for sentence in in_words(comparison):
        say(sentence)
    reasons: dict[str, list[str]] = {}
    for run in comparison.failed:
        reasons.setdefault(run.reason or "", []).append(run.run)
    for reason, runs in reasons.items():
        say(f"failed    {', '.join(runs)}: {reason}")
    waiting = [run.run for run in comparison.runs if run.status in ("unfinished", "missing")]
    if waiting:
        say(f"waiting   {', '.join(waiting)}")
    say(f"report    {folder}/index.html")
    return not reasons
