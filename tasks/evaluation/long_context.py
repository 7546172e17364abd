"""Measures a model on long inputs, for `ddk eval --context`: perplexity by position, and passkeys found.

Records are kept beside those of the benchmarks, one a domain and one for all passkeys; what was measured before is not
measured again. Models are run by transformers, one sequence at a time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from ddk.cost.shape import longest_input
from ddk.errors import UserError
from ddk.long_context import LongReader, mean_perplexity, position_edges
from ddk.packing import PackingConfig
from ddk.student import head_rows, load_config, load_student, load_tokenizer
from ddk.train_config import StudentConfig
from storage.corpus.domain import DomainConfig
from storage.fingerprint import fingerprint
from storage.runs.evaluations import CONTEXT_KIND, EvaluationFolder, record_name
from tasks.evaluation.long_texts import Encode, LongSequences, Passkey, long_sequences, passkeys
from tasks.evaluation.models import EvaluatedModel
from tasks.evaluation.names import EvaluationConfig
from tasks.evaluation.validation_texts import ValidationTexts
from tasks.planning.models import local_folder
from tasks.planning.store_plan import vocabulary
from tasks.planning.text_ends import text_ends
from tasks.showing.progress import logger, meter
from tasks.teachers.config import TeacherConfig, on_gpu

DOCUMENTS = 2_000
"""Of a domain, among which long ones are looked for."""
PASSKEY = "passkey"
_VERSION = 1
"""Of how models are measured; raised where the same model would give other figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongInputs:
    """What every model is given."""

    trained: int
    """Length that the student knew before the training, in whose multiples lengths are counted."""
    sequences: Mapping[str, LongSequences]
    """By domain."""
    passkeys: Mapping[int, Sequence[Passkey]]
    """By length."""
    vocab_size: int
    """Tokens of the tokenizer."""
    least_rows: int
    """Rows without which a model cannot predict whatever a text becomes."""

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return max([*(int(one.tokens_NL1.shape[1]) - 1 for one in self.sequences.values()), *self.passkeys])


def long_inputs(
    texts: ValidationTexts,
    domains: Mapping[str, DomainConfig],
    config: EvaluationConfig,
    *,
    student: StudentConfig,
    teacher: TeacherConfig,
    packing: PackingConfig,
    encoder: Callable[[Any, bool], Encode],
) -> LongInputs:
    """The sequences of all domains that have enough text, and the passkeys.

    Args:
        encoder: makes, of a tokenizer and whether texts may hold control tokens, what encodes texts as blocks are.

    Raises:
        UserError: no domain has enough text, or a tokenizer or a file of a corpus is not there.
    """
    if config.context is None:
        raise ValueError("no context is asked for")
    trained = trained_length(student, packing)
    # The teacher's, as of the blocks: a student reads the same ids.
    folder = local_folder(teacher.model, teacher.revision, "teacher.model", weights=False)
    tokenizer = load_tokenizer(folder, trust_remote_code=teacher.trust_remote_code)
    vocab_size, least_rows = vocabulary(tokenizer)
    ends = text_ends(packing, tokenizer, student)
    sequences: dict[str, LongSequences] = {}
    for name in texts.names:
        control = _domain_of(name, domains).special_tokens == "control"
        documents = encoder(tokenizer, control)(texts.read(name, DOCUMENTS))
        most = min(config.context_documents, config.limit or config.context_documents)
        found = long_sequences(documents, ends, config.context, most)
        if found is None:
            logger.warning(
                "context: the validation documents of '%s' have %d tokens together, too few for %d; it is left out",
                *(name, sum(map(len, documents)), config.context),
            )
        else:
            sequences[name] = found
    if not sequences:
        raise UserError(
            f"--context is {config.context}, and no domain has that many tokens in its validation documents; lower it, "
            f"or add longer ones"
        )
    plain = encoder(tokenizer, False)
    count = min(config.passkeys, config.limit or config.passkeys)
    made = {
        multiple * trained: passkeys(plain, ends.bos_ids, multiple * trained, count, config.seed)
        for multiple in sorted(set(config.passkey))
    }
    return LongInputs(
        trained=trained,
        sequences=sequences,
        passkeys={length: texts for length, texts in made.items() if texts},
        vocab_size=vocab_size,
        least_rows=least_rows,
    )


def _domain_of(leaf: str, domains: Mapping[str, DomainConfig]) -> DomainConfig:
    return next(domains[name] for name in sorted(domains, key=len, reverse=True) if f"{leaf}/".startswith(f"{name}/"))


def trained_length(student: StudentConfig, packing: PackingConfig) -> int:
    """What the student knows before the training: as `student.context` or its config says; else a block's length."""
    if student.context is not None and student.context.trained is not None:
        return student.context.trained
    return longest_input(load_config(student).get_text_config()) or packing.seq_len


