"""Looks at what lies outside the machine: storage and the hub."""

from __future__ import annotations

import os
import socket
import time
import uuid
from urllib.parse import urlsplit

from huggingface_hub import constants

from ddk.errors import UserError
from storage.files import uri
from storage.files.root import check_root
from tasks.diagnosis.result import Found

_SKEW = 5.0
"""Seconds by which two clocks may differ: claims of a few minutes are told from abandoned ones by them."""


def storage(root: str) -> Found:
    """A round trip in the root: write, read, list, refuse to create twice, remove; and whose clock is what.

    Raises:
        UserError: the root does not answer, or refuses.
    """
    check_root(root)
    folder = uri.join(root, f".doctor-{uuid.uuid4().hex[:12]}")
    place = uri.join(folder, "probe.json")
    content = uuid.uuid4().hex.encode()
    try:
        with uri.reaching(root):
            if not uri.create_bytes(place, content):
                raise UserError(f"{place} could not be created")
            if uri.create_bytes(place, b"other"):
                return Found(
                    "fail",
                    "an object that is there was created a second time: conditional writes do not work",
                    "use a server that knows If-None-Match, as S3 and MinIO do; two captures would undo each other",
                )
            if uri.read_bytes(place) != content or uri.list_names(folder) != ["probe.json"]:
                return Found(
                    "fail", "what was written is not what is read back", "look for a cache or proxy in between"
                )
            skew = _skew(place)
    finally:
        uri.remove_tree(folder)
    kind = "a folder" if uri.is_local(root) else uri.protocol(root)
    said = f"written, read, listed, created once and removed in root ({kind})"
    if skew is not None and abs(skew) > _SKEW:
        return Found("fail", f"{said}; its clock differs by {skew:.0f} s from this machine's", "set the clocks by NTP")
    return Found("ok", said + ("" if skew is None else "; the clocks agree"))


def _skew(place: str) -> float | None:
    """Seconds by which the storage's clock is ahead; None where it does not say when something was written."""
    fs, path = uri.open_fs(place)
    try:
        modified = fs.modified(path)
    except (NotImplementedError, OSError, KeyError):
        return None
    return float(modified.timestamp() - time.time())


def hub() -> Found:
    """Whether models can be fetched by name."""
    if constants.HF_HUB_OFFLINE:
        return Found("ok", "offline (HF_HUB_OFFLINE): models are folders, or are in the hub's cache")
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=5).close()
    except OSError as error:
        return Found(
            "note",
            f"the hub cannot be reached ({error})",
            "give models as folders, or set HF_HUB_OFFLINE=1 so that nobody waits for it",
        )
    token = "with" if os.environ.get("HF_TOKEN") else "without"
    return Found("ok", f"the hub answers; {token} HF_TOKEN")
