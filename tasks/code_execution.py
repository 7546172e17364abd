"""pass@1 of programs that a model wrote: which program an answer makes, and how many of them pass their tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ddk.errors import UserError
from tasks.progress import logger
from tasks.sandbox import Limits, run_programs


def program_of(task: str, question: Mapping[str, Any], answer: str) -> str:
    """The program that shows whether an answer is right: it ends without an exception then."""
    if task == "humaneval":
        # The answer goes on where the prompt, the head of a function, ends.
        return f"{question['prompt']}{answer}\n{question['test']}\ncheck({question['entry_point']})\n"
    return "\n".join([answer, *question["test_list"], ""])


def executed(
    programs: Sequence[str], *, isolated: bool, limits: Limits | None = None
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
