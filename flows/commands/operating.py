"""Commands to operate the pipeline: serve it, clean up, set up Prefect's automations, join from further machines."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from flows.commands.app import (
    ConfigPath,
    Overrides,
    Root,
    Run,
    app,
    load,
    reach_prefect,
    say,
    use_block,
)


@app.command(short_help="Serve every stage as a deployment, for development.")
def serve(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Serve every stage as a deployment from this process, for development; Ctrl-C ends it.

    Work pools and workers are not needed. Start runs in Prefect's UI, or with `prefect deployment run distill/dev`.
    """
    loaded = load(config, overrides, root, run)
    from flows.operating import serve as serving

    reach_prefect()
    serving.serve(loaded, say)


@app.command(short_help="Remove what of a root nothing needs any more.")
def clean(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="Folder or URL that holds the stores and runs.")],
    older: Annotated[
        str, typer.Option("--older", metavar="AGE", help="Remove only what is older: 12h, 30d, 4w; 1h at least.")
    ] = "7d",
    keep_runs: Annotated[
        list[str] | None,
        typer.Option("--keep-runs", metavar="PATTERN", help="Keep these runs with all checkpoints; may be repeated."),
    ] = None,
    remove_runs: Annotated[
        list[str] | None,
        typer.Option("--remove-runs", metavar="PATTERN", help="Remove these runs, if nothing else needs them."),
    ] = None,
    configs: Annotated[
        list[str] | None,
        typer.Option("--config", metavar="CONFIG", help="Keep what this file's run needs; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List only; remove nothing, and do not ask.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
) -> None:
    """List, and then remove, what no run, comparison, law, selection or given configuration needs.

    Stores that nothing reads, superseded generations, all but the last checkpoint of finished runs, expired claims, and
    what interrupted writes have left. Runs stay, unless --remove-runs names them. A capture that no run has been
    trained on yet is needed by nobody: name its file with --config. In a terminal the command asks before it removes
    anything; elsewhere it needs --yes.
    """
    from flows import unneeded as cleaning
    from tasks.showing.formats import size

    loaded = [load(path, None, root, None) for path in configs or ()]
    for block in {config.storage_block for config in loaded}:
        use_block(block)
    listed = cleaning.list_unneeded(
        loaded[0].root if loaded else root,
        loaded,
        older=older,
        keep_runs=keep_runs or (),
        remove_runs=remove_runs or (),
        say=say,
    )
    for line in cleaning.lines_of(listed):
        say(line)
    if not listed.parts.removable:
        say("nothing to remove")
        return
    if not dry_run and not yes and sys.stdin.isatty():
        yes = typer.confirm(f"Remove {cleaning.total(listed)}?")
    if dry_run or not yes:
        say(f"would free {cleaning.total(listed)}; nothing was removed{'' if dry_run else ' (--yes removes it)'}")
        return
    freed = cleaning.remove_listed(listed, say)
    say(f"freed {size(freed)}")


@app.command(short_help="Mark runs whose process has died as Crashed, on the Prefect server.")
def automations(
    silence: Annotated[
        int,
        typer.Option(
            "--within", min=90, metavar="SECONDS", help="Time without a heartbeat after which a run counts as dead."
        ),
    ] = 540,
    rebalance: Annotated[
        bool, typer.Option("--rebalance-on-checkpoint", help="Also measure the gap after each checkpoint.")
    ] = False,
    deployment: Annotated[
        str, typer.Option("--deployment", help="With --rebalance-on-checkpoint: deployment that measures the gap.")
    ] = "rebalance/rebalance",
    notify: Annotated[
        str | None,
        typer.Option(
            "--notify",
            metavar="TYPE/NAME",
            help="Also tell this notification block of failed, crashed and finished runs, and of alarms.",
        ),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the automations that this command has created.")
    ] = False,
) -> None:
    """Create an automation on the Prefect server that marks runs as Crashed when their heartbeats stop.

    A second call changes nothing. The default of --within is three times Prefect's heartbeat interval of 180 s. Runs of
    the deployments in prefect.yaml send a heartbeat every 30 s; if there are no other runs, --within 90 is enough.
    """
    from flows.operating import automations as made

    done = made.remove() if remove else made.set_up(silence, deployment if rebalance else None, notify)
    for one in done:
        say(f"{one.what:<10} {one.name}{'' if one.enabled else '   (switched off on the server)'}")
    if not done:
        say("there were none")


@app.command(short_help="Join a training from a further machine.")
def join(
    config: ConfigPath,
    node_rank: Annotated[
        int, typer.Option("--node-rank", min=1, help="Number of this machine, from 1; the first machine is 0.")
    ],
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
) -> None:
    """Join the training that `ddk train` leads on the first machine; run this on every other one if train.nodes > 1."""
    from flows.stages import open_session
    from tasks.training.processes import join_training

    loaded = load(config, overrides, root, run)
    use_block(loaded.storage_block)
    join_training(open_session(loaded).inputs.job, node_rank)
