"""Commands to operate the pipeline: serve it, set up Prefect's automations, join from further machines."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.app import ConfigPath, Overrides, Root, Run, app, load, reach_prefect, say, use_block


@app.command(short_help="Serve every stage as a deployment, for development.")
def serve(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Serve every stage as a deployment from this process, for development; Ctrl-C ends it.

    Work pools and workers are not needed. Start runs in Prefect's UI, or with `prefect deployment run distill/dev`.
    """
    loaded = load(config, overrides, root, run)
    from flows.operating import serve as serving

    reach_prefect()
    serving.serve(loaded, say)


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
