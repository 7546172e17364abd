"""Corrections to lm-evaluation-harness's own models.

`tasks.evaluation.transformers_model` and `tasks.evaluation.vllm_model` are the harness's `hf` and `vllm`: tokens,
windows, log-likelihoods and generated text come from these, so that scores are comparable with those of others. This
module handles the cases in which the locked version (0.4.13) would fail or score wrongly:

- A continuation that became part of its context's last token is certain; `hf` stops at it.
- Of a continuation longer than the model, the end is judged; `hf` stops at it, and `vllm` judges some part of it.
- A context of blanks alone has no tokens, which both stop at; it becomes the token in front of a text.
- No more than half of the model's length is written, so that a prompt has the other half; both would stop where a task
  asks for as much as the model's length.
- Text is greedy unless a task asks for sampling; `vllm` samples where a task says nothing of it.
- An empty stop text stops nothing; `hf` ends at once, and vLLM refuses it.
- There is one progress line, and the harness's own bars are off.

Imports the harness; import this module within functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.utils import normalize_gen_kwargs

from ddk.errors import UserError
from ddk.student import load_tokenizer


class Asked:
    """Goes before one of the harness's models in a class's bases."""

    tokenizer: Any
    max_length: Any
    """Tokens that the model takes at most."""
    prefix_token_id: Any
    """In front of a text that has nothing before it."""
    longest_judged: int
    """Tokens of a continuation at most, behind one of context."""

    def report_to(self, on_progress: Callable[[int], None]) -> None:
        """Says from now on how many requests were answered since it last did."""
        self.cache_hook = _Progress(on_progress)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability, and whether it is what the model would have written."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts, in windows of the model's length."""
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)  # type: ignore[misc]
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """What follows each prompt, up to one of its stop texts."""
        bounded = [replace(request, arguments=self._bounded(*request.args)) for request in requests]
        texts: list[str] = super().generate_until(bounded, disable_tqdm=True)  # type: ignore[misc]
        return texts

    def _bounded(self, prompt: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A copy, with `do_sample` and the number of tokens in it."""
        normal = dict(normalize_gen_kwargs(options))
        normal["until"] = [text for text in normal["until"] if text]
        normal["max_gen_toks"] = min(normal["max_gen_toks"], self.max_length // 2)
        return prompt or str(self.tokenizer.decode(self.prefix_token_id)), normal

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        answers = [(0.0, True)] * len(requests)
        places = [place for place, (_, _, continuation) in enumerate(requests) if continuation]
        judged = super()._loglikelihood_tokens(  # type: ignore[misc]
            [self._cut(*requests[place]) for place in places], disable_tqdm=True
        )
        for place, answer in zip(places, judged, strict=True):
            answers[place] = answer
        return answers

    def _cut(self, texts: Any, context: list[int], continuation: list[int]) -> tuple[Any, list[int], list[int]]:
        context = context or [self.prefix_token_id]
        more = max(len(continuation) - self.longest_judged, 0)
        return texts, context + continuation[:more], continuation[more:]


class _Progress(CacheHook):  # type: ignore[misc]
    """The harness tells whoever keeps its answers of each of them."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        super().__init__(None)
        self._on_progress = on_progress

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._on_progress(1)


def checked_tokenizer(folder: str, *, trust_remote_code: bool) -> Any:
    """The fast tokenizer of a folder.

    Raises:
        UserError: there is none, or it has no token at which texts end.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{folder}' has no eos_token, at which texts end; set it there")
    return tokenizer
