"""Limits how long a request to S3 may take, in every phase.

botocore's two time-outs cover the connection and the wait for the next bytes. Neither helps if a server accepts a
request and never sends `100 Continue`, stops reading in the middle of a body, or sends a byte now and then. This module
adds two more limits; both grow with the amount of data, at the slowest acceptable speed:

an attempt   the connection's time-out and that of reading together
a request    `DEADLINE_S` over all attempts and the waits between them, the reading of a body included
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import botocore.exceptions
from aiobotocore.httpsession import AIOHTTPSession

DEADLINE_S = 225.0
SLOWEST = 256 << 10
"""Bytes a second."""
_PUT_TOGETHER = "POST"
"""Requests that S3 may work on for long: they put an upload together, or delete a thousand objects."""
_began: ContextVar[float | None] = ContextVar("ddk_s3_began", default=None)


@contextlib.contextmanager
def one_request() -> Iterator[None]:
    """What is asked for in here, again and again where it breaks off, has one deadline, which begins now."""
    token = _began.set(time.monotonic())
    try:
        yield
    finally:
        _began.reset(token)


@contextlib.asynccontextmanager
async def answered(what: str, sent: int) -> AsyncIterator[None]:
    """The deadline of a request up to its answer.

    Args:
        what: for the message.
        sent: bytes of its body.

    Raises:
        botocore.exceptions.ReadTimeoutError: it has passed.
    """
    try:
        async with asyncio.timeout(_seconds_left(sent)):
            yield
    except TimeoutError as error:
        raise botocore.exceptions.ReadTimeoutError(endpoint_url=what, error=error) from error


def close_in_time(body: Any, size: int) -> None:
    """Have a body closed at the deadline; whoever reads it then is told that the connection broke."""
    # Weakly: most are read and gone long before.
    asyncio.get_running_loop().call_later(max(_seconds_left(size), 0.0), _close, weakref.ref(body))


def size_of(body: Any) -> int:
    """Bytes of a request's body, as far as it says."""
    if isinstance(body, str | bytes | bytearray | memoryview):
        return len(body)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.fstat(body.fileno()).st_size
    return 0


def _seconds_left(size: int) -> float:
    now = time.monotonic()
    return (_began.get() or now) + DEADLINE_S + size / SLOWEST - now


def _close(reference: weakref.ref[Any]) -> None:
    with contextlib.suppress(Exception):
        if (body := reference()) is not None:
            body.close()


class Session(AIOHTTPSession):  # type: ignore[misc, unused-ignore]
    """aiobotocore's HTTP session, with an end to every attempt."""

    async def send(self, request: Any) -> Any:
        parts = (self._timeout.sock_connect, self._timeout.sock_read)
        if None in parts or request.method == _PUT_TOGETHER:
            return await super().send(request)
        length = request.headers.get("Content-Length") or request.headers.get("X-Amz-Decoded-Content-Length") or 0
        try:
            async with asyncio.timeout(sum(parts) + int(length) / SLOWEST):
                return await super().send(request)
        except TimeoutError as error:
            raise botocore.exceptions.ReadTimeoutError(endpoint_url=request.url, error=error) from error
