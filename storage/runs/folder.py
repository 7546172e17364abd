"""The folder of a run, which is guaranteed to hold only one run.

<root>/runs/<name>/identity.json   what determines the trained student; another one is refused
                   config.json     the resolved configuration
                   mixtures/       see storage.runs.mixtures
                   checkpoints/    see storage.runs.checkpoints
                   metrics/        a file an interval: loss, speed and share of waiting, step by step
                   tensorboard/    the same and the gaps as TensorBoard reads it; tensorboard.json lists its files
                   tracking.json   by which services outside know the run
                   student/        the final model, an ordinary Hugging Face folder; student.json lists its files
                   report/         what a person looks at; report.json lists its files
                   summary.json    written last: the run is complete

All JSON of a run is sealed (`storage.files.sealed`): `identity.json` to the run's name, the rest to the identity. A
record of another run, or of a run with the same name but other settings, is therefore not accepted.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from storage.errors import RunMismatchError, StoreDamagedError
from storage.files import uri
from storage.files.digests import DigestCache
from storage.files.sealed import Sealed, sealed_rows, unsealed_rows
from storage.fingerprint import differences, fingerprint
from storage.runs.listing import Listing

FORMAT_VERSION = 2
"""Of a run's JSON files."""
IDENTITY = Sealed(
    what="identity of a run",
    version=FORMAT_VERSION,
    remedy="remove it and run the same `ddk train` again, which writes it anew and refuses what was measured otherwise",
)
CONFIG = Sealed(
    what="configuration of a run",
    version=FORMAT_VERSION,
    remedy="run the same `ddk train` again, which writes it anew",
)
SUMMARY = Sealed(
    what="summary of a run",
    version=FORMAT_VERSION,
    remedy="remove it and run the same `ddk train` again: the student is saved from the newest checkpoint",
)
TRACKING = Sealed(
    what="name of a run for trackers",
    version=FORMAT_VERSION,
    remedy="remove it: trackers then see the run as a new one",
)
_METRICS_REMEDY = "restore it, or train the run again under another name (run: …)"


def run_key(run_url: str) -> str:
    """What a run's records belong to: the fingerprint of its identity, or that it has none.

    Raises:
        StoreDamagedError, FormatVersionError: the identity is not what was written.
    """
    identity = IDENTITY.read(uri.join(run_url, "identity.json"), identity_of(run_url))
    return "without identity.json" if identity is None else fingerprint(_plain(identity))


def identity_of(run_url: str) -> str:
    """What the identity of the run in this folder is sealed to."""
    return f"the identity of run '{uri.name_of(run_url)}'"


def run_at(url: str) -> tuple[str, str] | None:
    """Root and name of the run whose folder a URL names, `<root>/runs/<name>`; None where it names none.

    Whether there is such a run is not looked at. A local path may be relative to the working folder.
    """
    root, between, name = uri.absolute(url.rstrip("/"), os.getcwd()).rpartition("/runs/")
    return (root, name) if between and name and "/" not in name else None


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "format_version"}


