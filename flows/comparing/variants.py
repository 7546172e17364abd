"""The request of `ddk compare`, and the configuration of every run that follows from it. No run is started here.

A variant is a method with some fields changed. Variants come from

    --methods ddk,kd                                 one each
    --sweep mixture.interval=50,100,500              one for each value (times the methods; two sweeps: every pair)
    --variant 'code: method=kd; mixture.weights={code: 3, math: 1}'     one by hand, e.g. a fixed mixture

and each is run with every seed. All that one configuration decides (corpora, models, steps, learning rate) is the
same for all of them, unless a variant changes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from ddk.errors import UserError
from ddk.methods.registry import METHODS, MethodName
from flows.config import Config, changed
from storage.files.yaml_text import parse_yaml

_OWN = {"run": "--name", "root": "--root", "seed": "--seeds", "method": "--methods", "storage_block": "--set"}
"""Fields that a sweep may not change, and the option to use instead."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,29}"
_LONGEST_KEY = 56
"""With the longest name and seed, a run's name has a hundred letters."""
_REFERENCE = "mixture.reference_run"
IN_ORDER: tuple[MethodName, ...] = (
    *("cpt", "cpt_doremi", "kd", "ted", "minillm"),
    *("ddk_equal", "ddk_no_smoothing", "ddk_retain", "ddk"),
)
"""All methods, as the paper's tables have them."""


class Variant(BaseModel):
    """One way to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As tables show it; unique within a comparison."""
    method: MethodName
    fields: dict[str, Any] = {}
    """Values that replace the configuration's, by `section.field`."""
    note: str | None = None

    @property
    def key(self) -> str:
        """Its part of a run's name: 'ddk-mixture.interval-50'. The same in every comparison that has it."""
        text = self.name if self.name.startswith(self.method) else f"{self.method}-{self.name}"
        key = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")
        if len(key) <= _LONGEST_KEY:
            return key
        return f"{key[: _LONGEST_KEY - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


class Request(BaseModel):
    """What is compared; plain data, as Prefect keeps it with the flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Of the comparison, and the first part of its runs' names."""
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    baseline: str
    folder: str
    """That relative paths in variants are relative to."""
    left_out: dict[str, str] = {}
    """Methods that nobody named and that do not take part, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A variant with a seed."""

    variant: Variant
    seed: int
    run: str
    config: Config | None
    """None where the configuration refuses the variant."""
    refusal: str | None = None


