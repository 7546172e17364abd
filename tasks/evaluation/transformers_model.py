"""A model of the harness that transformers runs, on one device.

Continuations that share all but their last token share their forward pass (the letters of a question, say), only the
tokenizer's tokens count, and everything is normalised in float32.

Imports the harness; import this module within functions only.
"""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from lm_eval.models.utils import resolve_max_length
from torch import Tensor

from ddk.student import head_rows, load_student
from ddk.train_config import StudentConfig
from tasks.evaluation.harness_model import HarnessModel, Prompt, Scored
from tasks.planning.store_plan import vocabulary

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 32_768
"""Of one forward pass, padding included."""
LOGITS_BYTES = 2**30
"""Float32 logits that are kept of one forward pass, at most."""
ONE_THREAD_PARAMETERS = 50_000_000
"""Below, threads on a CPU wait for each other longer than they compute, and on a busy machine thirty times as long."""
STOP_TOKENS = 32
"""Generated last, in which a stop text is looked for."""

Inputs = tuple[int, ...]


class TransformersModel(HarnessModel):
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
        super().__init__(tokenizer, trust_remote_code=config.trust_remote_code, on_progress=on_progress)
        model: Any = load_student(config, vocabulary(self.tokenizer)[1], dtype=dtype, field=field)
        # The tokenizer may have added tokens at its end that the model has no rows for, and no text becomes.
        self.vocab_size = min(self.vocab_size, head_rows(model) or self.vocab_size)
        self.model: Any = model.to(device)
        self.max_length = resolve_max_length(self.model.config, self.tokenizer)
        self.judged_length = self.max_length + 1  # nothing is predicted from the last token
        self._device = torch.device(device)
        self._threads = torch.get_num_threads()
        if device == "cpu" and self.model.num_parameters() < ONE_THREAD_PARAMETERS:
            torch.set_num_threads(1)
        self._batch_tokens = CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def close(self) -> None:
        torch.set_num_threads(self._threads)
        del self.model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- log-likelihoods

    def judge(self, asked: Sequence[Scored]) -> list[tuple[float, bool]]:
        answers = [(0.0, False)] * len(asked)
        sharing: dict[Inputs, list[int]] = defaultdict(list)
        for place, one in enumerate(asked):
            sharing[one.tokens[:-1]].append(place)
        longest = {inputs: max(asked[place].continuation for place in places) for inputs, places in sharing.items()}
        for batch in self._batches(longest):
            for inputs, logprobs_LV in self._forward(batch, longest):
                for place in sharing[inputs]:
                    tokens = asked[place].tokens[-asked[place].continuation :]
                    answers[place] = _judged(logprobs_LV[-len(tokens) :], tokens)
            self.on_progress(sum(len(sharing[inputs]) for inputs in batch))
        return answers

    def _batches(self, continuations: dict[Inputs, int]) -> Iterator[list[Inputs]]:
        """Inputs of about the same length together, the longest first."""
        batch: list[Inputs] = []
        kept = 0
        for inputs in sorted(continuations, key=lambda inputs: (-len(inputs), inputs)):
            longest = len(batch[0]) if batch else len(inputs)
            # Padding stands behind, so of all rows those positions are kept that reach from the first to the last.
            more = max(kept, longest - len(inputs) + continuations[inputs])
            rows = len(batch) + 1
            if batch and (rows * longest > self._batch_tokens or 4 * rows * more * self.vocab_size > LOGITS_BYTES):
                yield batch
                batch, more = [], continuations[inputs]
            batch.append(inputs)
            kept = more
        if batch:
            yield batch

    @torch.no_grad()
    def _forward(self, batch: list[Inputs], continuations: dict[Inputs, int]) -> Iterator[tuple[Inputs, Tensor]]:
        """Each input with the log-probabilities [its longest continuation, V] at its last positions."""
        longest = len(batch[0])
        first = min(len(inputs) - continuations[inputs] for inputs in batch)
        # Behind a causal model's input, padding changes nothing before it.
        padded_BL = torch.tensor([[*inputs, *[0] * (longest - len(inputs))] for inputs in batch], device=self._device)
        keep = {"logits_to_keep": torch.arange(first, longest, device=self._device)} if self._keeps_logits else {}
        logits_BLV = self.model(input_ids=padded_BL, use_cache=False, **keep).logits
        if not keep:
            logits_BLV = logits_BLV[:, first:]
        for row, inputs in enumerate(batch):
            end = len(inputs) - first
            logits_LV = logits_BLV[row, end - continuations[inputs] : end, : self.vocab_size]
            yield inputs, logits_LV.float().log_softmax(-1)

    # ---- text

    def write(self, asked: Sequence[Prompt]) -> list[str]:
        texts = [""] * len(asked)
        for places in self._alike(asked):
            for place, text in zip(places, self._generate([asked[place] for place in places]), strict=True):
                texts[place] = text
            self.on_progress(len(places))
        return texts

    def _alike(self, asked: Sequence[Prompt]) -> Iterator[list[int]]:
        """Prompts with the same options and of about the same length together, the longest first."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for place, prompt in enumerate(asked):
            groups[prompt.most, prompt.until, prompt.sampling].append(place)
        for (most, _, _), places in groups.items():
            left = sorted(places, key=lambda place: (-len(asked[place].tokens), place))
            while left:
                rows = max(1, self._batch_tokens // (len(asked[left[0]].tokens) + most))
                yield left[:rows]
                left = left[rows:]

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        longest = max(len(prompt.tokens) for prompt in prompts)
        gaps = [longest - len(prompt.tokens) for prompt in prompts]
        # Padded in front, so that what is generated follows each prompt at once.
        rows = [[*[0] * gap, *prompt.tokens] for gap, prompt in zip(gaps, prompts, strict=True)]
        mask = [[*[0] * gap, *[1] * (longest - gap)] for gap in gaps]
        first = prompts[0]
        ends = self.model.generation_config.eos_token_id
        # A configuration of its own: the model's may ask for sampling.
        settings = transformers.GenerationConfig(
            max_new_tokens=first.most,
            do_sample=bool(first.sampling),
            eos_token_id=self.eot_token_id if ends is None else ends,
            pad_token_id=self.eot_token_id,
            **dict(first.sampling),
        )
        written_BL = self.model.generate(
            input_ids=torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            generation_config=settings,
            stopping_criteria=transformers.StoppingCriteriaList([_Stop(self.tokenizer, first.until, longest)]),
            logits_processor=transformers.LogitsProcessorList([_OnlyTokens(self.vocab_size)]),
        )[:, longest:]
        return list(self.tokenizer.batch_decode(written_BL, skip_special_tokens=True))


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
