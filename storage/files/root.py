"""Checks whether a place can serve as the root, before anything is written there."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

import fsspec

from ddk.errors import UserError
from storage.files import uri

_READ_ONLY = {"http", "https", "data", "git", "github", "jupyter", "zip", "tar", "libarchive"}
_WITH_BUCKET = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "r2"}
_ONE_SLASH = re.compile(r"(^|/)(s3a?|gs|gcs|az|abfss?|https?|file):(/|$)")
_INSTEAD = "name a folder, or s3://bucket/prefix"


def check_root(root: str) -> None:
    """Check a root by its name only.

    Raises:
        UserError: it is empty, of no protocol that can be written to, or names no bucket.
    """
    if not root.strip():
        raise UserError(f"it is empty; {_INSTEAD}")
    protocol = uri.protocol(root)
    if not protocol:
        if found := _ONE_SLASH.search(root):
            raise UserError(f"{found[2]}:/ is taken for a folder; write {found[2]}://, with two slashes")
        return
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise UserError(f"there is no protocol '{protocol}://'; {_INSTEAD}") from None
    except ImportError as error:
        raise UserError(f"{protocol}:// needs a package that is not installed ({error}); {_INSTEAD}") from None
    if protocol == "memory":
        raise UserError(f"what is stored in memory:// is gone when the command ends; {_INSTEAD}")
    if protocol in _READ_ONLY:
        raise UserError(f"nothing can be written to {protocol}://; {_INSTEAD}")
    if protocol in _WITH_BUCKET and not urlsplit(root).netloc:
        raise UserError(f"{protocol}:// names no bucket; write {protocol}://bucket/prefix")


def make_root(root: str) -> None:
    """Make the folder, where it is a local one and not there yet.

    Raises:
        UserError: it is a file, or cannot be made.
    """
    if not uri.is_local(root):
        return
    path = uri.open_fs(root)[1]
    try:
        os.makedirs(path, exist_ok=True)
    except FileExistsError:
        raise UserError(f"root: {root} is a file, or a link to nothing; name a folder") from None
    except NotADirectoryError:
        raise UserError(f"root: {root} lies below a file; name a folder") from None
    except OSError as error:
        raise UserError(
            f"root: the folder {root} cannot be made ({error.strerror}); name another, or make it"
        ) from None
