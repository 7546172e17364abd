"""Decides after which failures a task is retried automatically: those of the storage that may be temporary.

The storage layer retries requests for seconds to minutes (`storage.files.s3`); this module bridges longer outages. A
wrong configuration, a damaged store or a broken engine fails at once, because a retry would not help.

    @task(..., **RETRIES)
"""

from __future__ import annotations

from typing import Any

from prefect import State, Task
from prefect.client.schemas.objects import TaskRun
from prefect.tasks import exponential_backoff

from storage.errors import is_transient
from tasks.showing.progress import logger


def passes(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether the error that a task run failed with may be gone by the next attempt; Prefect asks this."""
    try:
        state.result(raise_on_failure=True)
    except Exception as error:
        if transient := is_transient(error):
            logger.warning("%s: %s; retrying", run.name, " ".join(str(error).split()))
        return transient
    return False


RETRIES: dict[str, Any] = {
    "retries": 4,
    "retry_delay_seconds": exponential_backoff(backoff_factor=10),  # 10, 20, 40 and 80 s
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": passes,
}