def request(
    config: Config,
    folder: str,
    *,
    name: str | None = None,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    sweeps: Sequence[str] = (),
    variants: Sequence[str] = (),
    baseline: str | None = None,
) -> Request:
    """What the options of `ddk compare` ask for.

    Without methods, all take part that the configuration can run from its cache (`ted` runs the live teacher, and is
    to be named); where there is a sweep, the configuration's own method does.

    Raises:
        UserError: an option is not well-formed, two variants have one name, or nothing is left to run.
    """
    name = config.run if name is None else name
    if not re.fullmatch(_NAME, name):
        raise UserError(
            f"the comparison's name is '{name}'; choose a --name of at most 30 letters, digits, dots, dashes and "
            f"underscores, because the names of its runs begin with it"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("--seeds takes whole numbers, at least one and none twice, e.g. 0,1,2")
    if not all(0 <= seed < 2**31 for seed in seeds):
        raise UserError("--seeds takes whole numbers from 0 to 2147483647, e.g. 0,1,2")
    swept = list(_grid(sweeps))
    chosen = _methods(methods) if methods else [config.method] if sweeps else list(IN_ORDER)
    rows = [
        Variant(name=_label(method, fields, alone=len(chosen) == 1), method=method, fields=fields)
        for method in chosen
        for fields in swept
    ]
    rows += [_by_hand(text, config) for text in variants]
    _check_names(rows)
    rows = _with_references(rows, config)
    _check_names(rows)
    asked = Request(name=name, variants=tuple(rows), seeds=tuple(seeds), baseline=rows[0].name, folder=folder)
    left_out = {} if methods or sweeps else _not_from_the_cache(config, asked)
    rows = [row for row in rows if row.name not in left_out]
    names = [row.name for row in rows]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline '{baseline}' is not a variant; the variants are {', '.join(names)}")
    refusals = [run.refusal for run in planned_runs(config, asked) if run.variant.name in names]
    if refusals and all(refusals):
        raise UserError(str(refusals[0]))
    default = "ddk" if "ddk" in names else names[0]
    return asked.model_copy(update={"variants": tuple(rows), "baseline": baseline or default, "left_out": left_out})


def whole_numbers(text: str, option: str) -> list[int]:
    """'0,1,2' → [0, 1, 2].

    Raises:
        UserError: something else; the option is named.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} takes whole numbers separated by commas, not '{text}'") from None


def planned_runs(config: Config, request: Request) -> list[PlannedRun]:
    """Every run, seed by seed, so that a comparison that is stopped early has whole seeds to compare.

    A run that others take as their reference comes before them.
    """
    return [_planned(config, request, variant, seed) for seed in request.seeds for variant in request.variants]


def _planned(config: Config, request: Request, variant: Variant, seed: int) -> PlannedRun:
    run = run_name(request.name, variant, seed)
    fields: dict[str, Any] = {
        **variant.fields,
        "run": run,
        "seed": seed,
        "method": variant.method,
        "mixture.evaluation": "inline",  # a scheduled evaluator would make the runs depend on its timing
        "train.keep_checkpoints": 1,
    }
    if _has_own_reference(variant, config):
        fields[_REFERENCE] = run_name(request.name, _reference_of(variant), seed)
    elif not METHODS[variant.method].reads_reference:
        fields.setdefault(_REFERENCE, None)
    try:
        planned = changed(config, fields, request.folder, f"variant '{variant.name}'")
    except UserError as error:
        return PlannedRun(variant=variant, seed=seed, run=run, config=None, refusal=str(error))
    return PlannedRun(variant=variant, seed=seed, run=run, config=planned)


def run_name(comparison: str, variant: Variant, seed: int) -> str:
    return f"{comparison}-{variant.key}-s{seed}"


def _check_names(rows: Sequence[Variant]) -> None:
    """That no two share a name, or their runs' names, also where a file system ignores case."""
    seen: dict[str, str] = {}
    for row in rows:
        for text in {row.name, row.key.casefold()}:
            if text in seen:
                raise UserError(f"two variants have the same name: '{seen[text]}' and '{row.name}'; rename one")
            seen[text] = row.name


def _not_from_the_cache(config: Config, asked: Request) -> dict[str, str]:
    """Of the methods alone, those that the configuration cannot run, or not from stored targets."""
    reasons: dict[str, str] = {}
    for run in planned_runs(config, asked):
        if run.variant.name in METHODS and METHODS[run.variant.method].needs_teacher:
            reasons[run.variant.name] = "it runs the live teacher beside the student; name it with --methods"
        elif run.variant.name in METHODS and run.refusal is not None:
            reasons[run.variant.name] = run.refusal
    return reasons


def _methods(names: Sequence[str]) -> list[MethodName]:
    if unknown := [name for name in names if name not in METHODS]:
        raise UserError(f"--methods: there is no method '{unknown[0]}'; there are {', '.join(METHODS)}")
    return [cast(MethodName, name) for name in dict.fromkeys(names)]


def _grid(sweeps: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every combination of the sweeps' values; one empty one without sweeps."""
    axes = [[(field, value) for value in values] for field, values in map(_sweep, sweeps)]
    for combination in itertools.product(*axes):
        yield dict(combination)


def _sweep(text: str) -> tuple[str, list[Any]]:
    match = re.fullmatch(r"([\w.-]+)=(.+)", text, flags=re.DOTALL)
    if match is None:
        raise UserError(f"--sweep takes section.field=value,value,…, not '{text}'")
    values = parse_yaml(f"[{match[2]}]", f"--sweep {text}: values separated by commas", lines=False)
    _check_free(match[1], f"--sweep {text}")
    return match[1], values


def _check_free(field: str, place: str) -> None:
    if field in _OWN:
        raise UserError(f"{place}: {field} is fixed for a whole comparison, or set for each seed; use {_OWN[field]}")


def _label(method: str, fields: Mapping[str, Any], *, alone: bool) -> str:
    parts = [f"{field}={as_text(value)}" for field, value in fields.items()]
    return ", ".join(parts if alone and parts else [method, *parts])


def as_text(value: Any) -> str:
    """A field's value in a label or a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _by_hand(text: str, config: Config) -> Variant:
    """'NAME: section.field=value; section.field=value'."""
    name, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9][\w .,=+-]*", name.strip()):
        raise UserError(f"--variant takes 'NAME: section.field=value; …', not '{text}'")
    fields: dict[str, Any] = {}
    for part in filter(None, map(str.strip, rest.split(";"))):
        field, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--variant '{text}': '{part}' is not section.field=value")
        fields[field.strip()] = parse_yaml(value, f"--variant '{text}': {field.strip()}", lines=False)
    (method,) = _methods([str(fields.pop("method", config.method))])
    for field in fields:
        _check_free(field, f"--variant '{text}'")
    return Variant(name=name.strip(), method=method, fields=fields)


def _has_own_reference(variant: Variant, config: Config) -> bool:
    """Whether the variant is compared with a run of this comparison: no other has been named for it."""
    named = variant.fields.get(_REFERENCE, config.mixture.reference_run)
    return METHODS[variant.method].reads_reference and named is None


def _reference_of(variant: Variant) -> Variant:
    """What the original trains as the reference: the same student by plain cross-entropy, all else equal."""
    fields = {field: value for field, value in variant.fields.items() if not field.startswith("mixture.doremi_")}
    return Variant(
        name=_label("cpt", fields, alone=False),
        method="cpt",
        fields=fields,
        note=f"the reference of {variant.method}",
    )


def _with_references(rows: Sequence[Variant], config: Config) -> list[Variant]:
    """The variants, each reference before what is compared with it; those that nobody asked for are added."""
    found: dict[str, Variant] = {}
    for row in rows:
        if not _has_own_reference(row, config):
            found.setdefault(row.key, row)
            continue
        reference = _reference_of(row)
        asked = found.setdefault(reference.key, next((one for one in rows if one.key == reference.key), reference))
        note = f"its reference is the run of '{asked.name}' with the same seed"
        found[row.key] = row.model_copy(update={"note": note})
    return list(found.values())
