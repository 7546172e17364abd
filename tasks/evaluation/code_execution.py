"""pass@1 of programs that a model wrote: extracts the program from an answer, and counts those that pass their
tests."""

from __future__ import annotations

import ast
import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ddk.errors import UserError
from tasks.evaluation.sandbox import Limits, Program, run_programs
from tasks.showing.progress import logger


def program_of(task: str, question: Mapping[str, Any], answer: str) -> Program:
    """The program that an answer makes, with its question's tests."""
    if task == "humaneval":
        prompt, entry = str(question["prompt"]), str(question["entry_point"])
        return Program(
            # The answer goes on where the prompt, the head of a function, ends.
            code=f"{prompt}{answer}\n",
            tests=f"{question['test']}\ncheck({entry})\n",
            setup=_helpers(prompt),
            entries=(entry,),
        )
    tests = "\n".join([*question["test_list"], ""])
    return Program(code=f"{answer}\n", tests=tests, entries=_defined(str(question.get("code", ""))))


def _helpers(prompt: str) -> str:
    """What a prompt has besides the head at its end: imports, and functions that the tests may use."""
    for text in (f"{prompt.rstrip()}\n    pass\n", prompt):
        with contextlib.suppress(SyntaxError, ValueError):
            ast.parse(text)
            return text
    return ""


def _defined(code: str) -> tuple[str, ...]:
    """The functions and classes of a right answer, which the tests call: one of MBPP's is named `sum`."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ()
    return tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def stored(program: Program) -> dict[str, Any]:
    """As it is kept beside the answer: plain JSON data."""
    return {**asdict(program), "entries": list(program.entries)}


def read_back(kept: Any, place: str) -> Program | str:
    """What `stored` gave; a text is a program without tests.

    Raises:
        UserError: it is something else.
    """
    if isinstance(kept, str):
        return kept
    try:
        texts = {name: kept[name] for name in ("code", "tests", "setup")}
        entries = tuple(kept["entries"])
        if all(isinstance(text, str) for text in (*texts.values(), *entries)):
            return Program(**texts, entries=entries)
    except (KeyError, TypeError):
        pass
    raise UserError(f"{place} holds an answer without its program; remove it and the record beside it, and ask again")


def executed(
    programs: Sequence[Program | str], *, isolated: bool, limits: Limits | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Run the programs.

    Returns:
        pass@1 as a metric (one answer a question, so the share that passed), and how each ended.

    Raises:
        UserError: they cannot be isolated; none was run.
    """
    outcomes = run_programs(programs, limits, isolated=isolated)
    refused = [outcome.reason for outcome in outcomes if outcome.reason.startswith("refused")]
    if refused:
        raise UserError(f"{len(refused)} of {len(outcomes)} programs were not run ({refused[0]}); nothing was scored")
    passed, count = sum(outcome.passed for outcome in outcomes), len(outcomes)
    share = passed / count
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    reasons = Counter(outcome.reason for outcome in outcomes).most_common(4)
    logger.info("%d of %d programs passed (%s)", passed, count, ", ".join(f"{reason} {n}" for reason, n in reasons))
    return {"value": share, "stderr": error, "higher_is_better": True}, [outcome.reason for outcome in outcomes]