@task(task_run_name="long contexts, {model.role}", cache_policy=NO_CACHE, persist_result=False)
def evaluate_context(
    folder: EvaluationFolder, inputs: LongInputs, model: EvaluatedModel, config: EvaluationConfig
) -> dict[str, Any]:
    """Measure what is not measured yet.

    Returns:
        `{"model", "asked", "found"}`: how many records were made now, and how many were there.

    Raises:
        UserError: the model cannot be loaded, or it takes no inputs of that length.
    """
    questions = {f"context:{name}": _of_domain(inputs, one) for name, one in inputs.sequences.items()}
    if inputs.passkeys:
        questions[PASSKEY] = _of_passkeys(inputs)
    identities = {name: {"model": model.identity("hf"), **question} for name, question in questions.items()}
    names = {name: record_name(name, fingerprint(identity)) for name, identity in identities.items()}
    missing = [name for name in questions if folder.find(model.role, names[name]) is None]
    if missing:
        total = sum(_count(inputs, name) for name in missing)
        with meter(f"long contexts, {model.role}", total, "inputs") as progress, _reader(model, inputs) as reader:
            for name in missing:
                started = time.monotonic()
                measured = _passkeys_found if name == PASSKEY else _perplexities
                metrics, said = measured(reader, inputs, name, progress.advance)
                record = {
                    "kind": CONTEXT_KIND,
                    "model": model.role,
                    "task": name,
                    "group": None,
                    "limit": config.limit,
                    "measured_at": round(time.time(), 3),
                    "identity": identities[name],
                    "question": fingerprint(questions[name]),
                    "shots": 0,
                    "asked": _count(inputs, name),
                    "available": _count(inputs, name),
                    "source": said,
                    "trained": inputs.trained,
                    "metrics": metrics,
                    "seconds": round(time.monotonic() - started, 3),
                }
                folder.write(model.role, names[name], record)
    return {"model": model.role, "asked": len(missing), "found": len(questions) - len(missing)}


def _of_domain(inputs: LongInputs, one: LongSequences) -> dict[str, Any]:
    shape = list(one.tokens_NL1.shape)
    return {
        "kind": CONTEXT_KIND,
        "version": _VERSION,
        "trained": inputs.trained,
        "shape": shape,
        "sha256": one.digest(),
    }


def _of_passkeys(inputs: LongInputs) -> dict[str, Any]:
    content = {length: [[one.prompt, one.answer] for one in ones] for length, ones in inputs.passkeys.items()}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return {"kind": PASSKEY, "version": _VERSION, "trained": inputs.trained, "sha256": digest}


def _count(inputs: LongInputs, name: str) -> int:
    if name == PASSKEY:
        return sum(map(len, inputs.passkeys.values()))
    return len(inputs.sequences[name.partition(":")[2]].tokens_NL1)


def _perplexities(
    reader: LongReader, inputs: LongInputs, name: str, advance: Any
) -> tuple[dict[str, dict[str, Any]], str]:
    """`ppl,first-last` of each stretch of positions, and `ppl_to,last` from the beginning to each of their ends."""
    one = inputs.sequences[name.partition(":")[2]]
    rows = []
    for tokens in one.tokens_NL1:
        rows.append(reader.losses(tokens))
        advance(1)
    losses = np.stack(rows)
    edges = position_edges(inputs.trained, losses.shape[1])
    found: dict[str, dict[str, Any]] = {}
    for first, last in pairwise(edges):
        for key, start in ((f"ppl,{first}-{last}", first), (f"ppl_to,{last}", 0)):
            value, error = mean_perplexity(losses, start, last)
            found[key] = {"value": _finite(value), "stderr": _finite(error), "higher_is_better": False}
    return found, f"validation documents, {one.whole} of {len(rows)} sequences within one"


def _passkeys_found(
    reader: LongReader, inputs: LongInputs, name: str, advance: Any
) -> tuple[dict[str, dict[str, Any]], str]:
    """`acc,length`, the share of the passkeys that the model would write."""
    found: dict[str, dict[str, Any]] = {}
    for length, ones in inputs.passkeys.items():
        right = 0
        for one in ones:
            right += reader.would_write(one.prompt, one.answer)
            advance(1)
        share = right / len(ones)
        error = math.sqrt(share * (1 - share) / (len(ones) - 1)) if len(ones) > 1 else None
        found[f"acc,{length}"] = {"value": share, "stderr": error, "higher_is_better": True}
    return found, "passkeys in repeated sentences"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@contextmanager
def _reader(model: EvaluatedModel, inputs: LongInputs) -> Iterator[LongReader]:
    config = StudentConfig(model=model.engine.model, trust_remote_code=model.engine.trust_remote_code)
    field = f"the {model.role}'s folder"
    dtype = getattr(torch, model.dtype("hf"))
    loaded: Any = load_student(config, inputs.least_rows, dtype=dtype, field=field)
    rows = min(head_rows(loaded) or inputs.vocab_size, inputs.vocab_size)
    if (largest := max(int(one.tokens_NL1.max()) for one in inputs.sequences.values())) >= rows:
        raise UserError(
            f"{field} '{config.model}' predicts {rows} tokens, and a validation document holds token {largest}; leave "
            f"that model out (--models)"
        )
    declared = longest_input(loaded.config.get_text_config())
    rotary = any(hasattr(module, "inv_freq") for module in loaded.modules())
    if not rotary and declared is not None and declared < inputs.longest:
        raise UserError(
            f"{field} '{config.model}' takes {declared} positions and no more, and the longest input has "
            f"{inputs.longest}; lower --context and --passkey, or leave that model out (--models)"
        )
    threads = torch.get_num_threads()
    try:
        if not on_gpu() and loaded.num_parameters() < 50_000_000:  # see `transformers_model`
            torch.set_num_threads(1)
        yield LongReader(loaded.to("cuda" if on_gpu() else "cpu"), rows)
    finally:
        torch.set_num_threads(threads)
        del loaded
        gc.collect()
        if on_gpu():
            torch.cuda.empty_cache()
