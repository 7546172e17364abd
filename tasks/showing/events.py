"""Events on Prefect's bus, for automations: `ddk.checkpoint.written`, `ddk.mixture.updated`, `ddk.domain.overtrained`,
`ddk.run.finished`.

Their resource is the run: `ddk.run.<name>`, with its URL and who measures its gap as labels, which a trigger can match.
The payload is small and plain: the run's name, its URL, and a step or version; of a domain that was seen too often its
name, the alarm's kind, step and sentence (`ddk.overtraining`). What people are to be told has a `message`. An
automation may start `rebalance` on the first (`flows.operating.automations`); nothing here waits for any.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefect.events import emit_event

from storage.runs.folder import RunFolder


def say_event(name: str, run: RunFolder, evaluation: str, payload: Mapping[str, int | str]) -> None:
    """Emit `ddk.<name>`; to be called within a flow or task run, to which Prefect then relates it.

    Args:
        evaluation: the run's `mixture.evaluation`.
    """
    emit_event(
        event=f"ddk.{name}",
        resource={
            "prefect.resource.id": f"ddk.run.{run.name}",
            "prefect.resource.name": run.name,
            "ddk.run.url": run.url,
            "ddk.run.evaluation": evaluation,
        },
        payload={"run": run.name, "url": run.url, **payload},
    )
