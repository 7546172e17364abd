"""What benchmarks said of a run's models: one JSON file a model and task, named by all that determines it.

<run>/evaluations/<model>/<task>-<key>.json            a score, with its identity; written last: the task is done
                          <task>-<key>.samples.jsonl   the model's answers, one a line
                          <group>/<task>-<key>.json    the parts of a task such as mmlu, which has one for each subject

The key is a fingerprint of the model's weights, the requests it was asked, how they are scored and what ran it. So an
evaluation that is there is the one that is wanted, whoever made it: one of another run of the same root is taken over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from storage import uri
from storage.runs import RunFolder

RECORD_FORMAT = 1
"""Of the JSON files."""


class EvaluationFolder:
    """The evaluations of one run."""

    def __init__(self, root: str, run: str) -> None:
        self._root, self._run = root, run
        self.url = uri.join(RunFolder(root, run).url, "evaluations")

    def find(self, model: str, name: str) -> dict[str, Any] | None:
        """The record of that name, also where only another run of the root has it (it is copied then)."""
        own = self._read(self.url, model, name)
        if own is not None:
            return own
        for run in uri.list_names(uri.join(self._root, "runs")):
            other = EvaluationFolder(self._root, run)
            if run != self._run and (record := self._read(other.url, model, name)) is not None:
                self.write(model, name, record, other.samples(model, name))
                return record
        return None

    def write(
        self, model: str, name: str, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Store the answers, then the record that declares them complete."""
        if samples is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            uri.write_bytes(uri.join(self.url, model, f"{name}.samples.jsonl"), lines.encode())
        uri.write_json(uri.join(self.url, model, f"{name}.json"), {**record, "format": RECORD_FORMAT})

    def samples(self, model: str, name: str) -> list[dict[str, Any]] | None:
        """The answers; None where there are none."""
        content = uri.read_bytes(uri.join(self.url, model, f"{name}.samples.jsonl"))
        # Not splitlines: answers hold characters that Unicode counts among line ends, and JSON does not.
        return None if content is None else [json.loads(line) for line in content.decode().split("\n") if line]

    def records(self) -> list[dict[str, Any]]:
        """All records of whole tasks, of every model, in the order of their names; parts are left out."""
        urls = [
            uri.join(self.url, model, name)
            for model in uri.list_names(self.url)
            for name in uri.list_names(uri.join(self.url, model))
            if name.endswith(".json")
        ]
        found = [content for content in uri.read_jsons(urls) if content is not None]
        return [content for content in found if content.get("format") == RECORD_FORMAT]

    @staticmethod
    def _read(folder: str, model: str, name: str) -> dict[str, Any] | None:
        content = uri.read_json(uri.join(folder, model, f"{name}.json"))
        return dict(content) if content is not None and content.get("format") == RECORD_FORMAT else None


def record_name(task: str, key: str, group: str | None = None) -> str:
    """`('completion:c++', '0a1b')` → `'completion-c-0a1b'`; a part of a group lies in a folder of its own."""
    name = f"{_plain(task)}-{key}"
    return f"{_plain(group)}/{name}" if group is not None else name


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "task"
