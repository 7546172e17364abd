"""Artifacts: what Prefect's UI shows of a run besides its logs.

    Board("ddk-root-small-report", "markdown").show(page, "step 6: …")  replaces what hung there
    add_version("ddk-root-small-gap", "table", rows, "step 6: …")  one more; the UI keeps them all

A flow run's page lists only the artifacts of that flow run, so a board is also added to every parent flow run: the page
of `distill` shows the artifacts of its `train-student`.

Artifacts never stop the work. Outside of a run, nothing is shown. The server is called once, for a few seconds at most,
and a refusal only causes a warning. A board may therefore miss an update, and the stored data never depend on one.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.context import FlowRunContext, SettingsContext, TaskRunContext, get_settings_context
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, Profile, Settings
from pydantic import SecretStr

logger = logging.getLogger("ddk")
SECONDS_TO_WAIT = 5.0
"""For one answer of the server."""

Kind = Literal["markdown", "progress", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an artifact hangs."""

    flow_run_id: UUID | None
    task_run_id: UUID | None = None


def current_place() -> Place | None:
    """The task run, or else the flow run, that is being executed; None outside of both."""
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    if task is not None:
        return Place(flow_run_id=task.task_run.flow_run_id, task_run_id=task.task_run.id)
    return Place(flow_run_id=flow.flow_run.id) if flow is not None and flow.flow_run is not None else None


_refused: set[str] = set()


@contextmanager
def showing(what: str) -> Iterator[None]:
    """Any error in this context becomes a warning; if a server refuses every connection, there is one warning for
    each artifact."""
    try:
        yield
        _refused.discard(what)
    except Exception as error:
        if isinstance(error, httpx.ConnectError):
            if what in _refused:
                return
            _refused.add(what)
        logger.warning("%s is not shown in Prefect's UI: %s", what, str(error) or type(error).__name__)


_Server = tuple[str | None, SecretStr | None]
"""Its URL, or None where Prefect has started one for this process; and the key to it."""
_CLIENTS: dict[_Server, tuple[SyncPrefectClient, Profile, Settings]] = {}
"""To prepare one takes as long as ten requests, so that a process keeps it."""
_PREPARING = threading.Lock()


def _ask(request: Callable[[SyncPrefectClient], object], what: str) -> bool:
    """Ask Prefect's API once and not for long. Whether the request went through; what went wrong is a warning."""
    with showing(what):
        api = get_settings_context().settings.api
        server = api.url, api.key
        client, profile, settings = _prepared(server)
        try:
            with SettingsContext(profile=profile, settings=settings):
                request(client)
        except httpx.ConnectError:
            _forget(server)  # the next may be elsewhere, where Prefect starts it
            raise
        return True
    return False


def _prepared(server: _Server) -> tuple[SyncPrefectClient, Profile, Settings]:
    with _PREPARING:
        if server not in _CLIENTS:
            client = get_client(sync_client=True, httpx_settings={"timeout": SECONDS_TO_WAIT})
            current = get_settings_context()
            once = current.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})
            _CLIENTS[server] = client.__enter__(), current.profile, once
        return _CLIENTS[server]


def _forget(server: _Server) -> None:
    with _PREPARING:
        if (kept := _CLIENTS.pop(server, None)) is not None:
            kept[0].__exit__(None, None, None)


@atexit.register
def _forget_all() -> None:
    for server in list(_CLIENTS):
        _forget(server)


_KNOWN: dict[tuple[str, Place], dict[Place, UUID]] = {}
"""Where this process has hung what, by key and own place. The next task's board need not look for it: a lookup takes
several requests, an update one for each flow run."""


