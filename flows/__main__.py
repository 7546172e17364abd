"""The `ddk` command.

    ddk quickstart              a small run on this machine, without a GPU, a network or a configuration
    ddk distill CONFIG          everything: pack, cache, train, report
    ddk pack|cache|train|gap|report CONFIG      one stage
    ddk eval CONFIG             benchmarks of the student before, the distilled student and the teacher
    ddk compare CONFIG          several methods and seeds on one teacher cache, and what they show
    ddk plan CONFIG             which stages are complete, stale or missing, and why; nothing is run
    ddk plan CONFIG --cost      what it will take of disk, GPU memory and GPU hours; needs no data and no weights
    ddk serve CONFIG            every stage as a deployment served from this process, for development
    ddk automations             on the Prefect server: runs that died become Crashed
    ddk join CONFIG             on the further machines of a training on several
    ddk import CONFIG           caches that others made become stores, without an engine
    ddk export URL DEST         a store becomes Parquet files that others read
    ddk inspect URL             what a store or a run holds
    ddk verify URL              whether every byte of a store, or of all stores of a root, is what was written
    ddk export URL FOLDER       a cache as Parquet files for others; ddk import CONFIG takes one over

Exit codes: 0 done, 1 something failed, 2 something to put right in the call, the configuration or the data (one
line says what; `--debug` shows the traceback).
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable
from importlib import resources
from typing import Annotated, Any

import typer

# Everything heavy (torch, vLLM, Prefect) is imported inside the commands: `ddk --help` answers at once.

app = typer.Typer(
    name="ddk",
    help="Distil a large language model into a small one, domain by domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Replace one field of the file; may be repeated."),
]
Root = Annotated[str | None, typer.Option("--root", help="Store everything here instead of the file's `root`.")]
Force = Annotated[
    bool, typer.Option("--force", help="Make it again where it is complete, beside what is there and never over it.")
]
Run = Annotated[str | None, typer.Option("--run", help="Name the run so, instead of the file's `run`.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and the logs of Prefect and vLLM.")] = False,
) -> None:
    _set_up(debug)


@app.command()
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
        config = _load(path, overrides, root, run)
        _run_flow("distill", config)
    _show_result(config, f"{_command()} distill {os.path.relpath(path)} --root {root}")


@app.command()
def distill(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Everything in order: pack, cache, train, report. What is complete is skipped."""
    loaded = _load(config, overrides, root, run)
    _run_flow("distill", loaded)
    _show_result(loaded, f"{_command()} distill {config}")


@app.command()
def pack(config: ConfigPath, overrides: Overrides = None, root: Root = None, force: Force = False) -> None:
    """Turn every domain's documents into token blocks."""
    loaded = _load(config, overrides, root, None)
    for done in _run_flow("pack_corpus", loaded, force=force):
        _say(f"{done['domain']}: {done['train_blocks']} train, {done['validation_blocks']} validation  {done['url']}")


@app.command()
def cache(config: ConfigPath, overrides: Overrides = None, root: Root = None, force: Force = False) -> None:
    """Capture the teacher's targets for every block, with vLLM; goes on where it stopped.

    Several of these, on one machine or on several, share the work.
    """
    loaded = _load(config, overrides, root, None)
    for done in _run_flow("cache_teacher", loaded, force=force):
        _say(
            f"{done['domain']}: {done['shards_written']} shards written, teacher perplexity "
            f"{done['teacher_ppl']:.3f}, {100 * done['retained_mass']:.2f}% of its probability kept  {done['url']}"
        )


@app.command()
def train(
    config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None, force: Force = False
) -> None:
    """Train the student on the cached targets; goes on at its newest checkpoint.

    With --force the run made again is called RUN.2 (and then RUN.3).
    """
    loaded = _load(config, overrides, root, run)
    done = _run_flow("train_student", loaded, force=force)
    _show_result(loaded.model_copy(update={"run": done["run"]}), f"{_command()} distill {config}")


@app.command()
def join(
    config: ConfigPath,
    node_rank: Annotated[int, typer.Option("--node-rank", min=1, help="Which of the further machines this is.")],
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
) -> None:
    """On every machine but the first, where train.nodes is above 1: help with the training that `ddk train` leads."""
    from flows.stages import open_session
    from tasks.storage_block import use_storage_block
    from tasks.train_processes import join_training

    loaded = _load(config, overrides, root, run)
    use_storage_block(loaded.storage_block)
    join_training(open_session(loaded).job, node_rank)


