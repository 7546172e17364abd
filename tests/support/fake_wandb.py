"""As much of Weights & Biases' server as its client needs to begin a run, go on with it and send its history.

python fake_wandb.py PORT FILE      keeps one run, also from one process to the next, and in FILE its history
"""

from __future__ import annotations

import gzip
import http.server
import json
import sys
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    def __init__(self, port: int, file: str) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.summary = "{}"
        self.begun = False

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        if path != "/graphql":
            return self._stream(asked.get("files") or {})
        match asked.get("operationName"):
            case "RunResumeStatus":
                project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "team"}}
                return {"data": {"model": {**project, "bucket": self._bucket() if self.begun else None}}}
            case "UpsertBucket":
                inserted, self.begun = not self.begun, True
                return {"data": {"upsertBucket": {"bucket": self._bucket(), "inserted": inserted}}}
            case "CreateRunFiles":
                return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []}}}
        return {"data": {}}

    def _stream(self, files: dict[str, Any]) -> dict[str, Any]:
        if "wandb-summary.json" in files:
            self.summary = files["wandb-summary.json"]["content"][-1]
        self.rows += [json.loads(line) for line in files.get("wandb-history.jsonl", {}).get("content", [])]
        with open(self.file, "w", encoding="utf-8") as file:
            json.dump(self.rows, file)
        return {}

    def _bucket(self) -> dict[str, Any]:
        tail = [json.dumps({"_step": len(self.rows) - 1, "_runtime": 1.0})] if self.rows else []
        fixed = {"id": "1", "name": "x", "displayName": "a", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
        lines = {"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps(tail), "eventsTail": "[]", "summaryMetrics": self.summary}
        return {**fixed, **lines, **tails, "project": {"id": "1", "name": "p", "entity": {"id": "1", "name": "team"}}}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = json.dumps(self.server.answer(self.path, json.loads(body or b"{}"))).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        pass


if __name__ == "__main__":
    Server(int(sys.argv[1]), sys.argv[2]).serve_forever()
