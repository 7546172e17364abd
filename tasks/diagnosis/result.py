"""What a check of the machine or of a configuration found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ddk.errors import UserError, first_line

State = Literal["ok", "note", "fail"]
"""'note': it works, and there is something to know."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one check has to say."""

    state: State
    said: str
    remedy: str = ""
    """What to do; empty where there is nothing to be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A check that was made."""

    name: str
    state: State
    said: str
    remedy: str
    seconds: float
    private: bool = False
    """Whether what it says may name files, buckets or servers of the user's."""

    def as_json(self) -> dict[str, Any]:
        """Plain data that can be shown to anybody."""
        plain = asdict(self)
        if plain.pop("private"):
            plain["said"] = plain["remedy"] = "left out: it may name files, buckets or servers"
        return plain


def check(name: str, look: Callable[[], Found], *, private: bool = False) -> Check:
    """Make a check. Whatever it raises is a failure, and never this program's end."""
    started = time.perf_counter()
    try:
        found = look()
    except UserError as error:
        found = Found("fail", str(error))
    except Exception as error:  # of drivers and libraries, which is what is looked for
        found = Found(
            "fail",
            f"{type(error).__name__}: {first_line(error)}",
            "look this message up in docs/troubleshooting.md, or report it with the output of `ddk doctor --json`",
        )
    seconds = round(time.perf_counter() - started, 2)
    return Check(name=name, state=found.state, said=found.said, remedy=found.remedy, seconds=seconds, private=private)
