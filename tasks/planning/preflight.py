"""Checks whether the student can be trained on the teacher's predictions, before anything is captured.

The checks read only headers, configs and tokenizers, with one exception: every weight of the student is read once to
check that it is a finite number. The checks of the teacher are in `tasks.planning.store_plan`, which every stage uses.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from ddk.context import ContextPlan, plan_context, stretched_config
from ddk.cost.shape import longest_input
from ddk.errors import UserError, first_line
from ddk.rotary import check_rotary
from ddk.structure import attention_of, empty_model
from ddk.student import (
    cannot_be_loaded,
    check_loading,
    head_rows,
    layers_of,
    load_config,
    load_tokenizer,
    save_student,
    saved_generation,
)
from ddk.train_config import StudentConfig
from ddk.values import SPLITS
from storage.blocks import open_blocks
from storage.stores.manifest import read_manifest
from tasks.planning.models import check_same_tokenizer, local_folder
from tasks.planning.store_plan import Plan
from tasks.planning.tokenizer_files import has_tokenizer
from tasks.planning.weights import TensorHeader, check_numbers, check_weights
from tasks.showing.progress import logger

FIELD = "student.model"
_LARGEST_TRIED = 2**34
"""Bytes of weights up to which names are tried out where they are not the architecture's own: converting them (the
experts of a mixture are stacked, say) takes as much memory."""
_SCAN = 500

_passed: dict[tuple[Any, ...], StudentFacts] = {}
"""What was found whole before in this process; a flow's stages each look again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFacts:
    """What the check found out of a student."""

    folder: str
    """A local one."""
    vocab_size: int
    """Tokens that both models can predict: the plan's, or fewer where the student has fewer rows."""
    attention: str | None
    """See `ddk.structure.attention_of`."""
    context: ContextPlan | None
    """`student.context`, resolved; None where it is off."""


def check_student(config: StudentConfig, plan: Plan) -> StudentFacts:
    """That the student is whole, can be trained, can be saved, and fits the teacher, its tokenizer and the blocks.

    Raises:
        UserError: it does not; field and remedy are named.
    """
    folder = local_folder(config.model, config.revision, FIELD)
    config = config.model_copy(update={"model": folder, "revision": None})
    key = (config, plan.teacher_folder, plan.vocab_size, plan.seq_len, *_state(folder), *_state(plan.teacher_folder))
    if key not in _passed:
        _passed[key] = _checked(config, plan)
    facts = _passed[key]
    if facts.vocab_size < plan.vocab_size:
        _check_tokens(plan, facts.vocab_size)
    return facts


def check_student_if_there(config: StudentConfig | None, plan: Plan) -> None:
    """`check_student` in a stage that does not need the student yet: one that is not there is looked at later.

    Raises:
        UserError: as `check_student`.
    """
    if config is None:
        return
    try:
        local_folder(config.model, config.revision, FIELD, weights=False)
    except UserError:  # `tasks.planning.text_ends` says so
        return
    check_student(config, plan)


def check_live_teacher(plan: Plan) -> None:
    """That a method which trains beside the live teacher can load it.

    Raises:
        UserError: its weights are not whole, or quantised.
    """
    teacher = StudentConfig(model=plan.teacher_folder, trust_remote_code=plan.trust_remote_code)
    load_config(teacher, "teacher.model")
    check_weights(plan.teacher_folder, "teacher.model")


def _state(folder: str) -> tuple[tuple[str, int, int], ...]:
    """Of a folder's files: names, sizes and times."""
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


def _checked(config: StudentConfig, plan: Plan) -> StudentFacts:
    described = load_config(config, FIELD)
    headers = check_weights(config.model, FIELD)
    context = _check_positions(config, described, plan.seq_len)
    check_same_tokenizer(
        plan.teacher_folder,
        config.model,
        trust_teacher=plan.trust_remote_code,
        trust_student=config.trust_remote_code,
    )
    try:
        model = empty_model(described, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a model's own code raises
        raise cannot_be_loaded(config, FIELD, error) from error
    vocab_size = _vocabulary(config, plan, head_rows(model))
    _check_names(config, described, model, headers)
    if context is not None:
        check_rotary(model, layers_of(model))
    _check_saving(config, model, plan, context)
    check_numbers(config.model, FIELD)
    attention = attention_of(described, trust_remote_code=config.trust_remote_code)
    if attention is not None:
        logger.info(
            "student: attention is '%s', because the fast implementation omits a part of what a %s model computes",
            attention,
            described.model_type,
        )
    return StudentFacts(folder=config.model, vocab_size=vocab_size, attention=attention, context=context)


def _check_positions(config: StudentConfig, described: Any, seq_len: int) -> ContextPlan | None:
    longest = longest_input(described.get_text_config())
    if config.context is not None:
        return plan_context(config.context, longest, seq_len, config.model)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"packing.seq_len is {seq_len}, and {FIELD} '{config.model}' takes {longest} positions; lower it, choose a "
            f"student with more, or set student.context, which prepares it for more"
        )
    return None