@app.command()
def gap(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Measure the newest checkpoint against the teacher, and append the mixture that follows."""
    record = _run_flow("rebalance", _load(config, overrides, root, run))
    _say(f"version {record['version']} at step {record['step']}")
    for domain, both in record["perplexities"].items():
        _say(
            f"  {domain}: student {both['student']:.3f}, teacher {both['teacher']:.3f}, "
            f"ratio {both['student'] / both['teacher']:.3f}, probability {record['probabilities'][domain]:.3f}"
        )


@app.command()
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
    loaded = _load(config, overrides, root, run)
    if cost:
        from flows.cost_run import Assumptions

        assumed = Assumptions(
            gpu=gpu, gpu_memory=gpu_memory, gpus=gpus, mfu=mfu, usd_per_hour=usd_per_hour, blocks=blocks
        )
        _show_cost(loaded, assumed, as_json=as_json)
        return
    if as_json:
        from ddk.errors import UserError

        raise UserError("--json goes with --cost")
    from flows.plan import plan_stages, render
    from tasks.storage_block import use_storage_block

    use_storage_block(loaded.storage_block)
    for line in render(plan_stages(loaded)):
        _say(line)


@app.command()
def report(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Write a run's report, finished or not."""
    _say(_run_flow("report", _load(config, overrides, root, run))["index.html"])


@app.command("eval")
def evaluate(
    config: ConfigPath,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="A,B@5,…", help="lm-evaluation-harness's tasks; @ sets the worked examples."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="'paper', 'paper-5shot', 'code', or 'local': all of --data.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FOLDER", help="Files of questions; the rest comes from the hub.")
    ] = None,
    models: Annotated[str, typer.Option("--models", help="Which of the three.")] = "before,student,teacher",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions a task, to try it out.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Execute programs that models wrote, in a sandbox.")
    ] = False,
    allow_unisolated: Annotated[
        bool, typer.Option("--allow-code-unisolated", help="Execute them where no sandbox is to be had. Dangerous.")
    ] = False,
    backend: Annotated[str, typer.Option("--backend", help="'auto', 'hf' or 'vllm'.")] = "auto",
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
) -> None:
    """Put the student before, the distilled student and the teacher to benchmarks.

    What was answered before, here or in another run of the same root, is not asked again.
    """
    # tqdm reads it when it is first imported; the harness has a bar for every one of its loops.
    os.environ.setdefault("TQDM_DISABLE", "1")
    loaded = _load(config, overrides, root, run)
    from flows.evaluate import evaluation_config, show_scores

    evaluation = evaluation_config(
        tasks=tasks,
        preset=preset,
        data=data,
        models=models,
        limit=limit,
        allow_code="unisolated" if allow_unisolated else "isolated" if allow_code else "no",
        backend=backend,
    )
    done = _run_flow("evaluate", loaded, module="flows.evaluate", evaluation=evaluation)
    show_scores(loaded, done["report"], _say)


@app.command()
def compare(
    config: ConfigPath,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B,…", help="By default all that need no live teacher.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,N,…")] = "0,1,2",
    sweeps: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SECTION.FIELD=V,V,…", help="A variant for each value; may be repeated."),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option("--variant", metavar="'NAME: FIELD=V; FIELD=V'", help="One by hand; may be repeated."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="NAME", help="Take differences from it; by default ddk."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the comparison; by default the file's `run`.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report what is there.")] = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Run several methods and seeds on one teacher cache, and report how they differ; goes on where it stopped.

    Exits with 1 where runs have failed; the others are compared all the same.
    """
    from flows import compare as comparing
    from flows.variants import request, whole_numbers
    from tasks.compare_report import write_comparison
    from tasks.storage_block import use_storage_block

    loaded = _load(config, overrides, root, None)
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
        use_storage_block(loaded.storage_block)
        write_comparison(loaded.root, comparing.found(loaded, asked, comparing.refusals(loaded, asked)))
    else:
        with contextlib.suppress(comparing.SomeRunsFailedError):
            _interruptible(lambda: comparing.compare(config=loaded, request=asked))
    if not _show_comparison(loaded.root, asked.name):
        raise typer.Exit(1)


@app.command()
def serve(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Serve every stage as a deployment from this process, for development; Ctrl-C ends it.

    No work pool and no worker is needed. Start runs in Prefect's UI, or with `prefect deployment run distill/dev`.
    """
    loaded = _load(config, overrides, root, run)
    from flows import serve as serving

    serving.serve(loaded, _say)


