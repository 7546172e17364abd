"""One capture by several runs: each is a separate deployment run, on any free worker, with its own retries.

The run that is started first is part 1 and starts the others. All parts share the shards of every store
(`tasks.running.sharing`), so none depends on how many others there are, when they begin or whether they die. Part 1
returns when everything is captured, and can do all the work alone. Parts that no worker has started by then are
cancelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling

from storage.stores.manifest import read_manifest
from tasks.planning.store_plan import Plan
from tasks.showing.progress import logger
from tasks.teachers.config import TeacherConfig


def capture_run_name() -> str:
    """`cache`, and of several parts `cache 2/3`."""
    given = runtime.flow_run.parameters
    teacher = given["teacher"]
    workers = teacher.get("workers", 1) if isinstance(teacher, Mapping) else teacher.workers
    return f"cache {given.get('part', 1)}/{workers}" if workers > 1 else "cache"


@contextmanager
def other_parts(plan: Plan, teacher: TeacherConfig, part: int, parameters: Mapping[str, Any]) -> Iterator[None]:
    """While the context lasts, parts 2 to `teacher.workers` run, if this is part 1 and anything must be captured.

    Args:
        parameters: of the deployment's runs, besides `part`.
    """
    parts = _start(teacher, parameters) if part == 1 and teacher.workers > 1 and _anything_missing(plan) else []
    try:
        yield
    finally:
        if parts:
            _call_off(parts)


def _anything_missing(plan: Plan) -> bool:
    manifests = (read_manifest(store.targets_url) for store in plan.domains.values() if not store.corpus.imported)
    return any(manifest is None or not manifest.complete for manifest in manifests)


def _start(teacher: TeacherConfig, parameters: Mapping[str, Any]) -> list[UUID]:
    # A run that is retried starts its parts again; one that asks twice gets the same.
    key, others = f"{runtime.flow_run.id}-{runtime.flow_run.run_count}", range(2, teacher.workers + 1)
    try:
        return [_start_one(teacher.deployment, {**parameters, "part": n}, f"{key}-{n}") for n in others]
    except ObjectNotFound:
        logger.warning(
            "teacher.workers is %d, and Prefect's server has no deployment '%s' to start the others with "
            "(teacher.deployment); this run captures without them (`ddk cache` on other machines can still share the "
            "work)",
            teacher.workers,
            teacher.deployment,
        )
        return []


def _start_one(deployment: str, parameters: dict[str, Any], key: str) -> UUID:
    return cast("FlowRun", run_deployment(deployment, parameters=parameters, timeout=0, idempotency_key=key)).id


def _call_off(parts: list[UUID]) -> None:
    """Those that have not begun; and where this run is being cancelled, all."""
    with get_client(sync_client=True) as client:
        all_of_them = _is_cancelled(client)
        for part in parts:
            state = client.read_flow_run(part).state
            if state is None or state.is_final():
                continue
            if state.is_running() and all_of_them:
                client.set_flow_run_state(part, Cancelling(message="Part 1 was cancelled."), force=True)
            elif not state.is_running():
                client.set_flow_run_state(part, Cancelled(message="Everything is captured."), force=True)


def _is_cancelled(client: SyncPrefectClient) -> bool:
    state = client.read_flow_run(UUID(str(runtime.flow_run.id))).state
    return state is not None and (state.is_cancelling() or state.is_cancelled())
