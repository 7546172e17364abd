"""Selects the paper's tables that a comparison can be shown beside, row by row.

The paper's tables are copied in `paper_tables.yaml`. They come from other models, data and measures, so nothing is
computed from them; they show the order of the methods and the shape of a curve, and their numbers are not comparable
with ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from tasks.comparing.data import ComparedVariant, Comparison


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PaperTable(_Frozen):
    """One of theirs."""

    title: str
    field: str
    """Of our configuration, that the table varies."""
    measure: str
    columns: tuple[str, ...]
    rows: dict[str | int | float, tuple[float | None, ...]]


class Paper(_Frozen):
    source: str
    tables: tuple[PaperTable, ...]


class RowBeside(_Frozen):
    """A row of the joint table."""

    label: str
    variant: str | None
    """Ours; None where we have none."""
    theirs: tuple[float | None, ...] | None
    """None where the paper has none."""


@cache
def paper() -> Paper:
    text = resources.files("tasks.comparing").joinpath("paper_tables.yaml").read_text(encoding="utf-8")
    return Paper.model_validate(yaml.safe_load(text))


def tables_beside(comparison: Comparison) -> list[tuple[PaperTable, list[RowBeside]]]:
    """The paper's tables of which the comparison has at least two rows, with all of their rows and of ours."""
    joined = [(table, _rows(table, _ours(comparison, table.field))) for table in paper().tables]
    return [
        (table, rows)
        for table, rows in joined
        if sum(row.variant is not None and row.theirs is not None for row in rows) > 1
        or (table.field != "method" and sum(row.variant is not None for row in rows) > 1)
    ]


def _ours(comparison: Comparison, field: str) -> dict[str, str]:
    """Our variants that differ in this field alone, by its value."""
    if field == "method":
        return {variant.name: variant.name for variant in comparison.variants if variant.name == variant.method}
    varied = [
        variant for variant in comparison.variants if _others(variant, field) == _others(_like(comparison), field)
    ]
    found = {variant.settings[field]: variant.name for variant in varied if field in variant.settings}
    return found if len(found) > 1 else {}


def _like(comparison: Comparison) -> ComparedVariant:
    return next(variant for variant in comparison.variants if variant.name == comparison.baseline)


def _others(variant: ComparedVariant, field: str) -> tuple[str, dict[str, str]]:
    """The method and everything else that the variant has of its own."""
    return variant.method, {name: value for name, value in variant.settings.items() if name != field}


def _rows(table: PaperTable, ours: Mapping[str, str]) -> list[RowBeside]:
    theirs = {_canonical(key): (str(key), row) for key, row in table.rows.items()}
    mine = {_canonical(value): (value, variant) for value, variant in ours.items()}
    shared_order = list(dict.fromkeys([*theirs, *mine]))
    if all(isinstance(key, float) for key in shared_order):
        shared_order.sort()
    elif table.field == "method":
        shared_order = list(theirs)
    return [
        RowBeside(
            label=theirs[key][0] if key in theirs else mine[key][0],
            variant=mine[key][1] if key in mine else None,
            theirs=theirs[key][1] if key in theirs else None,
        )
        for key in shared_order
    ]


def _canonical(value: Any) -> str | float:
    """'50' and 50, '1.0' and 1 are the same value."""
    try:
        return float(value)
    except ValueError:
        return str(value)