def name_to_make_again(root: str, name: str) -> str:
    """`run`, `run.2`, `run.3`, …: the first that is not there. An unfinished one is resumed."""
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
        self._root = root
        self.url = uri.join(root, "runs", name)

    @property
    def root_name(self) -> str:
        """The last part of the root's URL."""
        return uri.name_of(self._root)

    @property
    def student_url(self) -> str:
        return uri.join(self.url, "student")

    @property
    def report_url(self) -> str:
        return uri.join(self.url, "report")

    def claim(self, identity: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Begin the run, or resume it.

        Args:
            identity: plain JSON data that determines the student: data, models, method, loss, training, mixture.
            config: the whole resolved configuration, kept for the reader.

        Raises:
            RunMismatchError: the folder holds another run; the fields that differ are named.
        """
        identity = uri.as_json(identity)
        found = self.identity()
        if found is not None and found != identity:
            raise RunMismatchError(
                f"run '{self.name}' in {self.url} was started with other settings "
                f"({'; '.join(differences(found, identity))}); choose another name (run: …) or remove that folder"
                f"; `ddk train CONFIG --from {self.name} --run NAME` goes on from it with the new settings"
            )
        if found is None:
            IDENTITY.write(self._identity_url, identity, identity_of(self.url))
        CONFIG.write(uri.join(self.url, "config.json"), config, self._of("the configuration"))

    def identity(self) -> dict[str, Any] | None:
        """What the run was begun with; None where it has not begun.

        Raises:
            StoreDamagedError, FormatVersionError: it is not what was written.
        """
        content = IDENTITY.read(self._identity_url, identity_of(self.url))
        return _plain(content) if content is not None else None

    def config(self) -> dict[str, Any] | None:
        """The resolved configuration; None where the run has not begun. Raises as `identity`."""
        content = CONFIG.read(uri.join(self.url, "config.json"), self._of("the configuration"))
        return _plain(content) if content is not None else None

    def tracking_id(self) -> str:
        """The id under which external services know this run: 16 hexadecimal digits, created at first use.

        It is stored in the folder, so that a run that replaces a removed one of the same name gets another id.
        """
        place, of = uri.join(self.url, "tracking.json"), self._of("the tracking")
        found = TRACKING.read(place, of)
        if found is None:
            TRACKING.create(place, {"id": uuid.uuid4().hex[:16]}, of)
            found = TRACKING.read(place, of) or {}
        if not re.fullmatch(r"[0-9a-f]{16}", str(found.get("id"))):
            raise TRACKING.damaged(place, "it holds no id of 16 hexadecimal digits")
        return str(found["id"])

    def write_metrics(self, first_step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Measurements of the steps of one interval, which begins after `first_step` steps."""
        of = self._of(f"the metrics from step {first_step}")
        uri.write_bytes(self._metrics_of(first_step), sealed_rows(rows, of))

    def metrics(self) -> list[dict[str, Any]]:
        """Measurements of all steps, in order.

        Raises:
            StoreDamagedError: those of an interval are missing, or not what was written.
        """
        first_steps = self.measured_intervals()
        contents = uri.read_whole_many([self._metrics_of(first_step) for first_step in first_steps])
        key = run_key(self.url) if first_steps else ""
        rows: list[dict[str, Any]] = []
        for first_step, raw in zip(first_steps, contents, strict=True):
            self._check_no_gap(rows, first_step)
            rows += self._rows(first_step, raw, key)
        self._check_no_gap(rows, (self.summary() or {}).get("steps"))
        return rows

    def _check_no_gap(self, rows: Sequence[Mapping[str, Any]], first_step: int | None) -> None:
        done = rows[-1]["step"] if rows else 0
        if first_step is not None and done != first_step:
            place = self._metrics_of(done)
            raise StoreDamagedError(f"{place} is missing: it held the steps from {done} on; {_METRICS_REMEDY}")

    @property
    def _identity_url(self) -> str:
        return uri.join(self.url, "identity.json")

    def _of(self, what: str, key: str | None = None) -> str:
        return f"{what} of run '{self.name}' ({run_key(self.url) if key is None else key})"

    def _rows(self, first_step: int, raw: bytes | None, key: str | None = None) -> list[dict[str, Any]]:
        if raw is None:
            return []
        of = self._of(f"the metrics from step {first_step}", key)
        rows = unsealed_rows(self._metrics_of(first_step), raw, of, _METRICS_REMEDY)
        if any(not isinstance(row.get("step"), int) for row in rows):
            raise StoreDamagedError(
                f"{self._metrics_of(first_step)} is no sound table (a row has no step); {_METRICS_REMEDY}"
            )
        return rows

    def measured_intervals(self) -> list[int]:
        """The `first_step` of every interval that `write_metrics` was called for, ascending."""
        found = (re.fullmatch(r"step-(\d+)\.json", name) for name in uri.list_names(uri.join(self.url, "metrics")))
        return sorted(int(match[1]) for match in found if match)

    def interval_metrics(self, first_step: int) -> list[dict[str, Any]]:
        """What `write_metrics` was given for one interval; empty where there is none."""
        return self._rows(first_step, uri.read_bytes(self._metrics_of(first_step)))

    def _metrics_of(self, first_step: int) -> str:
        return uri.join(self.url, "metrics", f"step-{first_step:08d}.json")

    @property
    def student_listing(self) -> Listing:
        """The files of the final student, as they were written."""
        return Listing(self.student_url, uri.join(self.url, "student.json"), self._of("the student's files"))

    def student_faults(self) -> list[str]:
        """The faults of a complete run's student: files that are missing or changed.

        On a local disk by every byte, read anew where a file has changed since it was read; elsewhere by the sizes.
        """
        local = uri.is_local(self._root)
        digests = DigestCache(uri.join(self._root, "digests.json")) if local else None
        if self.student_listing.read() is None:
            return [f"{self.student_listing.url} is missing"]
        return [f"{one.url}: {one.what}" for one in self.student_listing.differences(digests, full=local)]

    @property
    def report_listing(self) -> Listing:
        """The files of the report, likewise."""
        return Listing(self.report_url, uri.join(self.url, "report.json"), self._of("the report's files"))

    @property
    def curves_listing(self) -> Listing:
        """TensorBoard's files, likewise."""
        url = uri.join(self.url, "tensorboard")
        return Listing(url, uri.join(self.url, "tensorboard.json"), self._of("the curves' files"))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Declare the run complete."""
        SUMMARY.write(uri.join(self.url, "summary.json"), summary, self._of("the summary"))

    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote; None while the run is not complete. Raises as `identity`."""
        content = SUMMARY.read(uri.join(self.url, "summary.json"), self._of("the summary"))
        return _plain(content) if content is not None else None
