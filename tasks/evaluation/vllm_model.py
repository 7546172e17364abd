"""The harness's own `vllm`, with DDK's engine in place of vLLM's `LLM`.

The harness would start its engine within its constructor: without the settings that the engine needs on a CPU, without
noticing if one of its processes is killed, and without ending these processes when this one is killed.
`tasks.teachers.vllm_engine` does all this, so the constructor is given an engine that is already running. The rest is
the harness's code.

Imports the harness and vLLM; import this module within functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from tasks.evaluation.harness_imports import vllm_by_that_name
from tasks.evaluation.harness_model import Asked, checked_tokenizer
from tasks.teachers.config import TeacherConfig, model_rows
from tasks.teachers.prompt_teacher import LOGITS_BYTES
from tasks.teachers.vllm_engine import Engine

with vllm_by_that_name():
    from lm_eval.models import vllm_causallms

AT_ONCE = 4096
"""Requests that are handed to the engine together; it batches them itself."""


class VllmModel(Asked, vllm_causallms.VLLM):  # type: ignore[misc]
    """An engine that lives until `close`, or until this process ends, however that happens.

    Args:
        config: what to run.
        tokenizer: folder of its tokenizer.
        seed: of the engine.
        on_progress: hears how many requests were answered since its last call.

    Raises:
        UserError: there is no such model.
    """

    def __init__(self, config: TeacherConfig, *, tokenizer: str, seed: int, on_progress: Callable[[int], None]) -> None:
        checked = checked_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code)
        # Prompt log-probabilities make the logits of a step whole, outside what the engine reserves memory for.
        step = LOGITS_BYTES // (4 * (model_rows(config) or len(checked)))
        self._engine = Engine(
            config,
            tokenizer=tokenizer,
            max_num_batched_tokens=max(128, min(config.max_batch_tokens, step)),
            logprobs_mode="raw_logprobs",
            seed=seed,
        )
        try:
            with _in_place_of_llm(_Running(self._engine)):
                super().__init__(
                    config.model,
                    revision=config.revision,
                    trust_remote_code=config.trust_remote_code,
                    tokenizer=tokenizer,
                    batch_size=AT_ONCE,
                    seed=seed,
                )
        except BaseException:
            self.close()
            raise
        self.longest_judged = self.max_length - 2  # the engine wants room for one token behind the prompt
        self.report_to(on_progress)

    def close(self) -> None:
        """End the engine's processes and free its memory."""
        self._engine.close()


class _Running:
    """What the harness asks of vLLM's `LLM`, of an engine whose death is noticed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def llm_engine(self) -> Any:
        return self._engine.llm.llm_engine

    def generate(self, prompts: Any, **settings: Any) -> Any:
        return self._engine.run(partial(_generate, prompts=prompts, settings=settings))


def _generate(llm: Any, prompts: Any, settings: dict[str, Any]) -> Any:
    return llm.generate(prompts, **settings)


@contextmanager
def _in_place_of_llm(running: _Running) -> Iterator[None]:
    """Within, the harness's constructor starts no engine and takes this one."""
    start = vllm_causallms.LLM
    vllm_causallms.LLM = lambda **_: running
    try:
        yield
    finally:
        vllm_causallms.LLM = start
