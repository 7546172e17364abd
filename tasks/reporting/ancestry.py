"""What to say of a run that goes on from another one's checkpoint."""

from __future__ import annotations

from storage.runs.folder import RunFolder
from storage.runs.overview import came_from


def gone_on_from(folder: RunFolder) -> str:
    """'goes on from step 400 of run 'weekly-1', with its weights alone'; '' of a run that began with the student."""
    identity = folder.identity()
    origin = came_from(identity)
    if identity is None or origin is None:
        return ""
    run, step = origin
    alone = "" if identity["from"].get("optimizer") else ", with its weights alone"
    return f"goes on from step {step or 0:,} of run '{run}'{alone}"
