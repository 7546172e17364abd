"""What a run's report says of the blocks that were chosen for it: how many of how many, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage.corpus.record_paths import store_name
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.fields import Whole, first_problem
from storage.files.names import plain_name
from storage.runs.folder import RunFolder
from storage.stores.manifest import read_manifest


class _Facts(BaseModel):
    """What the store of a selection says of it."""

    model_config = ConfigDict(frozen=True)

    blocks: Whole
    edges: tuple[float, ...] = Field(min_length=2)
    all: tuple[Whole, ...]
    kept: tuple[Whole, ...]

    @model_validator(mode="after")
    def _fit_together(self) -> _Facts:
        if not len(self.edges) - 1 == len(self.all) == len(self.kept):
            raise ValueError("its histogram's edges and counts differ in number")
        return self


def selections_of(folder: RunFolder) -> tuple[Mapping[str, Any], ...]:
    """For each domain whose blocks were chosen: `domain`, `blocks`, `chosen`, and the histogram `edges`, `all`, `kept`.

    A store that is gone is left out; the run was trained on it all the same.

    Raises:
        StoreDamagedError: a store's manifest is not what was written.
    """
    identity = folder.identity() or {}
    return tuple(_selections(folder, identity.get("stores", {})))


def _selections(folder: RunFolder, stores: Mapping[str, Mapping[str, str]]) -> Iterator[Mapping[str, Any]]:
    root = folder.url.rpartition("/runs/")[0]
    for domain, of in stores.items():
        if "selections" not in of:
            continue
        name = plain_name(of["selections"], f"identity.json of run '{folder.name}'")
        url = uri.join(root, "selections", name, store_name(domain))
        manifest = read_manifest(url)
        if manifest is None or not manifest.complete:
            continue
        try:
            facts = _Facts.model_validate(manifest.facts)
        except ValidationError as error:
            raise StoreDamagedError(
                f"{url}: its facts are not what was written ({first_problem(error)}); remove it and run `ddk select` "
                f"again"
            ) from None
        yield {"domain": domain, "chosen": manifest.splits["train"].blocks, **facts.model_dump()}
