"""A model of the harness that a vLLM engine of our own runs, by vLLM's public interface.

Of a continuation's tokens the engine is asked for their own log-probabilities and ranks alone. Padded rows of a
vocabulary are tokens to vLLM, and it takes two tokens less of a question that fills the model.

Imports the harness; import this module within functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tasks.evaluation.harness_model import HarnessModel, Prompt, Scored
from tasks.teachers.config import TeacherConfig, model_rows
from tasks.teachers.prompt_teacher import LOGITS_BYTES
from tasks.teachers.vllm_engine import Engine

AT_ONCE = 4096
"""Requests that are handed to the engine together; it batches them itself."""


class VllmModel(HarnessModel):
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
        super().__init__(tokenizer, trust_remote_code=config.trust_remote_code, on_progress=on_progress)
        # Prompt log-probabilities make the logits of a step whole, outside what the engine reserves memory for.
        step = min(config.max_batch_tokens, LOGITS_BYTES // (4 * (model_rows(config) or self.vocab_size)))
        self._engine = Engine(
            config, tokenizer=tokenizer, max_num_batched_tokens=max(128, step), logprobs_mode="raw_logprobs", seed=seed
        )
        self.max_length = int(self._engine.llm.llm_engine.model_config.max_model_len)
        self.judged_length = self.max_length - 1  # the engine wants room for one token behind the prompt

    def close(self) -> None:
        self._engine.close()

    def judge(self, asked: Sequence[Scored]) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        # 0: of each token of the prompt its own log-probability, and no other's.
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        outputs = self._run([one.tokens for one in asked], [parameters] * len(asked))
        return [_judged(output.prompt_logprobs, one) for output, one in zip(outputs, asked, strict=True)]

    def write(self, asked: Sequence[Prompt]) -> list[str]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=prompt.most, stop=list(prompt.until), **{"temperature": 0.0, **dict(prompt.sampling)}
            )
            for prompt in asked
        ]
        return [str(output.outputs[0].text) for output in self._run([prompt.tokens for prompt in asked], parameters)]

    def _run(self, prompts: Sequence[tuple[int, ...]], parameters: Sequence[Any]) -> Iterator[Any]:
        for first in range(0, len(prompts), AT_ONCE):
            batch = [{"prompt_token_ids": list(tokens)} for tokens in prompts[first : first + AT_ONCE]]
            sampling = list(parameters[first : first + AT_ONCE])
            yield from self._engine.run(partial(_generate, prompts=batch, parameters=sampling))
            self.on_progress(len(batch))


def _generate(llm: Any, prompts: list[dict[str, list[int]]], parameters: list[Any]) -> list[Any]:
    return list(llm.generate(prompts, parameters, use_tqdm=False))


def _judged(flat: Any, one: Scored) -> tuple[float, bool]:
    """From one entry a token; nothing predicts the first, which has none."""
    logprobs, ranks = flat.logprobs[-one.continuation :], flat.ranks[-one.continuation :]
    if len(flat.logprobs) != len(one.tokens) - 1:
        raise RuntimeError(f"the engine gave {len(flat.logprobs)} log-probabilities of {len(one.tokens) - 1}")
    return float(sum(logprobs)), all(rank == 1 for rank in ranks)
