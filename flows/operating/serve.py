"""All deployments from one process, without work pools and workers: for development."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType

from flows.config import Config
from flows.operating.deployments import DEPLOYABLE, parameters, parameters_for

NAME = "dev"
"""Of the deployments: `distill/dev` stands beside the `distill/distill` of prefect.yaml, and never replaces it."""


class _Runner(Runner):
    """Ends at SIGTERM as it does at Ctrl-C: kills its runs' processes, and with each ends what it has started."""

    async def serve(self) -> None:
        self._serving = asyncio.current_task()
        await self.start()

    def handle_sigterm(self, *_args: Any, **_kwargs: Any) -> None:
        # Prefect's own handler leaves the process without closing anything. Not by SIGINT, which a shell that starts us
        # in the background has us ignore.
        if self._serving is not None:
            self._serving.get_loop().call_soon_threadsafe(self._serving.cancel)

    _serving: asyncio.Task[None] | None = None


def serve(config: Config, say: Callable[[str], None]) -> None:
    """Serve every stage with the configuration's sections as its parameters, until Ctrl-C or SIGTERM.

    Each run is a process of its own, and ends when this one ends. Nothing is scheduled.

    Args:
        say: prints one line, once the deployments are there.
    """
    sections = parameters(config)
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
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(runner.serve())