class Board:
    """One artifact that is replaced as things go on, in each of the flow runs that it concerns.

    Args:
        key: as `artifact_key` makes it; the title in the UI.
        of_task: it belongs to the task run, and there is one for each that asks. Else it belongs to the flow run, and
            the next task run that asks for the key goes on with it.
    """

    def __init__(self, key: str, kind: Kind, *, of_task: bool = False) -> None:
        self._key, self._kind = key, kind
        here = current_place()
        if here is not None and here.flow_run_id is not None and not of_task:
            here = Place(flow_run_id=here.flow_run_id)
        self._here = here
        self._hanging: dict[Place, Artifact | None] = {}

    @property
    def known(self) -> bool:
        """Whether this process has hung it already, in this board or an earlier one of the key."""
        return self._here is not None and (self._key, self._here) in _KNOWN

    def show(self, data: Any, description: str) -> bool:
        """Replace what hangs there. Returns whether it is to be seen now."""
        here = self._here
        if here is None:
            return False
        known = _KNOWN.get((self._key, here), {})

        def request(client: SyncPrefectClient) -> None:
            for artifact_id in known.values():
                client.update_artifact(artifact_id, ArtifactUpdate(data=data, description=description))

        # What somebody has taken down is looked for the next time.
        return self._ask(request, here) if known else self.change(lambda _: data, description)

    def change(self, change: Callable[[Any], Any], description: str) -> bool:
        """Replace the present content by `change(content)`; by `change(None)` if there is none."""
        here = self._here
        if here is None:
            return False

        def request(client: SyncPrefectClient) -> None:
            if not self._hanging:
                self._hanging = {place: self._found(client, place) for place in self._places(client, here)}
            known = {}
            for place, hanging in self._hanging.items():
                data = change(hanging.data if hanging is not None else None)
                if hanging is None:
                    self._hanging[place] = new = _create(client, self._key, self._kind, data, description, place)
                    known[place] = new.id
                else:
                    client.update_artifact(hanging.id, ArtifactUpdate(data=data, description=description))
                    hanging.data = data
                    known[place] = hanging.id
            _KNOWN[self._key, here] = known

        return self._ask(request, here)

    def _ask(self, request: Callable[[SyncPrefectClient], None], here: Place) -> bool:
        shown = _ask(request, f"'{self._key}'")
        if not shown:
            self._hanging = {}
            _KNOWN.pop((self._key, here), None)
        return shown

    def _places(self, client: SyncPrefectClient, here: Place) -> Iterator[Place]:
        yield here
        flow_run_id = here.flow_run_id
        with suppress(ObjectNotFound):  # a flow run that somebody has deleted
            while flow_run_id is not None:
                caller = client.read_flow_run(flow_run_id).parent_task_run_id
                flow_run_id = client.read_task_run(caller).flow_run_id if caller is not None else None
                if flow_run_id is not None:
                    yield Place(flow_run_id=flow_run_id)

    def _found(self, client: SyncPrefectClient, place: Place) -> Artifact | None:
        if place.flow_run_id is None:
            return None
        wanted = ArtifactFilter(
            key=ArtifactFilterKey(any_=[self._key]), flow_run_id=ArtifactFilterFlowRunId(any_=[place.flow_run_id])
        )
        found = client.read_artifacts(artifact_filter=wanted)
        return next((artifact for artifact in found if artifact.task_run_id == place.task_run_id), None)


def add_version(key: str, kind: Kind, data: Any, description: str) -> bool:
    """Add an artifact to the task run, beside those that the key has already. Returns whether it is to be seen."""
    here = current_place()
    if here is None:
        return False
    return _ask(lambda client: _create(client, key, kind, data, description, here), f"'{key}'")


def _create(client: SyncPrefectClient, key: str, kind: Kind, data: Any, description: str, place: Place) -> Artifact:
    return client.create_artifact(
        ArtifactCreate(
            key=key,
            type=kind,
            data=data,
            description=description,
            flow_run_id=place.flow_run_id,
            task_run_id=place.task_run_id,
        )
    )


def artifact_key(*words: str) -> str:
    """`('My run_2', 'gap')` → `'ddk-my-run-2-gap'`: Prefect takes only lowercase letters, digits and dashes."""
    return "-".join(["ddk", *(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") or "run" for word in words)])


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table artifact holds them. Prefect's UI shows each text as Markdown."""
    return json.dumps(list(rows))