@app.command()
def automations(
    silence: Annotated[
        int,
        typer.Option(
            "--within", min=90, metavar="SECONDS", help="A run without a heartbeat for so long counts as dead."
        ),
    ] = 540,
    rebalance: Annotated[
        bool, typer.Option("--rebalance-on-checkpoint", help="Besides, measure the gap after each checkpoint.")
    ] = False,
    deployment: Annotated[
        str, typer.Option("--deployment", help="With --rebalance-on-checkpoint: which one measures.")
    ] = "rebalance/rebalance",
    remove: Annotated[bool, typer.Option("--remove", help="Remove those that this command has made.")] = False,
) -> None:
    """Make the automation on the Prefect server that marks runs as Crashed whose heartbeats have stopped.

    A second call changes nothing. The default is three times Prefect's own pace, 180 s; the deployments of prefect.yaml
    send a heartbeat every 30 s, so that where there are no other runs --within 90 will do.
    """
    from flows import automations as made

    done = made.remove() if remove else made.set_up(silence, deployment if rebalance else None)
    for one in done:
        _say(f"{one.what:<10} {one.name}{'' if one.enabled else '   (switched off on the server)'}")
    if not done:
        _say("there were none")


@app.command("import")
def import_caches(
    config: ConfigPath,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", metavar="NAME", help="Only this domain; may be repeated.")
    ] = None,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Make stores of domains whose files hold a teacher's predictions already (targets: topk or distillkit).

    These are `pack` and `cache` for these domains alone; no engine is started, and teacher.model is read for its
    tokenizer only.
    """
    loaded = _load(config, overrides, root, None)
    from flows.exchange import imported_only

    for done in _run_flow("import_caches", imported_only(loaded, domains or ()), module="flows.exchange"):
        _say(
            f"{done['domain']}: {done['shards_written']} shards written, teacher perplexity "
            f"{done['teacher_ppl']:.3f}, {100 * done['retained_mass']:.2f}% of its probability kept  {done['url']}"
        )


@app.command()
def export(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a targets store (<root>/targets/…/<domain>.zarr).")],
    folder: Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL for the Parquet files.")],
    row_format: Annotated[
        str, typer.Option("--format", help="'topk' (plain lists) or 'distillkit' (its bytes).")
    ] = "topk",
    config: Annotated[
        str, typer.Option("--config", help="Of distillkit: 'k50', 'k128' or a compression_config.yaml.")
    ] = "k50",
    split: Annotated[str, typer.Option("--split", help="'train' or 'validation'.")] = "train",
) -> None:
    """Write a targets store and its blocks as Parquet files with a card; goes on where it stopped."""
    from flows.exchange import export_targets

    export_targets(url, folder, row_format=row_format, config=config, split=split, say=_say)


@app.command()
def inspect(url: Annotated[str, typer.Argument(metavar="URL", help="Of a store (….zarr) or of a run.")]) -> None:
    """Say what a store or a run holds: dimensions, blocks, bytes, inputs."""
    from flows.inspect import describe

    for line in describe(url):
        _say(line)


@app.command()
def verify(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a store (….zarr), or of a root with many.")],
    fast: Annotated[bool, typer.Option("--fast", help="Only that objects are there, with the right size.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Mark damaged shards to be made again.")] = False,
    replay: Annotated[
        str | None,
        typer.Option("--replay", metavar="CONFIG", help="Besides, capture a sample again with this file's teacher."),
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=2, help="With --replay: how many of each store.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --replay: which ones.")] = 0,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Read every byte of a store and name what is damaged; exits with 1 where something is.

    With --repair the damaged shards are taken out, so that the next `ddk pack` or `ddk cache` makes these again and
    no others. With --replay the live teacher says whether the numbers are its own.
    """
    from flows.verify import replay_all, verify_all

    if not verify_all(url, full=not fast, repair=repair, say=_say):
        raise typer.Exit(1)
    if replay is not None:
        config = _load(replay, overrides, root, None)
        if not replay_all(url, config, blocks=blocks, seed=seed, repair=repair, say=_say):
            raise typer.Exit(1)


class _InterruptedError(Exception):
    """Somebody pressed Ctrl-C while a flow ran."""


def main() -> None:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv
    # The option is global and is wanted most after something has failed: accept it anywhere.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(_exit_code(lambda: app(["--debug", *arguments] if debug else arguments, standalone_mode=True), debug))


