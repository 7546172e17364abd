"""`ddk compare --runs PATTERN`: compares runs that are there, in the order in which they ended, and runs nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefect import flow
from prefect.settings import PREFECT_API_URL

from ddk.errors import UserError
from flows.config import check_name
from storage.files import uri
from storage.files.names import matches
from storage.files.root import check_root
from storage.runs.overview import RunOverview, overviews
from tasks.comparing.collect import collect
from tasks.comparing.data import ComparedVariant, Comparison
from tasks.comparing.report import report_comparison, write_comparison
from tasks.running.storage_block import use_storage_block


def report_existing(root: str, runs: Sequence[str], name: str | None, storage_block: str | None = None) -> str:
    """Write the comparison. Where PREFECT_API_URL names a server, it is published there as an artifact too.

    Args:
        runs: patterns of their names: 'weekly-*'.
        name: of the comparison; None: made from the patterns.

    Returns:
        The comparison's name.

    Raises:
        UserError: the root is none, or fewer than two runs match.
    """
    called = name or name_of(runs)
    check_name(called)
    check_root(root)
    if PREFECT_API_URL.value():
        compare_runs(root=root, runs=list(runs), name=called, storage_block=storage_block)
    else:
        write_comparison(root, existing(root, runs, called))
    return called


@flow(name="compare-runs", flow_run_name="compare {name}", persist_result=False)
def compare_runs(root: str, runs: list[str], name: str, storage_block: str | None = None) -> dict[str, str]:
    """Compare runs that are there, and publish the comparison with its plot over time.

    Returns:
        The URL of each file of the report by its name.
    """
    use_storage_block(storage_block)
    return report_comparison(root, existing(root, runs, name))


def name_of(patterns: Sequence[str]) -> str:
    """['weekly-*'] → 'weekly'."""
    words = (re.sub(r"[^A-Za-z0-9._]+", "-", pattern).strip("-._") for pattern in patterns)
    return "-".join(word for word in words if word)[:100] or "runs"


def existing(root: str, patterns: Sequence[str], name: str) -> Comparison:
    """The runs whose names match, each a variant of its own; the one that ended first is the baseline.

    Raises:
        UserError: fewer than two runs match.
    """
    every = overviews(root)
    found = sorted((one for one in every if matches(one.name, patterns)), key=_when)
    if len(found) < 2:
        there = ", ".join(one.name for one in every) or "none"
        raise UserError(
            f"{len(found)} run of {uri.join(root, 'runs')} matches {', '.join(patterns)}, and a comparison needs two; "
            f"there are: {there}"
        )
    damaged = {one.name: one.reason or "damaged" for one in found if one.state == "damaged"}
    sound = [one for one in found if one.name not in damaged]
    baseline = next((one for one in sound if one.state == "complete"), found[0])
    return collect(
        root,
        name,
        variants=[ComparedVariant(name=one.name, method=one.method or "ddk", note=_note(one)) for one in found],
        runs=[(one.name, one.seed or 0, one.name) for one in found],
        baseline=baseline.name,
        failures=damaged,
        left_out={},
        ended={one.name: one.ended for one in found if one.ended is not None},
    )


def _when(one: RunOverview) -> tuple[float, str]:
    return one.ended or 0.0, one.name


def _note(one: RunOverview) -> str | None:
    return f"began from {one.ancestry[0]}" if one.ancestry else None
