"""Errors that a user can fix, each in one line with the cause, the place and the remedy.

The `ddk` command prints such an error without a traceback and exits with 2. If a process was killed or a server is
gone, which is nobody's mistake, the command also prints one line, but exits with 1. Any other exception is a bug (or a
fault of the machine) and keeps its traceback.
"""

from ddk.redaction import redacted


class UserError(ValueError):
    """Something that the person who runs the project can put right.

    The message names the cause, the place (file and line, field, URL) and the remedy; no secret is left in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class LostPartError(RuntimeError):
    """A process, or a server, that the work rests on is gone.

    The message names it, what has probably happened, and the remedy. What was complete is kept.
    """


def first_line(error: BaseException) -> str:
    """What an error says, in short: its first line, or what kind it is where it says nothing."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__
