"""What deploying does to schedules: `prefect deploy` replaces those of a deployment by the ones in prefect.yaml."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from flows.operating.automations import FLOWS


@functools.cache
def warn_of_schedules() -> None:
    """Print the schedules of our deployments that were made or turned on by hand, with what brings each back.

    Once in a process, although Prefect runs the build steps for each deployment. Nothing is said where no server is
    named or it does not answer: the deploying itself says that.
    """
    if not PREFECT_API_URL.value():
        return
    try:
        said = list(_by_hand())
    except (httpx.TransportError, PrefectHTTPStatusError):
        return
    if said:
        print("Deploying replaces the schedules of a deployment by those of prefect.yaml. On the server now are:")
        for line in said:
            print(f"  {line}")


def _by_hand() -> Iterator[str]:
    with get_client(sync_client=True) as client:
        found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))))
        for deployment in sorted(found, key=lambda one: one.name):
            name = f"{client.read_flow(deployment.flow_id).name}/{deployment.name}"
            for schedule in deployment.schedules:
                if schedule.slug is None:
                    yield f"{name}: made by hand; to have it again: prefect deployment schedule create {name} " + (
                        _options(schedule) + ("" if schedule.active else "   (it was off)")
                    )
                elif schedule.active:
                    yield f"{name}: '{schedule.slug}' is on; to keep it so, set `active: true` for it in prefect.yaml"


def _options(schedule: DeploymentSchedule) -> str:
    """Of Prefect's own command."""
    when = schedule.schedule
    if isinstance(when, CronSchedule):
        option = f"--cron '{when.cron}'"
    elif isinstance(when, IntervalSchedule):
        option = f"--interval {when.interval.total_seconds():g} --anchor-date '{when.anchor_date.isoformat()}'"
    else:
        option = f"--rrule '{getattr(when, 'rrule', '')}'"
    timezone = getattr(when, "timezone", None)
    return f"{option} --timezone {timezone}" if timezone else option
