"""The pipeline's stages as commands."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import resources
from typing import Annotated, Any

import typer

from flows.commands.app import (
    ConfigPath,
    Force,
    Overrides,
    Root,
    Run,
    app,
    command,
    load,
    loading_libraries,
    run_flow,
    say,
    use_block,
)


@app.command(short_help="Distil on this machine, without a GPU or a network, in minutes.")
def quickstart(
    root: Annotated[str, typer.Option("--root", help="Folder for the stores and the run.")] = "quickstart-run",
    overrides: Overrides = None,
    run: Run = None,
) -> None:
    """Distil a small student from a small teacher on five domains, here and now: about four minutes on two cores.

    The models, the corpora and the configuration come with the project; vLLM captures the teacher, as in a large
    run. A second call finds everything done.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with resources.as_file(resources.files("flows.presets")) as presets:
        path = os.path.join(presets, "quickstart.yaml")
        config = load(path, overrides, root, run)
        _distill(config)
    _show_result(config, _again(os.path.relpath(path), overrides, root))


@app.command(short_help="Run every stage in order: pack, cache, train, report.")
def distill(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Everything in order: pack, cache, train, report. What is complete is skipped."""
    loaded = load(config, overrides, root, run)
    _distill(loaded)
    _show_result(loaded, _again(config, overrides, root))


@app.command(short_help="Turn every domain's documents into token blocks.")
def pack(config: ConfigPath, overrides: Overrides = None, root: Root = None, force: Force = False) -> None:
    """Turn every domain's documents into token blocks."""
    loaded = load(config, overrides, root, None)
    for done in run_flow("pack_corpus", loaded, force=force):
        say(f"{done['domain']}: {done['train_blocks']} train, {done['validation_blocks']} validation  {done['url']}")


@app.command(short_help="Capture the teacher's targets for every block, with vLLM.")
def cache(config: ConfigPath, overrides: Overrides = None, root: Root = None, force: Force = False) -> None:
    """Capture the teacher's targets for every block, with vLLM; goes on where it stopped.

    Several of these, on one machine or on several, share the work.
    """
    loaded = load(config, overrides, root, None)
    for done in run_flow("cache_teacher", loaded, force=force):
        say(
            f"{done['domain']}: {done['shards_written']} shards written, teacher perplexity "
            f"{done['teacher_ppl']:.3f}, {100 * done['retained_mass']:.2f}% of its probability kept  {done['url']}"
        )


@app.command(short_help="Train the student on the cached targets.")
def train(
    config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None, force: Force = False
) -> None:
    """Train the student on the cached targets; goes on at its newest checkpoint.

    With --force the run made again is called RUN.2 (and then RUN.3).
    """
    loaded = load(config, overrides, root, run)
    done = run_flow("train_student", loaded, force=force)
    _show_result(loaded.model_copy(update={"run": done["run"]}), _again(config, overrides, root))


@app.command(short_help="Measure the gap and append the mixture that follows from it.")
def gap(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Measure the newest checkpoint against the teacher, and append the mixture that follows."""
    record = run_flow("rebalance", load(config, overrides, root, run))
    say(f"version {record['version']} at step {record['step']}")
    for domain, both in record["perplexities"].items():
        say(
            f"  {domain}: student {both['student']:.3f}, teacher {both['teacher']:.3f}, "
            f"ratio {both['student'] / both['teacher']:.3f}, probability {record['probabilities'][domain]:.3f}"
        )


@app.command(short_help="Say what is complete and what is missing, or what a run will cost.")
def plan(
    config: ConfigPath,
    cost: Annotated[
        bool, typer.Option("--cost", help="Say what the run will take instead; the options below go with this one.")
    ] = False,
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of GPU: a100, h100 or h200.")] = "h100",
    gpu_memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=1.0, metavar="GIB", help="Its memory, if not the kind's.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs of a machine, where train.processes is 'auto'.")] = 1,
    mfu: Annotated[float, typer.Option("--mfu", help="Share of the GPU's peak that is reached.")] = 0.4,
    usd_per_hour: Annotated[
        float | None, typer.Option("--usd-per-hour", min=0.0, help="Price of a GPU, for the price of it all.")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Train blocks of a domain without max_train_blocks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The estimate as JSON.")] = False,
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
) -> None:
    """Say which stages are complete, unfinished, stale or missing, and why, without running any.

    With --cost: what the run will take of disk, memory and GPU time, from the configuration and the models' configs
    alone. Neither the corpora nor the weights need be there.
    """
    loaded = load(config, overrides, root, run)
    if cost:
        from flows.costing.run_size import Assumptions

        assumed = Assumptions(
            gpu=gpu, gpu_memory=gpu_memory, gpus=gpus, mfu=mfu, usd_per_hour=usd_per_hour, blocks=blocks
        )
        _show_cost(loaded, assumed, as_json=as_json)
        return
    if as_json:
        from ddk.errors import UserError

        raise UserError("--json goes with --cost")
    from flows.stores.stages_shown import complete_stages, render
    from tasks.showing.waiting import said_if_slow

    use_block(loaded.storage_block)
    stages = complete_stages(loaded)
    if stages is None:
        with loading_libraries():
            from flows.stores.stage_states import plan_stages
        with said_if_slow("plan: looking at the models and the corpora"):
            stages = plan_stages(loaded)
    for line in render(stages):
        say(line)


@app.command(short_help="Write a run's report.")
def report(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Write a run's report, finished or not."""
    say(run_flow("report", load(config, overrides, root, run))["index.html"])


def _distill(config: Any) -> None:
    """Every stage in order. Where all are known to be complete no server is asked, and no model library imported."""
    from tasks.planning.complete_runs import find_complete
    from tasks.showing.progress import logger

    if config.storage_block is None and find_complete(config.sources) is not None:
        logger.info("train %s: complete already", config.run)
    else:
        run_flow("distill", config)


def _again(path: str, overrides: list[str] | None, root: str | None) -> str:
    """The command that distils with the same file and options, for a shell."""
    words = [path, *(["--root", root] if root else [])]
    for override in overrides or ():
        words += ["--set", override]
    return f"{command()} distill {shlex.join(words)}"


def _show_result(config: Any, command: str) -> None:
    """The gap before and after, the mixture's path, and where everything lies."""
    from rich.console import Console

    from storage.runs.folder import RunFolder
    from tasks.reporting.run_summary import interval_records
    from tasks.reporting.terminal import mixture_path, terminal_table

    folder = RunFolder(config.root, config.run)
    records = interval_records(folder)
    # Elsewhere than in a terminal rich would take 80 columns, too few for the mixture of ten domains.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(terminal_table(records))
    console.print(mixture_path(records))
    say(f"report    {folder.report_url}/index.html")
    say(f"student   {folder.student_url}   (an ordinary Hugging Face folder)")
    say("next      " + _next_step(config, command))


def _next_step(config: Any, command: str) -> str:
    if config.method == "ddk":
        return f"{command} --run equal --set method=ddk_equal   (the same with equal sampling; the cache is reused)"
    return "ddk report CONFIG for this report again; ddk inspect URL for any store"


def _show_cost(config: Any, assumed: Any, *, as_json: bool) -> None:
    import json

    from rich.console import Console

    from flows.costing import estimate as cost
    from flows.costing import table as cost_table

    found = cost.estimate(config, assumed)
    if as_json:
        say(json.dumps(cost_table.as_json(found), indent=2, ensure_ascii=False))
        return
    Console(width=None if sys.stdout.isatty() else 200).print(cost_table.table(found, config.run))
    for line in cost_table.warning_lines(found):
        say(line)
