"""A run in MLflow. A tag with the id stored in the run's folder identifies it; further tags record its progress.

Each request holds whole steps and, in the same batch, the tags with the progress. If a batch breaks off, it is sent
again with the same timestamps, and MLflow keeps each value once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ddk.errors import UserError
from storage.runs.folder import RunFolder
from tasks.showing.progress import logger
from tasks.training.tracking.points import Point, RunPoints

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_ID, _STEP, _VERSION = "ddk.run_id", "ddk.logged_step", "ddk.logged_version"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 900, 100  # MLflow takes 1,000 and 100 a request
_LONGEST_VALUE = 6000
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # to MLflow's makers
    # With MLflow's own, 7 and 120 s, a server that is away would hold the training for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class MlflowTracker:
    """Logs points in batches.

    Args:
        config: logged as the run's parameters.

    Raises:
        UserError: neither `uri` nor MLFLOW_TRACKING_URI says where MLflow is.
    """

    name = "MLflow"

    def __init__(self, uri: str | None, experiment: str, folder: RunFolder, config: Mapping[str, Any]) -> None:
        if uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise UserError("tracking.mlflow_experiment needs to know MLflow's server; set tracking.mlflow_uri")
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._uri = uri
        self._experiment = experiment
        self._folder = folder
        self._config = config
        self._opened: tuple[MlflowClient, str] | None = None
        self._step, self._version = 0, -1

    def log(self, points: RunPoints) -> None:
        from mlflow.entities import Metric, RunTag

        client, run_id = self._open()
        for batch in _batches(points.after(self._step, self._version)):
            step = max([self._step, *(point.step for point in batch if point.version is None)])
            version = max([self._version, *(point.version for point in batch if point.version is not None)])
            metrics = [
                Metric(metric_name(name), value, int(1000 * point.time), point.step)
                for point in batch
                for name, value in point.values.items()
            ]
            tags = [RunTag(_STEP, str(step)), RunTag(_VERSION, str(version))]
            client.log_batch(run_id, metrics=metrics, tags=tags)
            self._step, self._version = step, version

    def finish(self, summary: Mapping[str, Any]) -> None:
        client, run_id = self._open()
        for name, value in summary.items():
            client.set_tag(run_id, f"ddk.{name}", "" if value is None else str(value))

    def close(self, *, failed: bool) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[0].set_terminated(opened[1], "FAILED" if failed else "FINISHED")

    def _open(self) -> tuple[MlflowClient, str]:
        if self._opened is None:
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self._uri)
            run = self._find_or_create(client)
            self._step, self._version = int(run.data.tags.get(_STEP, 0)), int(run.data.tags.get(_VERSION, -1))
            self._log_params(client, run)
            self._opened = client, run.info.run_id
            logger.info("tracking: run %s in MLflow's experiment '%s'", run.info.run_id, self._experiment)
        return self._opened

    def _find_or_create(self, client: MlflowClient) -> Run:
        experiment = client.get_experiment_by_name(self._experiment)
        place = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
        key = self._folder.tracking_id()
        found = client.search_runs([place], f"tags.`{_ID}` = '{key}'", max_results=1)
        if not found:
            return client.create_run(place, tags={_ID: key, "ddk.url": self._folder.url}, run_name=self._folder.name)
        client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0]

    def _log_params(self, client: MlflowClient, run: Run) -> None:
        """A parameter is set once for ever: those that are there stay as they were when the run began."""
        from mlflow.entities import Param

        new = [Param(name, value) for name, value in flat(self._config) if name not in run.data.params]
        for start in range(0, len(new), _PARAMS_AT_ONCE):
            client.log_batch(run.info.run_id, params=new[start : start + _PARAMS_AT_ONCE])


def _batches(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Whole points, as many as a request takes."""
    batch: list[Point] = []
    for point in points:
        if batch and sum(len(one.values) for one in batch) + len(point.values) > _METRICS_AT_ONCE:
            yield batch
            batch = []
        batch.append(point)
    if batch:
        yield batch


def metric_name(name: str) -> str:
    """As MLflow takes it: 'mixture/C++' → 'mixture/C_2B_2B'. A leaf may be called whatever can be printed."""
    parts = [part.replace(".", "_2E") if part in (".", "..") else part or "_" for part in name.split("/")]
    return re.sub(r"[^\w.\- /]", lambda found: "".join(f"_{byte:02X}" for byte in found[0].encode()), "/".join(parts))


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Fields by their dotted names, as text: `{'train': {'steps': 6}}` → ('train.steps', '6')."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", text[:_LONGEST_VALUE]
