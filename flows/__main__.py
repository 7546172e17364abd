"""The `ddk` command.

    ddk quickstart              a small run on this machine, without a GPU, a network or a configuration
    ddk new FILE                write a commented configuration of one's own, also from a preset
    ddk distill CONFIG          run all stages: pack, cache, select, train, report
    ddk pack|cache|select|train|gap|report CONFIG      run one stage
    ddk eval CONFIG             benchmark the student before and after distillation, and the teacher
    ddk compare CONFIG          run several methods and seeds on one teacher cache, and compare them
    ddk law CONFIG              fit a scaling law to runs; `ddk law mixture|tokens|size CONFIG` answer from it
    ddk plan CONFIG             show which stages are complete, stale or missing, and why; runs nothing
    ddk plan CONFIG --cost      estimate disk, GPU memory and GPU hours; needs no data and no weights
    ddk serve CONFIG            serve every stage as a deployment from this process, for development
    ddk clean ROOT              list and remove what no run or configuration needs any more
    ddk automations             let the Prefect server mark runs that died as Crashed
    ddk join CONFIG             join a training from a further machine
    ddk import CONFIG           make stores from caches that others made, without an engine
    ddk export URL DEST         write a store as Parquet files
    ddk runs ROOT               list every run: state, date, steps, gap, speed, bytes, ancestry
    ddk push RUN REPO           put a finished run's student on the Hugging Face hub
    ddk inspect URL             show what a store or a run holds
    ddk verify URL              check every byte of a store, a run or a whole root

Exit codes: 0 success; 1 something failed; 2 the user must fix something in the call, the configuration, the data or the
machine (one line says what; `--debug` shows the traceback).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

import flows.commands  # noqa: F401 (they register themselves)
from flows.commands.app import FlowInterruptedError, app

_LONGEST = 1000
"""Characters shown of an unexpected error."""


def main() -> None:
    """Entry point of the console script."""
    debug = "--debug" in sys.argv
    # The option is global and is wanted most after something has failed: accept it anywhere.
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(_exit_code(lambda: app(["--debug", *arguments] if debug else arguments, standalone_mode=True), debug))


def _exit_code(call: Callable[[], Any], debug: bool) -> int:
    try:
        call()
    except FlowInterruptedError:
        typer.secho("ddk: interrupted; run the same command to resume", err=True)
        return 1
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # what a library of Rust panics with is no Exception
        from ddk.errors import LostPartError
        from ddk.redaction import redacted
        from tasks.running.plain_errors import user_error

        if debug:
            raise
        if isinstance(error, LostPartError):
            typer.secho(f"ddk: {error}", fg=typer.colors.RED, err=True)
            return 1
        if (known := user_error(error)) is not None:
            return _refusal(known)
        said = redacted(" ".join(str(error).split()))
        typer.secho(f"ddk: {type(error).__name__}: {said[:_LONGEST]}", fg=typer.colors.RED, err=True)
        typer.secho(
            "ddk: this looks like a bug in ddk; --debug shows the traceback. Complete work is kept, and the same "
            "command resumes from there.",
            err=True,
        )
        return 1
    return 0


def _refusal(error: Exception) -> int:
    typer.secho(f"ddk: {error}", fg=typer.colors.RED, err=True)
    return 2


if __name__ == "__main__":
    main()
