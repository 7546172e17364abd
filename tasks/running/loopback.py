"""Requests to this machine bypass any proxy that the environment names for outside addresses: requests to a run's own
Prefect server, to a teacher's server on localhost, or to a local S3 server."""

from __future__ import annotations

import os

_OWN = ("127.0.0.1", "localhost", "::1")


def loopback_past_proxies() -> None:
    """From now on in this process and those that it starts. A second call changes nothing."""
    names = ("no_proxy", "NO_PROXY")  # some read the one, some the other
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    for name in names:
        hosts = given.get(name) or next(iter(given.values()), "")
        listed = [host.strip() for host in hosts.split(",") if host.strip()]
        if "*" not in listed:
            os.environ[name] = ",".join([*listed, *(host for host in _OWN if host not in listed)])
