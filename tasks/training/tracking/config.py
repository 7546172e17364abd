"""Where a run's metrics go besides its own files, as a configuration says it; `trackers` sends them there."""

from __future__ import annotations

import importlib.util
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from ddk.section import Section


class TrackingConfig(Section):
    """Where metrics are sent besides the run's own files. Keys and passwords come only from the environment."""

    tensorboard: bool = True
    """Whether to write the folder `tensorboard` in the run, for `tensorboard --logdir <root>/runs`."""
    wandb_project: str | None = Field(default=None, min_length=1)
    """Project at Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`. Needs the extra `wandb`. If
    empty, nothing is sent there."""
    wandb_entity: str | None = Field(default=None, min_length=1)
    """Team or user that owns the project. If empty, the default entity of the key."""
    mlflow_experiment: str | None = Field(default=None, min_length=1)
    """Experiment in MLflow; it is created if it does not exist. Needs the extra `mlflow`. If empty, nothing is sent
    there."""
    mlflow_uri: str | None = Field(default=None, min_length=1)
    """MLflow's server (https://…) or database (sqlite:////path). If empty, MLFLOW_TRACKING_URI. A token or password
    comes from MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    @model_validator(mode="after")
    def _is_complete(self) -> TrackingConfig:
        if self.wandb_entity is not None and self.wandb_project is None:
            raise ValueError("wandb_entity is set, and wandb_project is not; name a project, or leave both out")
        if self.mlflow_uri is not None:
            _check_uri(self.mlflow_uri)
            if self.mlflow_experiment is None:
                raise ValueError("mlflow_uri is set, and mlflow_experiment is not; name one, or leave both out")
        return self

    @model_validator(mode="after")
    def _packages_are_here(self) -> TrackingConfig:
        # Here, and not where they are imported: a run must not find out after hours of capture.
        for field, package in (("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")):
            if getattr(self, field) is not None and not _is_installed(package):
                raise ValueError(
                    f"{field} is set, and the package {package} is not installed; install the extra "
                    f"(pip install 'ddk-distill[{package}]'), or leave {field} out"
                )
        return self


def _check_uri(uri: str) -> None:
    parts = urlsplit(uri)
    if parts.username is not None or parts.password is not None or parts.query:
        # Not repeated here: it may hold a secret.
        raise ValueError("mlflow_uri must hold no credentials and no query; set MLFLOW_TRACKING_TOKEN instead")
    if not parts.scheme or (parts.scheme == "sqlite" and not uri.startswith("sqlite:////")):
        raise ValueError(f"mlflow_uri is '{uri}'; it must look like https://host or sqlite:////folder/mlflow.db")


def _is_installed(package: str) -> bool:
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None  # a mere folder `wandb` here is no package
