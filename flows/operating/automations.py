"""Automations on the Prefect server that the deployments need or may have: `ddk automations`.

    ddk: runs that died
        A run whose heartbeats stop becomes Crashed. Without it, one that was killed together with its worker stays
        Running for ever.
    ddk: notify of failed runs, ddk: notify of news
        A notification block of Prefect's (Slack, e-mail, any webhook) is told of runs that fail or crash, and of
        `ddk.run.finished` and `ddk.domain.overtrained`, with the largest gap and the report's address.
    ddk: rebalance after each checkpoint (<deployment>)
        `ddk.checkpoint.written` starts a run of a deployment of `rebalance`.

They are identified by name and tag: a second call changes nothing, a call with other options changes what differs, and
`prefect deploy --all` does not touch them. They are switched on and off only in the server's UI.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.filters import AutomationFilter, AutomationFilterTags
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from ddk.errors import UserError
from storage.files.uri import join

SLOWEST_HEARTBEAT = 180
"""Seconds: Prefect's own; the deployments of prefect.yaml send one every 30."""
SILENCE = 3 * SLOWEST_HEARTBEAT
"""Seconds without a heartbeat after which a run counts as dead. Three of the slowest, so that neither one that is lost
nor a process that computes without a pause, or a server that starts anew, makes a healthy run look dead."""
FLOWS = (
    *("pack-corpus", "cache-teacher", "select-blocks", "train-student", "rebalance", "distill", "report"),
    *("import-targets", "replay-targets", "compare", "compare-runs", "evaluate", "clean"),
)
"""Names of all flows of this project: those of others on the same server are not touched."""