def _exit_code(call: Callable[[], Any], debug: bool) -> int:
    from ddk.errors import UserError

    try:
        call()
    except UserError as error:
        if debug:
            raise
        return _refusal(error)
    except _InterruptedError:
        typer.secho("ddk: interrupted; the same command goes on where it stopped", err=True)
        return 1
    except Exception as error:
        from storage.errors import explained

        if debug:
            raise
        if (known := explained(error)) is not None:
            return _refusal(known)
        typer.secho(f"ddk: {type(error).__name__}: {error}", fg=typer.colors.RED, err=True)
        typer.secho(
            "ddk: this is no mistake of yours; --debug shows the traceback. What was complete is kept, and the same "
            "command goes on from there.",
            err=True,
        )
        return 1
    return 0


def _refusal(error: Exception) -> int:
    typer.secho(f"ddk: {error}", fg=typer.colors.RED, err=True)
    return 2


def _load(path: str, overrides: list[str] | None, root: str | None, run: str | None) -> Any:
    from flows.config import load_config

    return load_config(path, overrides or (), root, run)


def _run_flow(name: str, config: Any, module: str = "flows.stages", **options: Any) -> Any:
    """Run one flow with those of the configuration's sections that it takes, and further parameters."""
    import importlib
    import inspect as introspection

    from flows import stages

    flow = getattr(importlib.import_module(module), name)
    parameters = stages.flow_parameters(config)
    taken = introspection.signature(flow.fn).parameters
    return _interruptible(lambda: flow(**{key: value for key, value in parameters.items() if key in taken}, **options))


def _interruptible(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except KeyboardInterrupt:
        raise _InterruptedError from None  # typer would end the process at once, without a word


def _show_result(config: Any, command: str) -> None:
    """The gap before and after, the mixture's path, and where everything lies."""
    from rich.console import Console

    from storage.runs import RunFolder
    from tasks.report_page import mixture_path, terminal_table
    from tasks.run_summary import interval_records

    folder = RunFolder(config.root, config.run)
    records = interval_records(folder)
    # Elsewhere than in a terminal rich would take 80 columns, too few for the mixture of ten domains.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(terminal_table(records))
    console.print(mixture_path(records))
    _say(f"report    {folder.report_url}/index.html")
    _say(f"student   {folder.student_url}   (an ordinary Hugging Face folder)")
    _say("next      " + _next_step(config, command))


def _show_cost(config: Any, assumed: Any, *, as_json: bool) -> None:
    import json

    from rich.console import Console

    from flows import cost, cost_table

    found = cost.estimate(config, assumed)
    if as_json:
        _say(json.dumps(cost_table.as_json(found), indent=2, ensure_ascii=False))
        return
    Console(width=None if sys.stdout.isatty() else 200).print(cost_table.table(found, config.run))
    for line in cost_table.warning_lines(found):
        _say(line)


def _show_comparison(root: str, name: str) -> bool:
    """The table, what failed, and where the report lies. Returns whether nothing failed."""
    from rich.console import Console

    from storage import uri
    from tasks.compare_page import in_words, terminal_comparison
    from tasks.compare_report import DATA, comparison_url, read_comparison

    folder = comparison_url(root, name)
    comparison = read_comparison(uri.join(folder, DATA))
    Console(width=None if sys.stdout.isatty() else 200).print(terminal_comparison(comparison))
    for sentence in in_words(comparison):
        _say(sentence)
    reasons: dict[str, list[str]] = {}
    for run in comparison.failed:
        reasons.setdefault(run.reason or "", []).append(run.run)
    for reason, runs in reasons.items():
        _say(f"failed    {', '.join(runs)}: {reason}")
    waiting = [run.run for run in comparison.runs if run.status in ("unfinished", "missing")]
    if waiting:
        _say(f"waiting   {', '.join(waiting)}")
    _say(f"report    {folder}/index.html")
    return not reasons


def _next_step(config: Any, command: str) -> str:
    if config.method == "ddk":
        return f"{command} --run equal --set method=ddk_equal   (the same with equal sampling; the cache is reused)"
    return "ddk report CONFIG for this report again; ddk inspect URL for any store"


def _command() -> str:
    """How this very command is called from here: `ddk` where it is on the PATH, else e.g. `.venv/bin/ddk`."""
    called = sys.argv[0]
    if os.path.basename(called) != "ddk" or shutil.which("ddk") is not None:
        return "ddk"
    return os.path.relpath(called)


def _say(line: str) -> None:
    typer.echo(line)


def _set_up(debug: bool) -> None:
    """Before anything heavy is imported: no outside calls, quiet libraries, our own log on stderr."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "ddk")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not debug:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("TORCH_LOGS", "-all")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("ddk")
    ours.addHandler(handler)
    ours.setLevel(logging.DEBUG if debug else logging.INFO)


if __name__ == "__main__":
    main()
