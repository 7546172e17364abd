"""Where the teacher's predictions come from: `teacher.source` to the object that captures them."""

from __future__ import annotations

from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher
from tasks.teachers.prompt_teacher import PortableTeacher
from tasks.teachers.server_teacher import ServerTeacher


def open_teacher(
    config: TeacherConfig, *, seq_len: int, vocab_size: int
) -> VllmTeacher | PortableTeacher | ServerTeacher:
    """The source that the configuration names, to be used in a `with`. Nothing starts before its first capture.

    Args:
        seq_len: positions in a block, L.
        vocab_size: tokens of the tokenizer.

    Raises:
        UserError: the configuration asks for what the source cannot give, or does not fit the model.
    """
    if config.source == "server":
        return ServerTeacher(config, seq_len=seq_len, vocab_size=vocab_size)
    if config.source == "prompt_logprobs":
        return PortableTeacher(config, seq_len=seq_len, vocab_size=vocab_size)
    return VllmTeacher(config, seq_len=seq_len, vocab_size=vocab_size)
