"""The pipeline's stages as commands."""

from __future__ import annotations

import os
import shlex
import shutil
from importlib import resources
from typing import Annotated, Any

import typer

from flows.commands.app import (
    ConfigPath,
    Force,
    FreshOptimizer,
    From,
    Overrides,
    Root,
    Run,
    app,
    command,
    going_on,
    load,
    loading_libraries,
    run_flow,
    say,
    show,
    use_block,
)


@app.command(short_help="Distil on this machine, without a GPU or a network, in minutes.")
def quickstart(
    root: Annotated[str, typer.Option("--root", help="Folder for the stores and the run.")] = "quickstart-run",
    overrides: Overrides = None,
    run: Run = None,
) -> None:
    """Distil a small student from a small teacher on five domains; takes a few minutes on two cores.

    The models, the corpora and the configuration come with the project. vLLM captures the teacher, as in a large run.
    A second call finds everything complete.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with resources.as_file(resources.files("flows.presets")) as presets:
        path = os.path.join(presets, "quickstart.yaml")
        config = load(path, overrides, root, run)
        _distill(config)
    _show_result(config, _again(os.path.relpath(path), overrides, root))


@app.command(short_help="Run every stage in order: pack, cache, select, train, report.")
def distill(
    config: ConfigPath,
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
    source: From = None,
    fresh_optimizer: FreshOptimizer = False,
) -> None:
    """Run every stage in order: pack, cache, select, train, report. Complete stages are skipped."""
    overrides = going_on(overrides, source, fresh_optimizer)
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
    """Capture the teacher's targets for every block, with vLLM; an interrupted capture is resumed.

    If the command runs several times at once, on one machine or on several, the processes share the work.
    """
    loaded = load(config, overrides, root, None)
    for done in run_flow("cache_teacher", loaded, force=force):
        say(
            f"{done['domain']}: {done['shards_written']} shards written, teacher perplexity "
            f"{done['teacher_ppl']:.3f}, {100 * done['retained_mass']:.2f}% of its probability kept  {done['url']}"
        )


@app.command(short_help="Choose the train blocks of the domains that have `select`.")
def select(config: ConfigPath, overrides: Overrides = None, root: Root = None) -> None:
    """Choose which train blocks of each domain with `select` the student is trained on; an interrupted call resumes."""
    loaded = load(config, overrides, root, None)
    done = run_flow("select_blocks", loaded)
    for one in done:
        say(f"{one['domain']}: {one['kept']:,} of {one['blocks']:,} blocks kept  {one['url']}")
    if not done:
        say("no domain has select (difference or trajectory), so that all blocks are used")


@app.command(short_help="Train the student on the cached targets.")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
    source: From = None,
    fresh_optimizer: FreshOptimizer = False,
    force: Force = False,
) -> None:
    """Train the student on the cached targets; training resumes at the newest checkpoint.

    With --from, a new run goes on from another one's checkpoint: with more steps, another learning rate, batch size,
    method or loss, or with further domains. With --force, the new run is called RUN.2 (then RUN.3, and so on).
    """
    overrides = going_on(overrides, source, fresh_optimizer)
    loaded = load(config, overrides, root, run)
    done = run_flow("train_student", loaded, force=force)
    _show_result(loaded.model_copy(update={"run": done["run"]}), _again(config, overrides, root))


@app.command(short_help="Measure the gap and append the resulting mixture.")
def gap(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Measure the gap of the newest checkpoint to the teacher, and append the resulting mixture."""
    record = run_flow("rebalance", load(config, overrides, root, run))
    say(f"version {record['version']} at step {record['step']}")
    for domain, both in record["perplexities"].items():
        say(
            f"  {domain}: student {both['student']:.3f}, teacher {both['teacher']:.3f}, "
            f"ratio {both['student'] / both['teacher']:.3f}, probability {record['probabilities'][domain]:.3f}"
        )


