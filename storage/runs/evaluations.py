"""Benchmark results of a run's models: one JSON file per model and task, named by everything that determines it.

<run>/evaluations/<model>/<task>-<key>.json            a score, with its identity; written last: the task is done
                          <task>-<key>.samples.jsonl   the model's answers, one a line
                          <group>/<task>-<key>.json    the parts of a task such as mmlu, which has one for each subject

The key is a fingerprint of the model's weights, the requests, the scoring and the engine. An evaluation with the right
key can therefore be used no matter which run made it; one of another run in the same root is reused.
A record is sealed to its run and its name (`storage.files.sealed`), and holds the digest of the answers beside it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ddk.values import Tally
from storage.errors import FormatVersionError, StoreDamagedError, StoreError
from storage.files import uri
from storage.files.fields import first_problem
from storage.files.sealed import Sealed
from storage.runs.folder import RunFolder

RECORD_FORMAT = 2
"""Of the JSON files."""
RECORD = Sealed(
    what="record of an evaluation",
    version=RECORD_FORMAT,
    remedy="remove it and run the same `ddk eval` again, which asks the model again",
)
_ANSWERS = "samples_sha256"
CONCEPTS = "concepts"
"""Field of a record whose questions have paths: `{path: {metric: {"right", "asked"}}}`."""
CONTEXT_KIND = "context"
"""`kind` of a record of long inputs, which is no benchmark."""


def _path_of_questions(path: str) -> str:
    if not all(part and part == part.strip() and part.isprintable() for part in path.split("/")):
        raise ValueError(f"{path!r} is no path of questions")
    return path


class _StoredTally(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    right: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    asked: Annotated[int, Field(ge=1, strict=True)]


_STORED = TypeAdapter(dict[Annotated[str, AfterValidator(_path_of_questions)], dict[str, _StoredTally]])


def stored_concepts(tallies: Mapping[str, Mapping[str, Tally]]) -> dict[str, Any]:
    """Tallies by path and metric, as a record holds them."""
    return {
        path: {metric: {"right": one.right, "asked": one.asked} for metric, one in sorted(by_metric.items())}
        for path, by_metric in sorted(tallies.items())
    }


def concepts_of(record: Mapping[str, Any]) -> dict[str, dict[str, Tally]]:
    """The tallies by path and metric that a record holds; empty where its questions have no paths.

    Raises:
        ValueError: they are no tallies.
    """
    try:
        found = _STORED.validate_python(record.get(CONCEPTS, {}))
    except ValidationError as error:
        raise ValueError(f"{CONCEPTS}.{first_problem(error)}") from None
    return {
        path: {metric: Tally(right=one.right, asked=one.asked) for metric, one in by_metric.items()}
        for path, by_metric in found.items()
    }


class EvaluationFolder:
    """The evaluations of one run."""

    def __init__(self, root: str, run: str) -> None:
        self._root, self._run = root, run
        self.url = uri.join(RunFolder(root, run).url, "evaluations")

    def find(self, model: str, name: str) -> dict[str, Any] | None:
        """The record of that name, also where only another run of the root has it (it is copied then)."""
        own = self._read(model, name)
        if own is not None:
            return own
        for run in uri.list_names(uri.join(self._root, "runs")):
            other = EvaluationFolder(self._root, run)
            if run == self._run:
                continue
            try:
                record, samples = other._read(model, name), other.samples(model, name)
            except StoreError:  # that run's own concern
                continue
            if record is not None:
                self.write(model, name, record, samples)
                return self._read(model, name)
        return None

    def write(
        self, model: str, name: str, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Store the answers, then the record that declares them complete."""
        answers: dict[str, str] = {}
        if samples is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples).encode()
            uri.write_bytes(uri.join(self.url, model, f"{name}.samples.jsonl"), lines)
            answers = {_ANSWERS: hashlib.sha256(lines).hexdigest()}
        RECORD.write(uri.join(self.url, model, f"{name}.json"), {**record, **answers}, self._record_of(model, name))

    def samples(self, model: str, name: str) -> list[dict[str, Any]] | None:
        """The answers; None where there are none.

        Raises:
            StoreDamagedError: they are not those that the record was made of.
        """
        record = self._read(model, name)
        url = uri.join(self.url, model, f"{name}.samples.jsonl")
        content = uri.read_bytes(url)
        if record is not None and content is not None and record.get(_ANSWERS) != hashlib.sha256(content).hexdigest():
            raise StoreDamagedError(
                f"{url} does not hold the answers that its record was made of; remove both files and run the same "
                f"`ddk eval` again"
            )
        # Not splitlines: answers hold characters that Unicode counts among line ends, and JSON does not.
        return None if content is None else [json.loads(line) for line in content.decode().split("\n") if line]

    def records(self) -> list[dict[str, Any]]:
        """All records of whole tasks, of every model, in the order of their names; parts are left out."""
        names = [
            (model, name.removesuffix(".json"))
            for model in uri.list_names(self.url)
            for name in uri.list_names(uri.join(self.url, model))
            if name.endswith(".json")
        ]
        found = (self._read(model, name) for model, name in names)
        return [content for content in found if content is not None]

    def findings(self) -> Iterator[tuple[str, str]]:
        """What is wrong with records and answers: the file's URL, and what it is."""
        for model in uri.list_names(self.url):
            for name in self._names_below(uri.join(self.url, model)):
                try:
                    self._read(model, name)
                    answers = self.samples(model, name)
                    record = self._read(model, name) or {}
                    if answers is None and _ANSWERS in record:
                        yield uri.join(self.url, model, f"{name}.samples.jsonl"), "missing; remove its record too"
                except StoreError as error:
                    yield uri.join(self.url, model, f"{name}.json"), str(error)

    @staticmethod
    def _names_below(folder: str) -> list[str]:
        """Of all records in a folder and in those of groups."""
        names = []
        for name in uri.list_names(folder):
            if name.endswith(".json"):
                names.append(name.removesuffix(".json"))
            elif not name.endswith(".jsonl"):
                parts = uri.list_names(uri.join(folder, name))
                names += [f"{name}/{part.removesuffix('.json')}" for part in parts if part.endswith(".json")]
        return names

    def _read(self, model: str, name: str) -> dict[str, Any] | None:
        place = uri.join(self.url, model, f"{name}.json")
        try:
            record = RECORD.read(place, self._record_of(model, name))
        except FormatVersionError:
            return None
        try:
            concepts_of(record or {})
        except ValueError as error:
            raise RECORD.damaged(place, str(error)) from None
        return record

    def _record_of(self, model: str, name: str) -> str:
        return f"the evaluation {name} of the {model} of run '{self._run}'"


def record_name(task: str, key: str, group: str | None = None) -> str:
    """`('completion:c++', '0a1b')` → `'completion-c-0a1b'`; a part of a group lies in a folder of its own."""
    name = f"{_plain(task)}-{key}"
    return f"{_plain(group)}/{name}" if group is not None else name


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "task"
