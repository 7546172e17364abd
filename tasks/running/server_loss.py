"""Lets a command finish its work if its Prefect server dies while it runs.

A flow needs the server only when it begins and when it ends. If the server is lost in between, the flow does its work,
and fails only when it reports its end. Since every stage skips complete work, the command then runs once more with its
own server, which takes only seconds if the work was nearly finished.

A server that this process starts always ends with it, even if it is killed (`tasks.running.descendants`).
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from prefect.client.base import PrefectHttpxSyncClient
from prefect.events.worker import EventsWorker
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.handlers import APILogWorker
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    temporary_settings,
)

from ddk.errors import LostPartError
from tasks.running.descendants import Descendants
from tasks.showing.progress import logger

_TIMES = 3
"""That a server may be lost before this command gives up."""
_T = TypeVar("_T")


class _Watch:
    """Whether the server has answered, and then has not any more."""

    answered = False
    lost: str | None = None
    """URL of the one that does not answer."""
    losses = 0


def going_on_without_its_server(call: Callable[[], _T]) -> _T:
    """The result of the call: a flow that can be run again and resumes where it stopped.

    Raises:
        LostPartError: the Prefect servers that this process starts die repeatedly.
    """
    _watch_requests()
    _Watch.answered, _Watch.lost = False, None
    with _descendants().marked():
        found, done = _attempt(call)
        for _ in range(_TIMES):
            if done:
                return found  # type: ignore[return-value]
            logger.warning(
                "Prefect's server at %s is gone. What is complete is kept, and the rest is done without it; a run that "
                "was reported there stays 'Running' until somebody deletes it",
                _Watch.lost,
            )
            _Watch.answered, _Watch.lost = False, None
            with own_server():
                found, done = _attempt(call)
        if done:
            return found  # type: ignore[return-value]
    raise LostPartError(
        "Prefect's server ended repeatedly, and so did the one that was started for this command; check with `dmesg` "
        "whether the machine ran out of memory, then run the same command again to resume"
    )


def _attempt(call: Callable[[], _T]) -> tuple[_T | None, bool]:
    """What it gives, and whether it came to its end: not where its server was lost."""
    try:
        return call(), True
    except Exception:
        if _Watch.lost is None:
            raise
        return None, False


@contextmanager
def own_server() -> Iterator[None]:
    """In here flows report to a server that this process starts when the first of them asks for it."""
    SubprocessASGIServer().stop()  # the one that is lost, where it was our own
    with temporary_settings(updates={PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}, restore_defaults={PREFECT_API_URL}):
        yield


@functools.cache
def _descendants() -> Descendants:
    """Whatever is started as one of them ends when this process does, however it does."""
    descendants = Descendants()
    # Registered before the server's own end is, and so called after it.
    atexit.register(descendants.close)
    return descendants


@functools.cache
def _watch_requests() -> None:
    """From now on it is noted when a server is lost, and nobody asks it again: every request would wait a minute."""
    original = PrefectHttpxSyncClient.send

    @functools.wraps(original)
    def send(client: PrefectHttpxSyncClient, request: httpx.Request, *args: Any, **kwargs: Any) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.netloc.decode()}"
        if _Watch.lost == url:
            raise httpx.ConnectError(f"{url} is gone", request=request)
        try:
            response = original(client, request, *args, **kwargs)
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            # A request that is made once only (`tasks.showing.artifacts`) says nothing yet.
            if _Watch.answered and PREFECT_CLIENT_MAX_RETRIES.value() > 0 and _is_loss(error):
                _Watch.lost = url
                _Watch.losses += 1
            raise
        _Watch.answered = True
        return response

    PrefectHttpxSyncClient.send = send  # type: ignore[method-assign, assignment]
    _let_go_of_what_waits(EventsWorker, "_handle")
    _let_go_of_what_waits(APILogWorker, "_handle_batch")


def _let_go_of_what_waits(worker: type[Any], method: str) -> None:
    """Of events and lines of the log that wait for a lost server; each would be tried for seconds, hundreds of them."""
    original = getattr(worker, method)

    @functools.wraps(original)
    async def handle(self: Any, items: Any) -> None:
        if vars(self).setdefault("ddk_losses", _Watch.losses) == _Watch.losses:
            await original(self, items)

    setattr(worker, method, handle)


def _is_loss(error: httpx.TransportError | PrefectHTTPStatusError) -> bool:
    return not isinstance(error, PrefectHTTPStatusError) or error.response.status_code in (502, 503, 504)
