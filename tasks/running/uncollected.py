"""Python's collection of garbage, while large libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Without collections of garbage, as they would find nothing to free among modules that are being imported.

    They take a tenth of the time that torch, transformers and Prefect need to be imported (0.7 s of 7.1 s).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
