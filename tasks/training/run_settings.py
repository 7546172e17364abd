"""What determines a run's training besides its stores."""

from __future__ import annotations

from dataclasses import dataclass

from ddk.methods.registry import MethodName
from ddk.mixture import MixtureConfig
from ddk.train_config import LossConfig, StudentConfig, TedConfig, TrainConfig
from tasks.training.tracking.config import TrackingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Everything that a run's training is determined by, besides its stores."""

    root: str
    run: str
    method: MethodName
    seed: int
    student: StudentConfig
    loss: LossConfig
    train: TrainConfig
    mixture: MixtureConfig
    ted: TedConfig
    tracking: TrackingConfig
    trust_teacher_code: bool
    """`teacher.trust_remote_code`, for a method that loads the live teacher."""
