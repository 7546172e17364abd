"""Decides which errors a user can fix. These are shown in one line, on the terminal and in the log of a run, where
Prefect would otherwise show a traceback for each task and flow that they pass through.

All other errors keep their traceback. Secrets are removed from both.
"""

from __future__ import annotations

import logging

from pydantic import ValidationError

from ddk.errors import LostPartError, UserError
from ddk.redaction import redacted
from storage.errors import explained

_OUT_OF_MEMORY = (
    "lower train.micro_batch_size or set train.activation_checkpointing where a student trains, lower "
    "teacher.max_batch_tokens where the teacher is captured, or end other programs"
)
_LOGGERS = ("prefect.task_runs", "prefect.flow_runs", "prefect.engine", "ddk")


def user_error(error: BaseException) -> UserError | None:
    """What a failure means for the person who runs this; None where it is a defect of ours."""
    if isinstance(error, UserError):
        return error
    return explained(error) or _out_of_memory(error) or _of_prefect(error)


def _out_of_memory(error: BaseException) -> UserError | None:
    said = " ".join(str(error).split())[:200]
    # By name, and by its words: torch is not imported for this, and on a CPU it has no class of its own.
    if type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "can't allocate" in said):
        return UserError(f"there is not enough memory ({said}); {_OUT_OF_MEMORY}")
    if isinstance(error, MemoryError):
        return UserError(f"there is not enough memory{f' ({said})' if said else ''}; {_OUT_OF_MEMORY}")
    return None


def _of_prefect(error: BaseException) -> UserError | None:
    """Of its settings, which it reads when it is imported, and of a server that went away later."""
    if isinstance(error, ValidationError) and error.title.endswith("Settings"):
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        # What was given is not repeated: it may hold a secret.
        return UserError(
            f"Prefect's settings are wrong: {f'{field}: ' if field else ''}{first['msg']}; correct the environment "
            f"variable (PREFECT_…) or Prefect's profile that says so"
        )
    said = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and said.startswith("Failed to reach API at"):
        return UserError(
            f"the Prefect server does not answer any more ({said}); start it and run the same command again to "
            f"resume, or unset PREFECT_API_URL"
        )
    return None


class PlainErrors(logging.Filter):
    """Takes the traceback of what a user can put right off a record; what storage says is explained instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError | LostPartError):
            record.exc_info = None
        elif error is not None and (known := user_error(error)) is not None:
            record.msg, record.args, record.exc_info = f"{record.getMessage()}: {known}", (), None
        record.msg, record.args = redacted(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
        return True


def plain_errors() -> None:
    """From now on in this process. A second call changes nothing."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, PlainErrors) for one in logger.filters):
            logger.addFilter(PlainErrors())