_TAG = "ddk"
_PREFIX = "ddk: "
DEAD_RUNS = f"{_PREFIX}runs that died"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What became of one automation."""

    name: str
    what: Literal["created", "updated", "unchanged", "removed"]
    enabled: bool = True


def dead_runs(silence: timedelta) -> AutomationCore:
    """Marks a run of ours as Crashed when nothing has been heard of it for so long after a heartbeat.

    Any event of the run ends the waiting, so that one that has ended, is paused or is to be retried is left alone.
    The change is not forced: Prefect refuses it for a run that has ended.
    """
    return AutomationCore(
        name=DEAD_RUNS,
        description="Made by `ddk automations`. Flow runs of ddk whose heartbeats have stopped become Crashed.",
        tags=[_TAG],
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=(
                    f"No heartbeat for {silence.total_seconds():.0f} s: its process is gone. Run it again; it resumes "
                    f"where it stopped."
                ),
            )
        ],
    )


def rebalance_after_checkpoint(client: SyncPrefectClient, deployment: str) -> AutomationCore:
    """Runs a deployment of `rebalance` for each checkpoint of a run in its root that leaves the measuring to others.

    Args:
        deployment: as Prefect names it: 'rebalance/rebalance'.

    Raises:
        UserError: there is none of that name.
    """
    try:
        found = client.read_deployment_by_name(deployment)
    except (ObjectNotFound, ValueError):
        raise UserError(
            f"there is no deployment '{deployment}' on the server; `prefect deploy --all` makes rebalance/rebalance, "
            "and --deployment names another one"
        ) from None
    root = found.parameters.get("root")
    if not isinstance(root, str):
        raise UserError(f"the deployment '{deployment}' has no parameter `root`; name one of the flow `rebalance`")
    return AutomationCore(
        name=f"{_PREFIX}rebalance after each checkpoint ({deployment})",
        description=f"Made by `ddk automations`. Checkpoints in {root} with `mixture.evaluation: scheduled`.",
        tags=[_TAG],
        trigger=EventTrigger(
            expect={"ddk.checkpoint.written"},
            match=ResourceSpecification(
                # A pattern: what is special in one stands for itself.
                {"ddk.run.url": join(glob.escape(root), "runs", "*"), "ddk.run.evaluation": "scheduled"}
            ),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=found.id,
                parameters={"run": "{{ event.payload.run }}"},
                job_variables=None,
            )
        ],
    )


def notifications(client: SyncPrefectClient, block: str) -> list[AutomationCore]:
    """Sends to a notification block what an operator wants to hear of.

    Args:
        block: as Prefect names it: 'slack-webhook/team'.

    Raises:
        UserError: there is none of that name.
    """
    kind, _, name = block.partition("/")
    try:
        found = client.read_block_document_by_name(name, kind, include_secrets=False)
    except (ObjectNotFound, ValueError):
        raise UserError(
            f"there is no notification block '{block}' on the server; create one under Blocks in its UI, and name it "
            f"by type and name, such as slack-webhook/team"
        ) from None
    ours = ResourceSpecification({"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)})
    failed = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
        match_related=ours,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    news = EventTrigger(
        expect={"ddk.run.finished", "ddk.domain.overtrained"},
        match=ResourceSpecification({"prefect.resource.id": "ddk.run.*"}),
        posture=Posture.Reactive,
        threshold=1,
    )
    texts = (
        (
            "failed runs",
            failed,
            "ddk: {{ flow_run.name }} {{ flow_run.state.name }}",
            "{{ flow_run.name }} is {{ flow_run.state.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
        ),
        ("news", news, "ddk: {{ event.payload.run }}", "{{ event.payload.message }}"),
    )
    return [
        AutomationCore(
            name=f"{_PREFIX}notify of {what}",
            description=f"Made by `ddk automations`. Tells the block {block}.",
            tags=[_TAG],
            trigger=trigger,
            actions=[SendNotification(block_document_id=found.id, subject=subject, body=body)],
        )
        for what, trigger, subject, body in texts
    ]


def set_up(silence: float = SILENCE, rebalance: str | None = None, notify: str | None = None) -> list[Done]:
    """Create or bring up to date what is asked for; others are left as they are.

    Args:
        silence: seconds without a heartbeat after which a run counts as dead.
        rebalance: name of the deployment to run for each checkpoint; None: no such automation is made.
        notify: notification block that is told of failures and news; None: no such automation is made.

    Raises:
        UserError: no server is named, it does not answer, or it has no such deployment.
    """
    with _server() as client:
        wanted = [dead_runs(timedelta(seconds=silence))]
        if rebalance is not None:
            wanted.append(rebalance_after_checkpoint(client, rebalance))
        if notify is not None:
            wanted += notifications(client, notify)
        return [_ensure(client, one) for one in wanted]


def remove() -> list[Done]:
    """Remove those that `set_up` has made, and no other.

    Raises:
        UserError: no server is named, or it does not answer.
    """
    with _server() as client:
        ours = _ours(client)
        for one in ours:
            client.delete_automation(one.id)
        return [Done(name=one.name, what="removed") for one in ours]


def _ensure(client: SyncPrefectClient, wanted: AutomationCore) -> Done:
    same_name = [one for one in _ours(client) if one.name == wanted.name]
    if not same_name:
        client.create_automation(wanted)
        return Done(name=wanted.name, what="created")
    found, *others = same_name
    for other in others:  # of two calls at once
        client.delete_automation(other.id)
    if _content(found) == _content(wanted):
        return Done(name=wanted.name, what="unchanged", enabled=found.enabled)
    client.update_automation(found.id, wanted.model_copy(update={"enabled": found.enabled}))
    return Done(name=wanted.name, what="updated", enabled=found.enabled)


def _ours(client: SyncPrefectClient) -> Sequence[Automation]:
    tagged = client.read_automations(automations=AutomationFilter(tags=AutomationFilterTags(all_=[_TAG])))
    return sorted((one for one in tagged if one.name.startswith(_PREFIX)), key=lambda one: (one.name, str(one.id)))


def _content(automation: AutomationCore) -> Any:
    """What makes two automations the same, in a form that can be compared."""
    return _ordered(automation.model_dump(mode="json", include={"description", "tags", "trigger", "actions"}))


def _ordered(value: Any) -> Any:
    """Lists that were sets come in any order."""
    if isinstance(value, dict):
        return {key: _ordered(one) for key, one in value.items()}
    if isinstance(value, list):
        return sorted((_ordered(one) for one in value), key=repr)
    return value


@contextlib.contextmanager
def _server() -> Iterator[SyncPrefectClient]:
    """A client of the configured server; never one that Prefect would start for the moment."""
    url = PREFECT_API_URL.value()
    if not url:
        raise UserError(
            "automations are stored on a Prefect server, and PREFECT_API_URL names none; start one (`prefect server "
            "start`) and set "
            "PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.TransportError as error:
        raise UserError(
            f"the Prefect server at {url} does not answer ({error}); start it, or correct PREFECT_API_URL"
        ) from error
    except PrefectHTTPStatusError as error:
        raise UserError(
            f"the Prefect server at {url} answered {error.response.status_code} to {error.request.url}; check "
            "PREFECT_API_URL (it ends with /api) and PREFECT_API_KEY"
        ) from error
