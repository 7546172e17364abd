"""In the log of a run, a mistake of the user's is one line: Prefect would show a traceback for each task and flow that
it passes through.

What failed for another reason keeps its traceback. No secret is left in either.
"""

from __future__ import annotations

import logging

from ddk.errors import LostPartError, UserError
from ddk.redaction import redacted
from storage.errors import explained

_LOGGERS = ("prefect.task_runs", "prefect.flow_runs", "prefect.engine", "ddk")


class PlainErrors(logging.Filter):
    """Takes the traceback of what a user can put right off a record; what storage says is explained instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError | LostPartError):
            record.exc_info = None
        elif isinstance(error, Exception) and (known := explained(error)) is not None:
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
