"""All deployments from one process, without work pools and workers: for development."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from typing import Any

import psutil
from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.config import Config
from flows.deployments import DEPLOYABLE, parameters_for

NAME = "dev"
"""Of the deployments: `distill/dev` stands beside the `distill/distill` of prefect.yaml, and never replaces it."""


class _Runner(Runner):
    """Ends with all that its runs have started, and at SIGTERM as it does at Ctrl-C."""

    def handle_sigterm(self, *_args: Any, **_kwargs: Any) -> None:
        # Prefect's own handler leaves the process without closing anything.
        signal.raise_signal(signal.SIGINT)

    async def __aexit__(self, *exc_info: Any) -> None:
        # Prefect kills the runs' processes, but not vLLM's engine or torchrun's workers below them.
        processes = _processes_of_runs()
        try:
            await super().__aexit__(*exc_info)
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def _processes_of_runs() -> list[psutil.Process]:
    """Those of the flow runs, and all below; not those of a server that Prefect has started for us."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "prefect.engine" in child.cmdline():
                found += [child, *child.children(recursive=True)]
    return found


def serve(config: Config, say: Callable[[str], None]) -> None:
    """Serve every stage with the configuration's sections as its parameters, until Ctrl-C or SIGTERM.

    Each run is a process of its own, and ends when this one ends. Nothing is scheduled.

    Args:
        say: prints one line, once the deployments are there.
    """
    sections = config.model_dump(mode="json")
    runner = _Runner()
    for flow in DEPLOYABLE.values():
        deployment = RunnerDeployment.from_flow(
            flow,
            NAME,
            parameters=parameters_for(flow, sections),
            tags=["ddk", NAME],
            description=flow.description,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        runner.add_deployment(deployment)
    say("serving " + ", ".join(f"{name}/{NAME}" for name in DEPLOYABLE))
    say(f"start a run in Prefect's UI, or with `prefect deployment run distill/{NAME}`; Ctrl-C ends this process")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(runner.start())
