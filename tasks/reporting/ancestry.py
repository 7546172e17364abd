"""What to say of a run that goes on from another one's checkpoint."""

from __future__ import annotations

from storage.runs.folder import RunFolder


def gone_on_from(folder: RunFolder) -> str:
    """'goes on from step 400 of run 'weekly-1', with its weights alone'; '' of a run that began with the student."""
    found = (folder.identity() or {}).get("from")
    if not isinstance(found, dict):
        return ""
    alone = "" if found.get("optimizer") else ", with its weights alone"
    return f"goes on from step {found.get('step'):,} of run '{found.get('run')}'{alone}"
