"""Base classes for the fields of stored JSON; a file with other fields is refused."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

Whole = Annotated[int, Field(ge=0, strict=True)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def first_problem(error: Exception) -> str:
    """The first thing that is wrong, in words: where, and what."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
