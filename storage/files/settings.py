"""The options with which a file system is opened: endpoint, credentials, region and the like.

They come from the environment: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_REGION and everything else that
AWS's tools read, or FSSPEC_S3_KEY, FSSPEC_S3_ENDPOINT_URL and so on. `use_options` sets options that take precedence,
for the whole process and every later call. They apply to Zarr's stores and chained URLs too, since they are kept where
fsspec keeps its own defaults. Options never appear in a configuration, a log or a message.
"""

from __future__ import annotations

import functools
import inspect
import json
import threading
from collections.abc import Mapping
from typing import Any

import fsspec
import fsspec.config

from ddk.redaction import hide
from storage.errors import StoreError

_environment: dict[str, dict[str, Any]] = {}
"""What the environment says of each protocol for which there are other options."""
_lock = threading.Lock()
_SECRET = {"key", "secret", "token", "username", "password", "account_key", "sas_token", "connection_string"}


@functools.cache
def prepare_s3() -> None:
    """Register `storage.files.s3.S3` for `s3://` in this process."""
    from storage.files.s3 import S3  # heavy, and not needed by whoever stays on a disk

    for protocol in S3.protocol:
        fsspec.register_implementation(protocol, S3, clobber=True)


def use_options(protocol: str, options: Mapping[str, Any]) -> None:
    """Open file systems of this protocol with these options, in place of those of an earlier call.

    Args:
        protocol: e.g. 's3'.
        options: of fsspec's file system; for s3 those of s3fs (key, secret, token, endpoint_url, profile,
            client_kwargs, …). What is not among them comes from the environment; none at all: all of it.

    Raises:
        StoreError: an option that s3 does not have; it is named.
    """
    if protocol in ("s3", "s3a"):
        _check_s3(options)
    hide(*(value for name, value in options.items() if name in _SECRET))
    conf: dict[str, dict[str, Any]] = fsspec.config.conf
    with _lock:
        environment = _environment.setdefault(protocol, dict(conf.get(protocol, {})))
        conf[protocol] = {**environment, **options}


def as_environment() -> dict[str, str]:
    """Variables that give a process that is started with them the options of `use_options`.

    They hold secrets: for a child's environment, and nowhere else.
    """
    with _lock:
        return {f"FSSPEC_{name.upper()}": json.dumps(fsspec.config.conf[name]) for name in _environment}


def _check_s3(options: Mapping[str, Any]) -> None:
    import s3fs

    parameters = set(inspect.signature(s3fs.S3FileSystem.__init__).parameters)
    known = parameters - {"self", "kwargs", "session", "asynchronous", "loop"} | {"profile"}
    if unknown := sorted(set(options) - known):
        raise StoreError(f"s3 has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
