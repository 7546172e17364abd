"""Checks whether the files of a root other than its stores are unchanged: runs, comparisons, laws, remembered facts.

Each finding names a file, what is wrong with it, and what to do. Nothing is changed here; the stages recreate what can
be recreated, and log it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from storage.corpus.record_paths import store_name
from storage.errors import StoreError
from storage.files import uri
from storage.files.remembered import facts_of
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.listing import Listing
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from storage.runs.reports import ComparisonFolder, LawFolder, ReportFolder
from storage.stores.manifest import STAGE, read_manifest

_RETRAIN = "run the same `ddk train` again"
_T = TypeVar("_T")
_MADE_AGAIN: dict[type[ReportFolder], str] = {
    ComparisonFolder: "run the same `ddk compare` with --report-only, which makes it of the runs",
    LawFolder: "run the same `ddk law` again, which fits it to the runs anew",
}
_REPORT = "run `ddk report` again, which writes it anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it was written."""

    url: str
    what: str

    def __str__(self) -> str:
        # An error's own words name the file already.
        return self.what if self.what.startswith(self.url) else f"{self.url}: {self.what}"


def run_findings(root: str, name: str, *, full: bool) -> list[Finding]:
    """Everything that is wrong with one run.

    Args:
        full: read every byte, not only the sizes.
    """
    audit = _RunAudit(root, name, full=full)
    audit.run()
    return audit.findings


def report_findings(folder: ReportFolder, *, full: bool) -> list[Finding]:
    """Everything that is wrong with one comparison or law."""
    audit, again = _Audit(full=full), _MADE_AGAIN[type(folder)]
    audit.needed(folder.data_url, folder.data, again)
    audit.listed(folder.listing, again)
    return audit.findings


def memory_findings(root: str) -> list[Finding]:
    """What is wrong with the root's memory of its inputs, which is only ever a saving of time."""
    audit = _Audit(full=True)
    for name in ("digests.json", "paths.json", "servers.json", "complete.json"):
        url = uri.join(root, name)
        audit.read(url, partial(facts_of, url))
    return audit.findings


class _Audit:
    """Collects what is found."""

    def __init__(self, *, full: bool) -> None:
        self.full = full
        self.findings: list[Finding] = []

    def add(self, url: str, what: str) -> None:
        self.findings.append(Finding(url=url, what=what))

    def read(self, url: str, read: Callable[[], _T]) -> _T | None:
        """What is read; None, and a finding, where it cannot be."""
        try:
            return read()
        except StoreError as error:
            self.add(url, str(error))
            return None

    def needed(self, url: str, read: Callable[[], _T | None], remedy: str) -> _T | None:
        """Likewise of what must be there."""
        found = self.read(url, read)
        if found is None and not uri.exists(url):
            self.add(url, f"missing; {remedy}")
        return found

    def listed(self, listing: Listing, remedy: str) -> None:
        """The files of a folder that others read too."""
        found = self.read(listing.url, lambda: list(listing.differences(full=self.full)))
        if found is not None and not uri.exists(listing.url):
            self.add(listing.url, f"missing: what {listing.folder} holds cannot be checked; {remedy}")
        for difference in found or ():
            self.add(difference.url, f"{difference.what}; {remedy}")