def _vocabulary(config: StudentConfig, plan: Plan, rows: int | None) -> int:
    if rows is None or rows >= plan.vocab_size:
        return plan.vocab_size
    if rows < plan.least_rows:
        raise UserError(
            f"{FIELD} '{config.model}' predicts {rows} tokens and the tokenizer has {plan.vocab_size}; teacher and "
            f"student must share the tokenizer (they may be padded differently)"
        )
    return rows


def _check_tokens(plan: Plan, vocab_size: int) -> None:
    """That no block holds a token for which the student has no row. Stores that are not there yet pass."""
    for domain, store in plan.domains.items():
        manifest = read_manifest(store.blocks_url)
        if manifest is None or not manifest.complete:
            continue
        for split in SPLITS:
            blocks = open_blocks(store.blocks_url, split)
            for start in range(0, len(blocks), _SCAN):
                tokens = blocks.read(np.arange(start, min(start + _SCAN, len(blocks))))
                if tokens.max() >= vocab_size:
                    raise UserError(
                        f"domain '{domain}': a {split} block holds token {int(tokens.max())}, and {FIELD} predicts "
                        f"{vocab_size} tokens; remove texts with that token, or choose a student that has it"
                    )


def _check_names(config: StudentConfig, described: Any, model: Any, headers: Mapping[str, TensorHeader]) -> None:
    """That the files hold a tensor of the right shape for every weight: loaded by transformers, without the data."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {name for name in wanted if name not in {first for first, _ in model.named_parameters()}}
    found = {name: header.shape for name, header in headers.items()}
    if all(found.get(name) == shape for name, shape in wanted.items() if name not in tied or name in found):
        return
    if sum(header.data_offsets[1] - header.data_offsets[0] for header in headers.values()) > _LARGEST_TRIED:
        return  # found out when it is loaded
    stated = [header.torch_dtype for header in headers.values()]
    dtype = max(set(stated), key=stated.count)
    # One number each, seen as a tensor of the right shape.
    empty = {name: torch.zeros((), dtype=header.torch_dtype).expand(header.shape) for name, header in headers.items()}
    try:
        with _quiet_transformers():
            _, loading = type(model).from_pretrained(
                None,
                config=described,
                state_dict=empty,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise cannot_be_loaded(config, FIELD, error) from error
    check_loading(config, FIELD, loading)


def _check_saving(config: StudentConfig, model: Any, plan: Plan, context: ContextPlan | None) -> None:
    """Save a copy without weights: what cannot be saved is better known before the training."""
    if model.can_generate() and os.path.exists(os.path.join(config.model, "generation_config.json")):
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(config.model)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{FIELD} '{config.model}': its generation_config.json cannot be read ({first_line(error)}); "
                f"correct or remove it"
            ) from error
    changed = saved_generation(model)[1]
    if changed is not None:
        logger.warning("student: the generation_config.json of '%s': %s", config.model, changed)
    own = has_tokenizer(config.model)
    written = None if context is None else stretched_config(model.config, context.factor, context.target)
    with tempfile.TemporaryDirectory(prefix="ddk-preflight-") as folder, _quiet_transformers():
        try:
            save_student(model, {}, folder, written)
            tokenizer = load_tokenizer(
                config.model if own else plan.teacher_folder,
                trust_remote_code=config.trust_remote_code if own else plan.trust_remote_code,
            )
            tokenizer.save_pretrained(folder)
            load_config(StudentConfig(model=folder, trust_remote_code=config.trust_remote_code), FIELD)
        except UserError:
            raise
        except Exception as error:  # whatever a model's own code raises
            raise UserError(
                f"{FIELD} '{config.model}' could be trained but not saved: {type(error).__name__}: "
                f"{first_line(error)}; it must be a model that save_pretrained writes"
            ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Neither bars nor reports: what is wrong is said in our words."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
