"""What lm-evaluation-harness asks of a model, up to the tokens: prompts in, requests of token ids out.

The harness has classes of its own for transformers and for vLLM. The one needs `accelerate`, the other vLLM's GPU build
under that very name; both count padded rows of a vocabulary among its tokens. The classes here
(`tasks.evaluation.transformers_model`, `tasks.evaluation.vllm_model`) need what the project needs anyway and load
safetensors alone. How a prompt and its continuation are split into tokens is the harness's own (`TemplateLM`).

Imports the harness; import this module within functions only.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ddk.errors import UserError
from ddk.student import load_tokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """A context and what is to be judged behind it; together no longer than the model takes."""

    tokens: tuple[int, ...]
    continuation: int
    """How many of the last tokens are judged; at least one, and not the first."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and how it is to be continued."""

    tokens: tuple[int, ...]
    most: int
    """Tokens that are generated at most; there is room for them behind the prompt."""
    until: tuple[str, ...]
    """Ends the text, and is cut off."""
    sampling: tuple[tuple[str, Any], ...] = ()
    """temperature, top_p and top_k; none: greedily."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model as the harness takes one.

    Args:
        tokenizer: folder of its tokenizer.
        trust_remote_code: whether that folder may run code of its own.
        on_progress: hears how many requests were answered since its last call.

    Raises:
        UserError: there is no such tokenizer.
    """

    max_length: int
    """Tokens that it takes at most; set by who loads the model."""
    judged_length: int
    """Tokens of a context and its continuation together, at most."""

    def __init__(self, tokenizer: str, *, trust_remote_code: bool, on_progress: Callable[[int], None]) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of '{tokenizer}' has no eos_token, at which texts end; set it there")
        # Not the number of tokens: a vocabulary may have holes.
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.on_progress = on_progress

    @abc.abstractmethod
    def judge(self, asked: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability, and whether it is what the model would have written."""

    @abc.abstractmethod
    def write(self, asked: Sequence[Prompt]) -> list[str]:
        """What follows each prompt, up to one of its stop texts or a little further."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free its memory, and end its processes."""

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """In front of a text that has nothing before it."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = {"add_special_tokens": False}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        answers = [(0.0, True)] * len(requests)
        places, asked = [], []
        for place, (_, context, continuation) in enumerate(requests):
            if continuation:  # else what was to follow became part of the context's last token
                tokens = tuple(context + continuation)[-self.judged_length :]
                asked.append(Scored(tokens, min(len(continuation), len(tokens) - 1)))
                places.append(place)
        for place, answer in zip(places, self.judge(asked), strict=True):
            answers[place] = answer
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.judged_length - 1,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(place)
        sums = [0.0] * len(requests)
        for place, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [self._prompt(*request.args) for request in requests]
        return [
            postprocess_generated_text(text, list(prompt.until), None)
            for text, prompt in zip(self.write(asked), asked, strict=True)
        ]

    def _prompt(self, text: str, options: dict[str, Any]) -> Prompt:
        normal = normalize_gen_kwargs(options)
        # No more than half of the model's length is written, so that a prompt has the other half.
        most = min(normal["max_gen_toks"], self.max_length // 2)
        tokens = self.tok_encode(text)[-(self.max_length - most) :]
        sampling = {name: normal.get(name) for name in ("temperature", "top_p", "top_k")}
        return Prompt(
            tokens=tuple(tokens or [self.prefix_token_id]),
            most=most,
            until=tuple(handle_stop_sequences(list(normal["until"]), self.tokenizer.decode(self.eot_token_id))),
            sampling=tuple((name, value) for name, value in sampling.items() if value) if normal["do_sample"] else (),
        )