class _RunAudit(_Audit):
    """Looks at one run, piece by piece."""

    def __init__(self, root: str, name: str, *, full: bool) -> None:
        super().__init__(full=full)
        self._root, self._name = root, name
        self._folder = RunFolder(root, name)
        self._summary: dict[str, Any] | None = None
        self._records: list[MixtureRecord] | None = None

    def run(self) -> None:
        folder, anew = self._folder, f"{_RETRAIN}, which writes it anew"
        identity = self.needed(self._url("identity.json"), folder.identity, anew)
        if identity is None:
            return  # all else belongs to it
        self.needed(self._url("config.json"), folder.config, anew)
        if uri.exists(self._url("tracking.json")):
            self.read(self._url("tracking.json"), folder.tracking_id)
        self._stores(identity)
        self._summary = self.read(self._url("summary.json"), folder.summary)
        self._records = self.read(self._url("mixtures"), MixtureHistory(folder.url).records)
        self._checkpoints()
        self._metrics()
        self._ending()
        self._curves()
        for url, what in EvaluationFolder(self._root, self._name).findings():
            self.add(url, what)

    def _url(self, *parts: str) -> str:
        return uri.join(self._folder.url, *parts)

    @property
    def _steps(self) -> int:
        """Of a complete run."""
        return int((self._summary or {}).get("steps", 0))

    def _stores(self, identity: dict[str, Any]) -> None:
        stores = identity.get("stores")
        for domain, fingerprints in (stores if isinstance(stores, dict) else {}).items():
            for kind in ("blocks", "targets", *(("selections",) if "selections" in fingerprints else ())):
                stage = STAGE[kind]
                url = uri.join(self._root, kind, str(fingerprints.get(kind)), store_name(domain))
                manifest = self.read(url, partial(read_manifest, url))
                if manifest is None and not uri.list_names(url):
                    self.add(url, f"missing, and a run was trained on it; `{stage} CONFIG` recreates it")

    def _checkpoints(self) -> None:
        checkpoints = CheckpointFolder(self._folder.url)
        steps = checkpoints.steps()
        for step in steps:
            self._checkpoint(checkpoints, step)
        if self._summary is None:
            return
        for url in checkpoints.unfinished():
            self.add(uri.join(url, "state.json"), f"missing: the checkpoint is not valid; remove {url}")
        if self._steps and self._steps not in steps:  # one that never trained is saved from the student it began with
            self.add(checkpoints.url(self._steps), "missing: the last checkpoint, from which the student can be saved")

    def _checkpoint(self, checkpoints: CheckpointFolder, step: int) -> None:
        url = uri.join(checkpoints.url(step), "state.json")
        state = self.read(url, lambda: checkpoints.state(step))
        if state is None:
            return
        for difference in checkpoints.differences(step, full=self.full):
            remedy = f"remove the folder {checkpoints.url(step)}; training resumes from the checkpoint before it"
            self.add(difference.url, f"{difference.what}; {remedy}")
        versions = state.get("mixture_versions")
        for version in versions if isinstance(versions, list) else ():
            if self._records is not None and version >= len(self._records):
                place = self._url("mixtures", f"{version:05d}.json")
                self.add(place, f"missing, and the checkpoint of step {step} was trained under it; restore it")

    def _metrics(self) -> None:
        expected, intervals = 0, self._folder.measured_intervals()
        for place, first in enumerate(intervals):
            rows = self.read(self._metrics_url(first), partial(self._folder.interval_metrics, first))
            if first != expected:
                self._lost(expected, first)
            following = intervals[place + 1] if place + 1 < len(intervals) else self._steps or first
            expected = following if rows is None else first + len(rows)
        if self._summary is not None and expected != self._steps:
            self._lost(expected, self._steps)

    def _metrics_url(self, first: int) -> str:
        return self._url("metrics", f"step-{first:08d}.json")

    def _lost(self, first: int, last: int) -> None:
        self.add(
            self._metrics_url(first), f"missing: the losses of steps {first + 1} to {last} are not there; restore it"
        )

    def _ending(self) -> None:
        """What a complete run has besides."""
        folder, url = self._folder, self._url("summary.json")
        if self._summary is None:
            if uri.exists(folder.student_listing.url) and not uri.exists(url):
                self.add(url, f"missing, and the student is there; {_RETRAIN}, which completes the run")
            return
        if self._records is not None and (not self._records or self._records[-1].step != self._steps):
            place = self._url("mixtures", f"{len(self._records):05d}.json")
            self.add(place, "missing: the run's last measurement; restore it, or run `ddk gap` again")
        self.listed(folder.student_listing, f"{_RETRAIN}: the student is saved from the last checkpoint")
        self.listed(folder.report_listing, _REPORT)

    def _curves(self) -> None:
        """TensorBoard's files, of which the run's own record says what they hold."""
        if uri.list_names(self._url("tensorboard")):
            self.listed(self._folder.curves_listing, "remove it: the curves then lack these points")
