"""Aggregates a report's records above the leaves, for domains with paths (`math/algebra/linear`).

A record that is aggregated to a level is a record of coarser domains, so every table and plot can use it directly.
Perplexities are weighted by the validation positions of the leaves (`ddk.domain_tree`); probabilities and blocks are
sums. If no domain has a path, all results equal those of the leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ddk.domain_tree import cut, depth, inner_nodes, lineage, rolled_up_counts, rolled_up_gaps, rolled_up_mixture
from ddk.values import worst_first
from tasks.reporting.records import IntervalRecord, Row, domains_of, gap_table, render_rows

MOST_LINES = 12
"""Of a plot, or columns of a table: more leaves than these are shown by the domains that they are of."""


def has_paths(records: Sequence[IntervalRecord]) -> bool:
    """Whether there is anything to roll up, and the records hold what that takes."""
    leaves = domains_of(records)
    return any(depth(leaf) > 1 for leaf in leaves) and all(set(leaves) <= set(record.positions) for record in records)


def at_level(records: Sequence[IntervalRecord], level: int) -> list[IntervalRecord]:
    """The records of the domains cut to `level` parts; alarms are of leaves, and left out."""
    return [
        replace(
            record,
            gaps=rolled_up_gaps(record.gaps, record.positions, level),
            mixture=rolled_up_mixture(record.mixture, level),
            blocks_drawn=rolled_up_counts(record.blocks_drawn, level),
            positions=rolled_up_counts(record.positions, level),
            kl=_rolled_up_kl(record, level),
            train_blocks=rolled_up_counts(record.train_blocks, level),
            alarms=(),
            capped=(),
        )
        for record in records
    ]


def _rolled_up_kl(record: IntervalRecord, level: int) -> dict[str, float]:
    """Means over the validation positions of the leaves, of domains of which every leaf has been measured."""
    sums: dict[str, float] = {}
    for leaf, positions in record.positions.items():
        sums[cut(leaf, level)] = sums.get(cut(leaf, level), 0.0) + positions * record.kl.get(leaf, math.nan)
    wholes = rolled_up_counts(record.positions, level)
    return {domain: total / wholes[domain] for domain, total in sums.items() if not math.isnan(total)}


def overview(records: Sequence[IntervalRecord]) -> list[IntervalRecord]:
    """The records at the finest level that a plot has room for; as they are where leaves are few, or have no paths."""
    leaves = domains_of(records)
    if len(leaves) <= MOST_LINES or not has_paths(records):
        return list(records)
    levels = _levels(records)
    return max((one for one in levels if _lines(one) <= MOST_LINES), key=_lines, default=levels[0])


def _lines(records: Sequence[IntervalRecord]) -> int:
    return len(domains_of(records))


def weakest(records: Sequence[IntervalRecord]) -> tuple[str, ...]:
    """The leaves with the largest ratios now, worst first, where `overview` does not show them; else none."""
    leaves = domains_of(records)
    if domains_of(overview(records)) == leaves:
        return ()
    last = records[-1]
    return tuple(sorted(leaves, key=lambda leaf: worst_first(last.gap(leaf).ratio))[:MOST_LINES])


def tree_table(records: Sequence[IntervalRecord]) -> list[Row]:
    """`gap_table` with a row for every domain above the leaves, before those of its leaves.

    Of the domains below one, that with the weakest leaf comes first, so that the weakest leaf of all is in the first of
    them, at every level.
    """
    rows = gap_table(records)
    if not has_paths(records):
        return rows
    inner, rank = inner_nodes(domains_of(records)), dict[str, int]()
    for place, row in enumerate(rows):
        for node in lineage(row["domain"]):
            rank.setdefault(node, place)
    rows += [row for nodes in _levels(records) for row in gap_table(nodes) if row["domain"] in inner]
    return sorted(rows, key=lambda row: [rank[node] for node in lineage(row["domain"])])


def rollup_rows(records: Sequence[IntervalRecord]) -> list[Row]:
    """`render_rows` of the domains above the leaves, with the column `leaves`: how many each is rolled up from."""
    if not has_paths(records):
        return []
    leaves = domains_of(records)
    counts = {node: sum(leaf.startswith(f"{node}/") for leaf in leaves) for node in inner_nodes(leaves)}
    return [
        {**row, "leaves": counts[row["domain"]]}
        for nodes in _levels(records)
        for row in render_rows(nodes)
        if row["domain"] in counts
    ]


def _levels(records: Sequence[IntervalRecord]) -> list[list[IntervalRecord]]:
    """The records at every level above the deepest leaf."""
    return [at_level(records, level) for level in range(1, max(map(depth, domains_of(records))))]
