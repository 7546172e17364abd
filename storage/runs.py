"""The folder of a run, and the promise that it holds one run only.

<root>/runs/<name>/config.json     the resolved configuration
                   identity.json   what determines the trained student; another one is refused
                   mixtures/       see storage.mixtures
                   checkpoints/    see storage.checkpoints
                   metrics/        a file an interval: loss, speed and share of waiting, step by step
                   tensorboard/    the same and the gaps as TensorBoard reads it; see tasks.tracking_tensorboard
                   tracking.json   by which services outside know the run
                   student/        the final model, an ordinary Hugging Face folder
                   report/         what a person looks at
                   summary.json    written last: the run is complete
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from storage import uri
from storage.errors import RunMismatchError
from storage.fingerprint import differences


def name_to_make_again(root: str, name: str) -> str:
    """`run`, `run.2`, `run.3`, …: the first that is not there. One that was begun so, and not completed, goes on."""
    if RunFolder(root, name).identity() is None:
        return name
    number = 2
    while (found := RunFolder(root, f"{name}.{number}")).summary() is not None or (
        found.identity() is not None and RunFolder(root, f"{name}.{number + 1}").identity() is not None
    ):
        number += 1
    return f"{name}.{number}"


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, root: str, name: str) -> None:
        self.name = name
        self.url = uri.join(root, "runs", name)

    @property
    def student_url(self) -> str:
        return uri.join(self.url, "student")

    @property
    def report_url(self) -> str:
        return uri.join(self.url, "report")

    def claim(self, identity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Begin the run, or go on with it.

        Args:
            identity: plain JSON data that determines the student: data, models, method, loss, training, mixture.
            config: the whole resolved configuration, kept for the reader.

        Raises:
            RunMismatchError: the folder holds another run; the fields that differ are named.
        """
        place = uri.join(self.url, "identity.json")
        identity = uri.as_json(identity)
        found = uri.read_json(place)
        if found is not None and found != identity:
            raise RunMismatchError(
                f"run '{self.name}' in {self.url} was started with other settings "
                f"({'; '.join(differences(found, identity))}); choose another name (run: …) or remove that folder"
            )
        uri.write_json(uri.join(self.url, "config.json"), dict(config))
        if found is None:
            uri.write_json(place, dict(identity))

    def identity(self) -> dict[str, Any] | None:
        """What the run was begun with; None where it has not begun."""
        content = uri.read_json(uri.join(self.url, "identity.json"))
        return dict(content) if content is not None else None

    def config(self) -> dict[str, Any] | None:
        """The resolved configuration; None where the run has not begun."""
        content = uri.read_json(uri.join(self.url, "config.json"))
        return dict(content) if content is not None else None

    def tracking_id(self) -> str:
        """By which services outside know this run: 16 hexadecimal digits, made when they are first asked for.

        They lie in the folder, so that a run that is begun anew where another one was removed is another run.
        """
        place = uri.join(self.url, "tracking.json")
        if uri.read_json(place) is None:
            uri.create_json(place, {"id": uuid.uuid4().hex[:16]})
        return str((uri.read_json(place) or {})["id"])

    def write_metrics(self, first_step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Measurements of the steps of one interval, which begins after `first_step` steps."""
        uri.write_json(self._metrics_of(first_step), [dict(row) for row in rows])

    def metrics(self) -> list[dict[str, Any]]:
        """Measurements of all steps, in order."""
        contents = uri.read_jsons([self._metrics_of(first_step) for first_step in self.measured_intervals()])
        return [row for rows in contents for row in rows or []]

    def measured_intervals(self) -> list[int]:
        """The `first_step` of every interval that `write_metrics` was called for, ascending."""
        found = (re.fullmatch(r"step-(\d+)\.json", name) for name in uri.list_names(uri.join(self.url, "metrics")))
        return sorted(int(match[1]) for match in found if match)

    def interval_metrics(self, first_step: int) -> list[dict[str, Any]]:
        """What `write_metrics` was given for one interval; empty where there is none."""
        return list(uri.read_json(self._metrics_of(first_step)) or [])

    def _metrics_of(self, first_step: int) -> str:
        return uri.join(self.url, "metrics", f"step-{first_step:08d}.json")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Declare the run complete."""
        uri.write_json(uri.join(self.url, "summary.json"), dict(summary))

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while the run is not complete."""
        content = uri.read_json(uri.join(self.url, "summary.json"))
        return dict(content) if content is not None else None
