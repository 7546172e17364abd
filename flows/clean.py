"""The flow `clean`: what `ddk clean` does, as a deployment, with a table of what goes in Prefect's UI."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from flows.config import Config
from flows.stages import OPTIONS, by_sections
from flows.unneeded import OLDER, largest_first, lines_of, list_unneeded, remove_listed, total
from storage.files import uri
from tasks.showing.artifacts import add_version, artifact_key, table
from tasks.showing.formats import escape, size
from tasks.showing.progress import logger

OPTIONS |= {
    "older": "Age from which on something is removed: 12h, 30d, 4w.",
    "keep_runs": "Patterns of runs that stay as they are, with all of their checkpoints: weekly-*.",
    "remove_runs": "Patterns of runs that are removed where nothing else needs them.",
    "delete": "Remove what is listed; otherwise it is only listed.",
}

Older = Annotated[str, Field(description=OPTIONS["older"])]
KeepRuns = Annotated[list[str], Field(description=OPTIONS["keep_runs"])]
RemoveRuns = Annotated[list[str], Field(description=OPTIONS["remove_runs"])]
Delete = Annotated[bool, Field(description=OPTIONS["delete"])]


@by_sections(name="clean", flow_run_name="clean {root}")
def clean(
    config: Config,
    older: Older = OLDER,
    keep_runs: KeepRuns = [],  # noqa: B006 (Prefect reads the default, and nothing changes it)
    remove_runs: RemoveRuns = [],  # noqa: B006
    delete: Delete = False,
) -> dict[str, Any]:
    """List what of the root nothing needs, and remove it with `delete`. What the configuration needs is kept.

    Returns:
        `{"things", "bytes", "freed"}`: how much was listed, and the bytes that were freed.
    """
    listed = list_unneeded(config.root, [config], older=older, keep_runs=keep_runs, remove_runs=remove_runs)
    for line in lines_of(listed):
        logger.info("clean: %s", line.strip())
    rows = [
        {"bytes": size(part.bytes), "what": escape(part.path), "why": escape(part.why)}
        for part in largest_first(listed.parts.removable)
    ]
    freed = remove_listed(listed) if delete else 0
    done = f"{size(freed)} freed" if delete else "only listed; set delete to remove it"
    add_version(artifact_key(uri.name_of(config.root), "clean"), "table", table(rows), f"{total(listed)}: {done}")
    logger.info("clean: %s: %s", total(listed), done)
    return {"things": len(listed.parts.removable), "bytes": listed.bytes, "freed": freed}
