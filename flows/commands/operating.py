"""Commands of those who operate the pipeline: serving it, Prefect's automations, further machines."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.commands.app import ConfigPath, Overrides, Root, Run, app, load, reach_prefect, say, use_block


@app.command(short_help="Serve every stage as a deployment, for development.")
def serve(config: ConfigPath, overrides: Overrides = None, root: Root = None, run: Run = None) -> None:
    """Serve every stage as a deployment from this process, for development; Ctrl-C ends it.

    No work pool and no worker is needed. Start runs in Prefect's UI, or with `prefect deployment run distill/dev`.
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
    from flows.operating import automations as made

    done = made.remove() if remove else made.set_up(silence, deployment if rebalance else None)
    for one in done:
        say(f"{one.what:<10} {one.name}{'' if one.enabled else '   (switched off on the server)'}")
    if not done:
        say("there were none")


@app.command(short_help="Take part in a training from a further machine.")
def join(
    config: ConfigPath,
    node_rank: Annotated[int, typer.Option("--node-rank", min=1, help="Which of the further machines this is.")],
    overrides: Overrides = None,
    root: Root = None,
    run: Run = None,
) -> None:
    """On every machine but the first, where train.nodes is above 1: help with the training that `ddk train` leads."""
    from flows.stages import open_session
    from tasks.training.processes import join_training

    loaded = load(config, overrides, root, run)
    use_block(loaded.storage_block)
    join_training(open_session(loaded).inputs.job, node_rank)
