"""How a domain's blocks, or its records, are chosen: the part `select` of a domain's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ddk.section import Section

Keep = Annotated[float, Field(gt=0.0, le=1.0)]


class ByDifference(Section):
    """Keep the blocks on which a reference lags the teacher most (MiniPLM's difference sampling)."""

    by: Literal["difference"]
    """Way of choosing: by the difference of a reference's loss and the teacher's."""
    keep: Keep = 0.5
    """Share of the domain's train blocks to keep."""
    reference: str | None = Field(default=None, min_length=1)
    """Model whose losses are compared with the teacher's: a folder or a name on the hub. Default: the student before
    training."""


class ByTrajectory(Section):
    """Cluster the blocks by how their losses fall over a finished run, and draw from all clusters (S2L)."""

    by: Literal["trajectory"]
    """Way of choosing: by how a block's loss falls over a run."""
    keep: Keep = 0.5
    """Share of the domain's train blocks to keep."""
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Finished run of the same root whose kept checkpoints (train.keep_checkpoints) give the losses."""
    clusters: int = Field(default=100, ge=2, le=10**5)
    """Number of clusters of k-means."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of k-means and of the draw."""


class ByField(Section):
    """Keep the records in which a field is large enough; decided when the domain is packed."""

    by: Literal["field"]
    """Way of choosing: by a number that each record carries."""
    field: str = Field(min_length=1)
    """Name of a JSON field or Parquet column that holds a number, such as a quality score."""
    at_least: float
    """Smallest number that is kept."""


def _kind(value: Any) -> Any:
    """`by` of a section, as it was written or parsed."""
    return value.get("by") if isinstance(value, Mapping) else getattr(value, "by", None)


Select = Annotated[
    Annotated[ByDifference, Tag("difference")]
    | Annotated[ByTrajectory, Tag("trajectory")]
    | Annotated[ByField, Tag("field")],
    Discriminator(
        _kind, custom_error_type="select", custom_error_message="by must be 'difference', 'trajectory' or 'field'"
    ),
]
BlockSelect = ByDifference | ByTrajectory
