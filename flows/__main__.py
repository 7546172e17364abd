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

Exit codes: 0 done, 1 something failed, 2 something to put right in the call, the configuration or the data (one
line says what; `--debug` shows the traceback).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

import flows.commands  # noqa: F401 (they register themselves)
from flows.commands.app import FlowInterruptedError, app

_LONGEST = 1000
"""Characters that are shown of what nobody foresaw."""


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
        typer.secho("ddk: interrupted; the same command goes on where it stopped", err=True)
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
            "ddk: this looks like a bug in ddk; --debug shows the traceback. What was complete is kept, and the same "
            "command goes on from there.",
            err=True,
        )
        return 1
    return 0


def _refusal(error: Exception) -> int:
    typer.secho(f"ddk: {error}", fg=typer.colors.RED, err=True)
    return 2


if __name__ == "__main__":
    main()
