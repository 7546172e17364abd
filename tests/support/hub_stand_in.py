"""A stand-in on loopback for what a push asks of the Hugging Face hub: repositories, large files, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class HubStandIn:
    """Files of every commit by repository, and every request's path and token."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self._large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes) -> Any:  # noqa: PLR0911 (one each)
        """Plain data of the answer; None where there is no such place."""
        self.asked.append(f"{method} {path}")
        if method == "PUT" and path.startswith("/large/"):
            oid = path.removeprefix("/large/")
            assert hashlib.sha256(body).hexdigest() == oid
            self._large[oid] = body
            return {}
        if path == "/api/repos/create":
            self.created.append(asked := json.loads(body))
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            return {
                "files": [
                    {"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            return self._commit("/".join(path.split("/")[3:5]), body)
        return None

    def _commit(self, name: str, body: bytes) -> dict[str, str]:
        for line in body.decode().splitlines():
            one = json.loads(line)
            if one["key"] == "file":
                assert one["value"]["encoding"] == "base64"
                self.repositories[name][one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            elif one["key"] == "lfsFile":
                self.repositories[name][one["value"]["path"]] = self._large[one["value"]["oid"]]
        return {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "hookOutput": ""}


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            allowed = self.path.startswith("/large/") or self.headers.get("Authorization") == f"Bearer {hub.token}"
            found = hub.answer(self.command, self.path.partition("?")[0], body) if allowed else {"error": "refused"}
            content = json.dumps(found if found is not None else {"error": "no such place"}).encode()
            self.send_response(401 if not allowed else 404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _do

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
