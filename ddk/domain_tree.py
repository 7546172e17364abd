"""Domains that have a path: `math/algebra/linear` lies below `math/algebra`, and that below `math`.

Blocks, perplexities and draws belong to the leaves. The values of a domain above them are aggregated:

- its perplexity is exp(Σ n·ln ℓ / Σ n) over its leaves, n the validation positions that carry loss. This equals
  a measurement over all of these positions at once, without approximation, since ln ℓ is a leaf's mean cross-entropy.
- its probability, and its blocks, are the sums of its leaves'.

A mixture that is kept at a level is computed over the domains cut to that many parts (level 1: `math`), and spread
within each over its leaves in proportion to their train blocks. Level 2, by the leaves' parts:

    math/algebra/linear  math/algebra/rings  math/geometry  web      leaves
    math/algebra         math/algebra        math/geometry  web      cut to two parts
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from ddk.values import DomainGap, Mixture


def cut(domain: str, level: int) -> str:
    """The first `level` parts, or all where there are fewer: `('math/algebra/linear', 2)` → `'math/algebra'`."""
    return "/".join(domain.split("/")[:level])


def depth(domain: str) -> int:
    """How many parts there are: 3 of `math/algebra/linear`."""
    return domain.count("/") + 1


def lineage(domain: str) -> tuple[str, ...]:
    """`'math/algebra/linear'` → `('math', 'math/algebra', 'math/algebra/linear')`."""
    return tuple(cut(domain, level) for level in range(1, depth(domain) + 1))


def inner_nodes(leaves: Iterable[str]) -> tuple[str, ...]:
    """The domains above the leaves, sorted."""
    return tuple(sorted({above for leaf in leaves for above in lineage(leaf)[:-1]}))


def check_leaves(leaves: Collection[str]) -> None:
    """That no domain has documents of its own and domains below it: its numbers would mean two things.

    Raises:
        ValueError: one has; it and one below it are named.
    """
    below = {above: leaf for leaf in leaves for above in lineage(leaf)[:-1]}
    for leaf in leaves:
        if leaf in below:
            raise ValueError(
                f"domain '{leaf}' has documents of its own, and '{below[leaf]}' lies below it; give the former a "
                f"further part (such as '{leaf}/other'), or rename one"
            )


def rolled_up_gaps(gaps: Sequence[DomainGap], positions: Mapping[str, int], level: int) -> tuple[DomainGap, ...]:
    """The gaps of the domains cut to `level` parts. Arguments and errors as of `rolled_up_ppl`."""
    student = rolled_up_ppl({gap.domain: gap.student_ppl for gap in gaps}, positions, level)
    teacher = rolled_up_ppl({gap.domain: gap.teacher_ppl for gap in gaps}, positions, level)
    return tuple(
        DomainGap(domain=domain, student_ppl=student[domain], teacher_ppl=teacher[domain]) for domain in student
    )


def rolled_up_ppl(perplexities: Mapping[str, float], positions: Mapping[str, int], level: int) -> dict[str, float]:
    """Perplexities of the domains cut to `level` parts.

    Args:
        perplexities: exp(mean cross-entropy per token, natural log) by leaf.
        positions: how many positions each is the mean of; above 0.

    Raises:
        ValueError: a leaf without positions.
    """
    if missing := sorted(leaf for leaf in perplexities if positions.get(leaf, 0) < 1):
        raise ValueError(f"domain '{missing[0]}' was measured on no known number of positions; it cannot be rolled up")
    return {
        node: _mean(perplexities, positions, leaves)
        # Nothing to roll up: the number as it is, to the last bit.
        if len(leaves) > 1
        else perplexities[leaves[0]]
        for node, leaves in _by_node(perplexities, level).items()
    }


def _mean(perplexities: Mapping[str, float], positions: Mapping[str, int], leaves: Sequence[str]) -> float:
    total = math.fsum(positions[leaf] * math.log(perplexities[leaf]) for leaf in leaves)
    return math.exp(total / sum(positions[leaf] for leaf in leaves))


def rolled_up_mixture(mixture: Mixture, level: int) -> Mixture:
    """The probabilities of the domains cut to `level` parts."""
    nodes = _by_node(mixture.probabilities, level)
    return Mixture(
        probabilities={
            node: min(1.0, math.fsum(mixture.probabilities[leaf] for leaf in leaves)) for node, leaves in nodes.items()
        }
    )


def rolled_up_counts(counts: Mapping[str, int], level: int) -> dict[str, int]:
    """Sums over the leaves of each domain cut to `level` parts."""
    return {node: sum(counts[leaf] for leaf in leaves) for node, leaves in _by_node(counts, level).items()}


def spread_mixture(mixture: Mixture, sizes: Mapping[str, int], level: int) -> Mixture:
    """The mixture over the leaves of one over domains cut to `level` parts.

    Args:
        sizes: train blocks by leaf; within a domain, leaves are drawn in proportion to them.

    Raises:
        ValueError: the mixture is over other domains than the leaves' cut ones.
    """
    whole = rolled_up_counts(sizes, level)
    if set(whole) != set(mixture.domains):
        raise ValueError(f"the mixture has domains {sorted(mixture.domains)}, the data {sorted(whole)}")
    return Mixture(
        probabilities={
            leaf: mixture.probabilities[cut(leaf, level)] * (size / whole[cut(leaf, level)])
            for leaf, size in sizes.items()
        }
    )


def _by_node(leaves: Iterable[str], level: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for leaf in leaves:
        found.setdefault(cut(leaf, level), []).append(leaf)
    return found
