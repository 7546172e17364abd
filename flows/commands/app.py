"""What the commands share: the application, common options, and running a flow from a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tasks.running.loopback import loopback_past_proxies

# Everything heavy (torch, vLLM, Prefect) is imported inside the commands: `ddk --help` answers at once.

app = typer.Typer(
    name="ddk",
    help="Distil a large language model into a small one, domain by domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # to import rich takes as long as all else in `ddk --help`
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field of the file; may be repeated."),
]
Root = Annotated[str | None, typer.Option("--root", help="Folder or URL for all stores; overrides `root` in the file.")]
Force = Annotated[
    bool, typer.Option("--force", help="Redo a complete stage into a new store or run; existing ones are kept.")
]
Run = Annotated[str | None, typer.Option("--run", help="Run name; overrides `run` in the file.")]


From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Go on from this run's newest checkpoint, or from that of a step, as a new run (name it with --run).",
    ),
]
FreshOptimizer = Annotated[
    bool, typer.Option("--fresh-optimizer", help="With --from: take the weights along, and not the optimizer's state.")
]


class FlowInterruptedError(Exception):
    """The user pressed Ctrl-C while a flow ran."""


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"ddk {version('ddk-distill')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and the logs of Prefect and vLLM.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and end.")
    ] = False,
) -> None:
    set_up(debug)


def load(path: str, overrides: list[str] | None, root: str | None, run: str | None) -> Any:
    from flows.config import load_config

    return load_config(path, overrides or (), root, run)


def going_on(overrides: list[str] | None, source: str | None, fresh_optimizer: bool) -> list[str]:
    """The overrides that --from and --fresh-optimizer stand for, and the others.

    Raises:
        UserError: --fresh-optimizer is given without --from.
    """
    import json

    from ddk.errors import UserError

    if source is None:
        if fresh_optimizer:
            raise UserError("--fresh-optimizer needs --from, which names the run to go on from")
        return overrides or []
    optimizer = ["train.from_optimizer=false"] if fresh_optimizer else []
    return [*(overrides or ()), f"train.from_run={json.dumps(source)}", *optimizer]


def run_flow(name: str, config: Any, module: str = "flows.stages", **options: Any) -> Any:
    """Run one flow with the sections of the configuration that it takes, and further parameters."""
    import importlib
    import inspect as introspection

    with loading_libraries():
        from flows import stages

        flow = getattr(importlib.import_module(module), name)
    reach_prefect()
    parameters = stages.flow_parameters(config)
    taken = introspection.signature(flow.fn).parameters
    return interruptible(lambda: flow(**{key: value for key, value in parameters.items() if key in taken}, **options))


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Around imports of torch, transformers and Prefect, which take several seconds: it says so."""
    from tasks.running.uncollected import uncollected
    from tasks.showing.waiting import said_if_slow

    with said_if_slow("loading torch, transformers and Prefect"), uncollected():
        yield


def reach_prefect() -> None:
    """Make sure that a Prefect server is reachable before it is used.

    Raises:
        UserError: there is none.
    """
    from flows.operating.prefect_server import reach

    interruptible(reach)


def use_block(name: str | None) -> None:
    """`tasks.running.storage_block.use_storage_block`, outside a flow."""
    if name is None:  # Prefect, which holds the blocks, is not imported for nothing
        return
    from tasks.running.storage_block import use_storage_block

    reach_prefect()
    use_storage_block(name)


def interruptible(call: Callable[[], Any]) -> Any:
    """Run a flow; Ctrl-C raises `FlowInterruptedError`. The same call resumes the flow later."""
    from tasks.running.server_loss import going_on_without_its_server

    try:
        return going_on_without_its_server(call)
    except KeyboardInterrupt:
        raise FlowInterruptedError from None  # typer would end the process at once, without a word


def run_comparison(config: Any, asked: Any) -> None:
    """Run what a request of `ddk compare` asks for; runs that fail stand in its report."""
    from flows.comparing import compare as comparing

    reach_prefect()
    with contextlib.suppress(comparing.SomeRunsFailedError):
        interruptible(lambda: comparing.compare(config=config, request=asked))


_PIPED = (80, 120, 200)
"""Columns of a table that is printed elsewhere than in a terminal: the first width at which no cell is cut."""


def show(*tables: Any) -> None:
    """Print tables: in a terminal as wide as that is, elsewhere in 80 columns where that is enough."""
    import io

    from rich.console import Console

    for table in tables:
        if sys.stdout.isatty():
            Console().print(table)
            continue
        for width in _PIPED:
            console = Console(file=io.StringIO(), width=width)
            console.print(table)
            text = console.file.getvalue()  # type: ignore[attr-defined]
            if "…" not in text:
                break
        typer.echo("\n".join(line.rstrip() for line in text.splitlines()))


def command() -> str:
    """How to call this command from here: `ddk` if it is on the PATH, otherwise e.g. `.venv/bin/ddk`."""
    called = sys.argv[0]
    if os.path.basename(called) != "ddk" or shutil.which("ddk") is not None:
        return "ddk"
    return os.path.relpath(called)


def say(line: str) -> None:
    typer.echo(line)


def set_up(debug: bool) -> None:
    """Turn off outside calls, silence libraries and log to stderr; call this before any heavy import."""
    loopback_past_proxies()
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "ddk")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "3")  # a quarter of a minute: see tasks.running.server_loss
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not debug:
        logging.raiseExceptions = False  # what cannot be logged to a server is no news on the terminal
        os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
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