@app.command(short_help="Show which stages are complete or missing, or estimate a run's cost.")
def plan(
    config: ConfigPath,
    cost: Annotated[
        bool, typer.Option("--cost", help="Estimate the run's cost instead; options from --gpu to --json need this.")
    ] = False,
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of GPU: a100, h100 or h200.")] = "h100",
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", min=1.0, metavar="GIB", help="Memory of each GPU; overrides that of the kind."),
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs per machine if train.processes is 'auto'.")] = 1,
    mfu: Annotated[float, typer.Option("--mfu", help="Share of the GPU's peak speed that is reached.")] = 0.4,
    usd_per_hour: Annotated[
        float | None,
        typer.Option("--usd-per-hour", min=0.0, help="Price of a GPU hour, to estimate the price of the run."),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option("--blocks", min=1, help="Train blocks to assume for each domain without max_train_blocks."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON.")] = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="Also show what a law of the root expects of the run's end.")
    ] = False,
    law: Annotated[str, typer.Option("--law", metavar="NAME", help="With --predict: name of the law.")] = "law",
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
    source: From = None,
    fresh_optimizer: FreshOptimizer = False,
) -> None:
    """Show which stages are complete, unfinished, stale or missing, and why; runs nothing.

    With --cost, estimate the disk space, memory and GPU time of the run from the configuration and the models' configs.
    The corpora and the weights are not needed. With --predict, `ddk law` must have fitted a law to runs of the root.
    """
    loaded = load(config, going_on(overrides, source, fresh_optimizer), root, run)
    if cost:
        from flows.costing.run_size import Assumptions

        assumed = Assumptions(
            gpu=gpu, gpu_memory=gpu_memory, gpus=gpus, mfu=mfu, usd_per_hour=usd_per_hour, blocks=blocks
        )
        _show_cost(loaded, assumed, as_json=as_json)
        return
    if as_json:
        from ddk.errors import UserError

        raise UserError("--json needs --cost")
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
    if predict:
        with loading_libraries():
            from flows.predicting.expected import expected
        for line in expected(loaded, law):
            say(line)


@app.command(short_help="Write a run's report.")
def report(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Write the report of a run; the run need not be finished."""
    say(run_flow("report", load(config, overrides, root, run))["index.html"])


def _distill(config: Any) -> None:
    """Run every stage in order. If all are known to be complete, neither a server nor a model library is needed."""
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
    from storage.runs.folder import RunFolder
    from tasks.reporting.costs import cost_lines, costs_of
    from tasks.reporting.run_summary import interval_records
    from tasks.reporting.terminal import mixture_paths, terminal_table

    folder = RunFolder(config.root, config.run)
    records = interval_records(folder)
    show(terminal_table(records), *mixture_paths(records, shutil.get_terminal_size().columns))
    for what, much in cost_lines(costs_of(folder)):
        say(f"{what.lower()}: {much}")
    say(f"report    {folder.report_url}/index.html")
    say(f"student   {folder.student_url}   (an ordinary Hugging Face folder)")
    say("next      " + _next_step(config, command))


def _next_step(config: Any, command: str) -> str:
    if config.method == "ddk":
        return f"{command} --run equal --set method=ddk_equal   (the same with equal sampling; reuses the cache)"
    return "ddk report CONFIG writes this report again; ddk inspect URL shows a store"


def _show_cost(config: Any, assumed: Any, *, as_json: bool) -> None:
    import json

    from flows.costing import estimate as cost
    from flows.costing import table as cost_table

    found, taken = cost.estimate(config, assumed), _taken(config)
    if as_json:
        say(json.dumps(cost_table.as_json(found, taken), indent=2, ensure_ascii=False))
        return
    show(cost_table.table(found, config.run), *([cost_table.measured_table(found, taken)] if taken else []))
    for line in cost_table.warning_lines(found):
        say(line)


def _taken(config: Any) -> Any:
    """What the run has cost so far; None where it has not begun, or its root cannot be reached."""
    from storage.errors import StoreError
    from storage.runs.folder import RunFolder
    from tasks.reporting.costs import costs_of

    try:
        folder = RunFolder(config.root, config.run)
        return costs_of(folder) if folder.identity() is not None else None
    except (StoreError, OSError):
        return None
