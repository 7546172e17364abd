"""A server that takes a connection and then falls silent, in a phase that a test names."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: "a"\r\n\r\n'


class SilentServer:
    """See the module.

    Args:
        phase: 'answer': the request is read, and nothing said; 'continue': its head is read, and `100 Continue` never
            said; 'body': no more than its head is read; 'trickle': it is answered, a byte now and then.
    """

    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> SilentServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            if self._phase in ("answer", "body") and b"100-continue" in head.lower():
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if self._phase == "trickle":
                connection.sendall(ANSWER)
            while not self._closing.is_set():
                if self._phase == "trickle":
                    connection.sendall(b"x")
                    time.sleep(0.1)
                elif self._phase == "answer":
                    connection.settimeout(0.1)
                    with contextlib.suppress(TimeoutError):
                        if not connection.recv(65536):
                            return
                else:
                    self._closing.wait(0.1)
