"""Requests to an OpenAI-compatible server that somebody else runs, and the handling of its failures.

A request that gets no answer, 429 or 5xx is retried with waits that double; after the last attempt,
`ServerUnreachableError` reports the last failure. Any other error status is final and raises `ServerRefusedError` at
once. The key comes from the environment variable DDK_TEACHER_API_KEY and appears in no message, not even where the
server repeats it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import httpx

from ddk.errors import UserError
from tasks.showing.progress import logger

KEY_VARIABLE = "DDK_TEACHER_API_KEY"
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each further attempt: a minute in all, in which a server may be started again."""
TIMEOUT = httpx.Timeout(300.0, connect=10.0)
"""Seconds. A long block waits for its turn behind others."""
_LONGEST_WAIT = 60.0


class ServerUnreachableError(UserError):
    """No answer, 429 or 5xx, as often as it was tried."""


class ServerRefusedError(UserError):
    """The server understood and said no (4xx)."""

    def __init__(self, url: str, status: int, said: str, parameter: str | None) -> None:
        super().__init__(f"{url} answered {status}: {said}")
        self.status, self.parameter = status, parameter


class ServerClient:
    """Any number of threads may use one.

    Args:
        url: up to `/v1`.
        waits: seconds before each further attempt.
    """

    def __init__(self, url: str, waits: Sequence[float] = WAITS) -> None:
        self.url = url.rstrip("/")
        self._waits = waits
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):  # both hold of the empty one
            raise UserError(f"the environment variable {KEY_VARIABLE} holds characters that no key has; set it again")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What the server serves: `id`, and with vLLM `max_model_len`.

        Raises:
            UserError: it cannot be reached, or is no such server.
        """
        answer = _parsed(self.request("GET", f"{self.url}/models"))
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, list) or not all(isinstance(card, dict) and "id" in card for card in data):
            raise UserError(f"{self.url}/models does not list models as an OpenAI-compatible server does; correct it")
        return data

    def version(self) -> str | None:
        """vLLM's version, which stands beside `/v1`; None where the server does not say."""
        try:
            answer = _parsed(self.request("GET", f"{self.url.removesuffix('/v1')}/version"))
        except ServerRefusedError:
            return None
        return str(answer["version"]) if isinstance(answer, dict) and "version" in answer else None

    def request(self, method: str, url: str, body: Any = None) -> bytes:
        """The content of the answer.

        Raises:
            ServerRefusedError: 4xx other than 429.
            ServerUnreachableError: the rest.
        """
        for wait in (*self._waits, None):
            after = 0.0
            try:
                response = self._http.request(method, url, json=body)
            except httpx.TransportError as error:
                said = f"cannot be reached ({self._shown(str(error)) or type(error).__name__})"
            except httpx.InvalidURL as error:
                raise UserError(f"{url} is no URL ({error}); correct it") from None
            else:
                if response.is_success:
                    return response.content
                message, parameter = self._error_of(response)
                if response.status_code != 429 and response.status_code < 500:
                    raise ServerRefusedError(url, response.status_code, message, parameter)
                said = f"answered {response.status_code}: {message}"
                after = _seconds(response.headers.get("Retry-After"))
            if wait is not None:
                logger.info("%s %s; retrying", url, said)
                time.sleep(min(max(wait, after), _LONGEST_WAIT))
        tries = len(self._waits) + 1
        raise ServerUnreachableError(
            f"{url} {said} ({tries} attempts); check that the server runs, then run the command again"
        )

    def _error_of(self, response: httpx.Response) -> tuple[str, str | None]:
        """The message, and the parameter that it is about."""
        answer = _parsed(response.content)
        error = answer.get("error", answer) if isinstance(answer, dict) else None
        if isinstance(error, dict):
            parameter = error.get("param")
            return self._shown(str(error.get("message") or error)), str(parameter) if parameter else None
        return self._shown(str(error or response.text.strip() or response.reason_phrase)), None

    def _shown(self, text: str) -> str:
        # 3xx land here too: a server that moved is not followed, the key would go with the request.
        line = " ".join(text.split())[:300]
        return line.replace(self._key, "***") if self._key else line


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; 0 where it holds no number (a date, as it may)."""
    try:
        return max(float(header or 0.0), 0.0)
    except ValueError:
        return 0.0
