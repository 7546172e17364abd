"""A real HTTP server between s3fs and an S3 server: it counts the requests, and breaks those that a test names.

with S3Proxy("http://127.0.0.1:5000") as proxy:
    settings.use_options("s3", {"endpoint_url": proxy.url})
    proxy.fail("503 SlowDown", "GET", "manifest.json", times=2)
    ...
    assert proxy.counts() == {"GET": 3}
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DROP, RESET, TEAR, HANG = "drop", "reset", "tear", "hang"
"""Ways to fail besides a status: the connection closed without an answer, or reset, or closed in the middle of the
body, or kept open in silence until the client gives up."""
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "expect"}


@dataclass(frozen=True)
class Request:
    operation: str
    """GET, HEAD, PUT, DELETE, LIST, DELETES (many keys at once), or of a multipart upload: CREATE, PART, COMPLETE,
    ABORT."""
    key: str
    """Bucket and key; of a listing, bucket and prefix."""
    range: str | None
    access_key: str | None
    at: float
    """Seconds, of the monotonic clock."""
    answered: str
    """'passed on', or how it was failed."""


@dataclass
class _Failure:
    how: str
    operation: str
    part_of_key: str
    times: float
    made: Counter[str] = field(default_factory=Counter)
    """By key."""


class S3Proxy:
    """See the module. `requests` holds what was asked for, in order."""

    def __init__(self, upstream: str) -> None:
        split = urlsplit(upstream)
        self.upstream = (str(split.hostname), int(split.port or 80))
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._failures: list[_Failure] = []
        self._lock = threading.Lock()
        self._in_flight = 0
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> S3Proxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, how: str, operation: str = "", part_of_key: str = "", times: float = float("inf")) -> None:
        """Fail the next so many requests for each key that holds this text, of this operation (any, if empty).

        Args:
            how: a status with the code of the error ('503 SlowDown') or with the body ('200 <Error>…'), or DROP,
                RESET, TEAR or HANG.
        """
        self._failures.append(_Failure(how, operation, part_of_key, times))

    def counts(self) -> dict[str, int]:
        """How many requests of each operation there were."""
        return dict(Counter(request.operation for request in self.requests))

    def forget(self) -> None:
        """Count anew, and fail nothing."""
        with self._lock:
            self.requests.clear()
            self._failures.clear()
            self.most_at_once = 0

    def take(self, operation: str, key: str, headers: Any) -> str:
        """Note a request; returns how to answer it."""
        authorization = headers.get("Authorization", "")
        access_key = authorization.partition("Credential=")[2].partition("/")[0] or None
        with self._lock:
            self._in_flight += 1
            self.most_at_once = max(self.most_at_once, self._in_flight)
            answer = "passed on"
            for failure in self._failures:
                if failure.operation in ("", operation) and failure.part_of_key in key:
                    failure.made[key] += 1
                    if failure.made[key] <= failure.times:
                        answer = failure.how
                        break
            request = Request(operation, key, headers.get("Range"), access_key, time.monotonic(), answer)
            self.requests.append(request)
        return answer

    def done(self) -> None:
        with self._lock:
            self._in_flight -= 1


class _Handler(BaseHTTPRequestHandler):
    proxy: S3Proxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body of an answer in one packet

    def _handle(self) -> None:
        split = urlsplit(self.path)
        query = parse_qs(split.query, keep_blank_values=True)
        key = unquote(split.path.lstrip("/"))
        operation = _operation(self.command, query)
        if operation == "LIST":
            key += "/" + query.get("prefix", [""])[0]
        body = self._body()
        answer = self.proxy.take(operation, key, self.headers)
        try:
            self._answer(answer, body)
        finally:
            self.proxy.done()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _answer(self, answer: str, body: bytes) -> None:
        if answer == HANG:
            self.proxy.closing.wait(60)
        if answer in (DROP, HANG, RESET):
            self._hang_up(reset=answer == RESET)
        elif answer in ("passed on", TEAR):
            self._pass_on(body, torn=answer == TEAR)
        else:
            status, _, code = answer.partition(" ")
            error = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test wants</Message></Error>"
            content = code if code.startswith("<") else error if code else ""
            self._send(int(status), {"Content-Type": "application/xml"}, content.encode())

    def _pass_on(self, body: bytes, *, torn: bool) -> None:
        upstream = http.client.HTTPConnection(*self.proxy.upstream, timeout=120)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        headers["Content-Length"] = str(len(body))
        try:
            upstream.request(self.command, self.path, body=body, headers=headers)
            response = upstream.getresponse()
            content = response.read()
        finally:
            upstream.close()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        length = int(response.getheader("Content-Length") or len(content))
        self._send(response.status, kept, content[: len(content) // 2] if torn else content, length)
        if torn:
            self._hang_up(reset=False)

    def _send(self, status: int, headers: dict[str, str], content: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        self.wfile.flush()

    def _hang_up(self, *, reset: bool) -> None:
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_expect_100(self) -> bool:
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _operation(method: str, query: dict[str, list[str]]) -> str:
    upload = "uploadId" in query
    if method == "GET" and ("list-type" in query or "location" in query):
        return "LIST" if "list-type" in query else "LOCATION"
    return {
        "POST": "DELETES" if "delete" in query else "COMPLETE" if upload else "CREATE",
        "PUT": "PART" if upload else "PUT",
        "DELETE": "ABORT" if upload else "DELETE",
    }.get(method, method)
