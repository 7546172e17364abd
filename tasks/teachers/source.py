"""What every source of the teacher's predictions shares: it fits the configuration, and it ends with its `with`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

from tasks.teachers.config import TeacherConfig, check_fits, check_source_gives


class TeacherSource(ABC):
    """Nothing starts before the first capture: where everything is captured already, no engine or server is needed.

    Args:
        config: what to run.
        seq_len: positions in a block, L.
        vocab_size: tokens of the tokenizer.

    Raises:
        UserError: the configuration asks for what this source cannot give, or does not fit the model.
    """

    name: ClassVar[str]
    """As `teacher.source` names it."""

    def __init__(self, config: TeacherConfig, *, seq_len: int, vocab_size: int) -> None:
        check_source_gives(config, self.name)
        check_fits(config, seq_len=seq_len, vocab_size=vocab_size)
        self.config = config
        self.seq_len = seq_len
        self.vocab_size = vocab_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of what was started. Harmless when called twice."""
