"""The base class of all sections of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

MOST_STEPS = 10**9
"""Of anything that is counted in steps."""


class Section(BaseModel):
    """A part of the configuration, checked as a whole: unknown fields, infinite numbers and `true` where a number is
    meant are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_seems(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(part, str) and "\0" in part for part in parts):
            raise ValueError("it holds a NUL character")
        if any(isinstance(part, bool) for part in parts) and info.field_name is not None:
            kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
            # To pydantic, True is 1.
            if kinds & {int, float} and bool not in kinds:
                raise ValueError("it must be a number, not true or false")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """All types that stand in an annotation."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif parts := get_args(annotation):
        for part in parts:
            yield from _kinds(part)
    else:
        yield annotation
