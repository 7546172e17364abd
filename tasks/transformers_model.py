"""A Hugging Face model as lm-evaluation-harness wants one: log-likelihoods of continuations, and greedy text.

The harness has such a class of its own, which needs `accelerate` and normalises over padded rows of a vocabulary and in
the model's own dtype. This one needs what the project needs anyway, loads safetensors alone, counts only the
tokenizer's tokens and normalises in float32. What the harness asks for, and how it splits prompt and continuation into
tokens, is its own (`TemplateLM`).

Imports the harness; import this module within functions only.
"""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ddk.student import StudentConfig, load_student, load_tokenizer

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 32_768
"""Of one forward pass, padding included."""
LOGITS_BYTES = 2**30
"""Float32 logits that are kept of one forward pass, at most."""
ONE_THREAD_PARAMETERS = 50_000_000
"""Below, threads on a CPU wait for each other longer than they compute, and on a busy machine thirty times as long."""
STOP_TOKENS = 32
"""Generated last, in which a stop text is looked for."""


@dataclass(frozen=True, slots=True)
class _Continuation:
    """A continuation behind a context that it may share with others."""

    place: int
    """Among the requests."""
    tokens: tuple[int, ...]


class TransformersModel(TemplateLM):  # type: ignore[misc]
    """One model on one device.

    Args:
        config: which one.
        tokenizer: folder of its tokenizer.
        dtype: of the weights and the forward pass.
        device: of torch.
        field: of the configuration that names it, for messages.
        on_progress: hears how many requests were answered since its last call.

    Raises:
        UserError: the model cannot be loaded.
    """

    def __init__(
        self,
        config: StudentConfig,
        *,
        tokenizer: str,
        dtype: torch.dtype,
        device: str,
        field: str,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code)
        # Not the number of tokens: a vocabulary may have holes.
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        model: Any = load_student(config, self.vocab_size, dtype=dtype, field=field)
        self.model: Any = model.to(device)
        self.max_length = resolve_max_length(self.model.config, self.tokenizer)
        self.on_progress = on_progress
        self._device = torch.device(device)
        self._threads = torch.get_num_threads()
        if device == "cpu" and self.model.num_parameters() < ONE_THREAD_PARAMETERS:
            torch.set_num_threads(1)
        self._batch_tokens = CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def close(self) -> None:
        """Free its memory."""
        torch.set_num_threads(self._threads)
        del self.model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

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

    # ---- log-likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability, and whether it is what the model would have written."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Continuations of one token share their forward pass: the four letters of a question, say.
        groups: dict[tuple[int, ...], list[_Continuation]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            tokens = tuple(context + continuation)[-(self.max_length + 1) :]
            kept = tuple(continuation[-(len(tokens) - 1) :])
            if not kept:  # what was to be continued with became part of the context's last token
                answers[place] = (0.0, True)
                continue
            groups[tokens[:-1]].append(_Continuation(place, kept))
        for batch in self._batches(groups):
            for inputs, logprobs_LV in self._forward(batch, groups):
                for one in groups[inputs]:
                    answers[one.place] = _judged(logprobs_LV[-len(one.tokens) :], one.tokens)
            self.on_progress(sum(len(groups[inputs]) for inputs in batch))
        return answers

    def _batches(self, groups: dict[tuple[int, ...], list[_Continuation]]) -> Iterator[list[tuple[int, ...]]]:
        """Inputs of about the same length together, the longest first."""
        batch: list[tuple[int, ...]] = []
        longest = kept = 0
        for inputs in sorted(groups, key=lambda inputs: (-len(inputs), inputs)):
            longest = max(longest, len(inputs))
            # Rows are padded behind, so the positions that are kept of all reach from the first to the longest's end.
            first = min(len(inputs) - len(one.tokens) for one in groups[inputs])
            kept = max(kept, longest - first)
            rows = len(batch) + 1
            if batch and (rows * longest > self._batch_tokens or 4 * rows * kept * self.vocab_size > LOGITS_BYTES):
                yield batch
                batch, longest, kept = [], len(inputs), len(inputs) - first
            batch.append(inputs)
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(
        self, batch: list[tuple[int, ...]], groups: dict[tuple[int, ...], list[_Continuation]]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each input with the log-probabilities [≥ its longest continuation, V] at its last positions."""
        longest = max(map(len, batch))
        wanted = {inputs: max(len(one.tokens) for one in groups[inputs]) for inputs in batch}
        first = min(len(inputs) - wanted[inputs] for inputs in batch)
        # Behind a causal model's input, padding changes nothing before it.
        padded_BL = torch.tensor([[*inputs, *[0] * (longest - len(inputs))] for inputs in batch], device=self._device)
        keep = {"logits_to_keep": torch.arange(first, longest, device=self._device)} if self._keeps_logits else {}
        logits_BLV = self.model(input_ids=padded_BL, use_cache=False, **keep).logits
        if not keep:
            logits_BLV = logits_BLV[:, first:]
        for row, inputs in enumerate(batch):
            logits_LV = logits_BLV[row, len(inputs) - wanted[inputs] - first : len(inputs) - first, : self.vocab_size]
            yield inputs, logits_LV.float().log_softmax(-1)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length."""
        windows, owners = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((None, context, continuation))
                owners.append(place)
        sums = [0.0] * len(requests)
        for place, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[place] += logprob
        return sums

    # ---- text

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        for options, places, prompts in self._prompts(requests):
            for place, text in zip(places, self._generate(prompts, options), strict=True):
                texts[place] = text
            self.on_progress(len(places))
        return texts

    def _prompts(self, requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], list[int], list[list[int]]]]:
        """Requests with the same options together, prompts of about the same length, the longest first."""
        by_options: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
        options: dict[str, dict[str, Any]] = {}
        for place, request in enumerate(requests):
            prompt, asked = request.args
            normal = dict(normalize_gen_kwargs(asked))
            normal["until"] = handle_stop_sequences(list(normal["until"]), self.tokenizer.decode(self.eot_token_id))
            normal["max_gen_toks"] = room_for_text(normal["max_gen_toks"], self.max_length)
            key = repr(sorted(normal.items(), key=lambda item: item[0]))
            options[key] = normal
            tokens = self.tok_encode(prompt)[-(self.max_length - normal["max_gen_toks"]) :]
            by_options[key].append((place, tokens or [self.prefix_token_id]))
        for key, asked in by_options.items():
            ordered = sorted(asked, key=lambda one: (-len(one[1]), one[0]))
            while ordered:
                length = len(ordered[0][1]) + options[key]["max_gen_toks"]
                rows = max(1, self._batch_tokens // length)
                batch, ordered = ordered[:rows], ordered[rows:]
                yield options[key], [place for place, _ in batch], [tokens for _, tokens in batch]

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        longest = max(map(len, prompts))
        # Padded in front, so that what is generated follows each prompt at once.
        padded_BL = torch.tensor([[*[0] * (longest - len(p)), *p] for p in prompts], device=self._device)
        mask_BL = torch.tensor([[*[0] * (longest - len(p)), *[1] * len(p)] for p in prompts], device=self._device)
        sampling = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name)}
        ends = self.model.generation_config.eos_token_id
        # A configuration of its own: the model's may ask for sampling.
        settings = transformers.GenerationConfig(
            max_new_tokens=options["max_gen_toks"],
            do_sample=options["do_sample"],
            eos_token_id=self.eot_token_id if ends is None else ends,
            pad_token_id=self.eot_token_id,
            **(sampling if options["do_sample"] else {}),
        )
        written_BL = self.model.generate(
            input_ids=padded_BL,
            attention_mask=mask_BL,
            generation_config=settings,
            stopping_criteria=transformers.StoppingCriteriaList([_Stop(self.tokenizer, options["until"], longest)]),
            logits_processor=transformers.LogitsProcessorList([_OnlyTokens(self.vocab_size)]),
        )[:, longest:]
        texts = self.tokenizer.batch_decode(written_BL, skip_special_tokens=True)
        return [postprocess_generated_text(text, options["until"], None) for text in texts]


def room_for_text(wanted: int, max_length: int) -> int:
    """Tokens that are generated at most: no more than half of the model's length, so that a prompt has the other."""
    return min(wanted, max_length // 2)


def _judged(logprobs_LV: Tensor, tokens: tuple[int, ...]) -> tuple[float, bool]:
    chosen_L = torch.tensor(tokens, device=logprobs_LV.device)
    greedy = bool((logprobs_LV.argmax(-1) == chosen_L).all())
    return float(logprobs_LV.gather(-1, chosen_L[:, None]).double().sum()), greedy


class _Stop(transformers.StoppingCriteria):  # type: ignore[misc]
    """Ends each text once one of the stop texts is in it."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt_length: int) -> None:
        self._tokenizer, self._until, self._prompt_length = tokenizer, [text for text in until if text], prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        last_BL = input_ids[:, self._prompt_length :][:, -STOP_TOKENS:]
        texts = self._tokenizer.batch_decode(last_BL)
        done = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class _OnlyTokens(transformers.LogitsProcessor):  # type: ignore[misc]
    """Rows beyond the tokenizer are padding, and never generated."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._vocab_size :] = -torch.inf
        return scores
