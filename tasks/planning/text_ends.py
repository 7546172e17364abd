"""Decides which tokens documents begin and end with in the blocks: the teacher's BOS and the student's EOS.

The teacher's predictions are meaningful only on sequences like those of its training, so BOS is taken from its
tokenizer. A student stops at the token that it saw at the ends of documents, so EOS is the token at which the student's
own files say that it stops; that of a chat teacher, `<|im_end|>`, may be another. Students with the same EOS share
blocks and targets.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.student import load_tokenizer
from ddk.train_config import StudentConfig
from tasks.planning.models import local_folder
from tasks.planning.tokenizer_files import has_tokenizer
from tasks.showing.progress import logger


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEnds:
    """What documents begin and end with."""

    bos_ids: tuple[int, ...]
    """Before each document, and before the rest of one in a block that begins within it."""
    eos_id: int
    """Behind each document."""
    said: str
    """Both for people, where they are not what everybody expects; else empty."""
    warning: str = ""
    """Why a student might not stop at `eos_id`; empty where it does."""


def say_ends(stage: str, ends: TextEnds | None) -> None:
    """Log what documents begin and end with, where that is not what everybody expects."""
    if ends is not None and ends.said:
        logger.info("%s: documents %s", stage, ends.said)
    if ends is not None and ends.warning:
        logger.warning("%s: %s", stage, ends.warning)


def text_ends(packing: PackingConfig, teacher: Any, student: StudentConfig | None) -> TextEnds:
    """Resolve `packing.bos` and `packing.eos`.

    Args:
        teacher: the tokenizer whose ids the blocks hold.
        student: who reads the blocks; None where that is not known: then the teacher's EOS is taken.

    Raises:
        UserError: the tokenizer has no such token.
    """
    folder, absent = None, None
    if student is not None and packing.eos is None:
        try:
            folder = local_folder(student.model, student.revision, "student.model", weights=False)
        except UserError as error:  # blocks and targets can be made before there is a student
            absent = str(error)
    own = None
    if student is not None and folder is not None and has_tokenizer(folder):
        own = load_tokenizer(folder, trust_remote_code=student.trust_remote_code)
    bos_ids = _bos(packing, teacher)
    stops = [] if folder is None else _stops(folder)
    eos_id, whose = _eos(packing, teacher, own, stops)
    said = []
    if bos_ids:
        said.append(f"begin with {_shown(teacher, bos_ids)}, and so does each block")
    if eos_id != teacher.eos_token_id:
        of_teacher = "none" if teacher.eos_token_id is None else _shown(teacher, [teacher.eos_token_id])
        said.append(f"end with {_shown(teacher, [eos_id])}, {whose} (the teacher's end of text is {of_teacher})")
    warning, end = "", f"documents end with {_shown(teacher, [eos_id])}"
    if stops and eos_id not in stops:
        warning = (
            f"{end}, and by its generation_config.json the student stops at {_shown(teacher, stops)}: it would "
            f"continue after the end of a document; correct that file, or set packing.eos"
        )
    elif absent is not None:
        warning = (
            f"{end}, the teacher's end of text, which may differ from the student's ({absent}), or set packing.eos"
        )
    return TextEnds(bos_ids=bos_ids, eos_id=eos_id, said=" and ".join(said), warning=warning)


def ends_of_rows(tokenizer: Any) -> TextEnds:
    """Of rows of tokens that are read as they are; −1, which is no token, where the tokenizer has no EOS."""
    eos_id = tokenizer.eos_token_id
    return TextEnds(bos_ids=(), eos_id=-1 if eos_id is None else int(eos_id), said="")


def _bos(packing: PackingConfig, tokenizer: Any) -> tuple[int, ...]:
    if packing.bos == "never":
        return ()
    if found := _prefix(tokenizer):
        return found
    if packing.bos == "auto":
        return ()
    if tokenizer.bos_token_id is None:
        raise UserError(
            "packing.bos is 'always', and the teacher's tokenizer has no bos_token; set it in its "
            "tokenizer_config.json, or packing.bos: auto"
        )
    return (int(tokenizer.bos_token_id),)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every text. What it puts behind one is not taken: that is `packing.eos`'s."""
    bare, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(whole) - len(bare) + 1 if bare else 0):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    begins_with_it = bool(whole) and whole[0] == tokenizer.bos_token_id  # and the text is split otherwise behind it
    return (int(whole[0]),) if begins_with_it else ()


def _eos(packing: PackingConfig, teacher: Any, own: Any, stops: list[int]) -> tuple[int, str]:
    """The id, and whose it is."""
    vocabulary = teacher.get_vocab()
    if packing.eos is not None:
        if packing.eos not in vocabulary:
            example = "" if teacher.eos_token is None else f"; its own end of text is {teacher.eos_token!r}"
            raise UserError(f"packing.eos is {packing.eos!r}, which is no token of the teacher's tokenizer{example}")
        return int(vocabulary[packing.eos]), "as packing.eos says"
    if own is not None and own.eos_token_id is not None:
        # A pair whose ids differ is refused by who compares the tokenizers; here they would only be misread.
        shared = vocabulary.get(own.eos_token) == own.eos_token_id
        return (int(own.eos_token_id), "the student's") if shared else (_teachers(teacher), "the teacher's")
    if stops and (teacher.eos_token_id not in stops):
        return stops[0], "the student's"
    return _teachers(teacher), "the teacher's"


def _teachers(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    if stops := _stops(tokenizer.name_or_path):
        return stops[0]
    raise UserError(
        f"the tokenizer of '{tokenizer.name_or_path}' has no eos_token, which ends documents; name the token "
        f"(packing.eos), or set it in tokenizer_config.json"
    )


def _stops(folder: str) -> list[int]:
    """Where a model stops writing, the most usual first: by its generation_config.json, else by its config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                found = json.load(file).get("eos_token_id")
        except (OSError, ValueError, AttributeError):  # who loads the model says what is wrong with it
            continue
        ids = found if isinstance(found, list) else [found]
        if stops := [one for one in ids if isinstance(one, int)]:
            return stops
    return []


def _shown(tokenizer: Any, ids: Any) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(int(one))} ({one})" for one in ids)
