"""Weak concepts: accuracies by the path of a question, rolled up, and the mixture that follows from them.

A question has a path as a domain has (`arithmetic/addition`). The accuracy of a node is that of all questions below it.

    ã[root] = right/asked;   ã[c] = (right[c] + m·ã[parent]) / (asked[c] + m)     shrunk accuracy, m = 10 questions
    w[c] = max(0, ã_T[c] − ã_S[c])                                                       weakness; ã_T = 1 if unknown
    ψ[c] = q[c] · exp(w[c]/τ);   r[c] = α·ψ[c]/Σψ + (1 − α)·n[c]/n[parent]               between the children of a node

The probability of a domain is the product of r along its path. n counts the domains at or below a node. q is n[c]/n
(`follow: accuracy`), or the children's shares under the mixture that follows the gap (`follow: both`).

Why so. Leaves have few questions (ConceptMath, arXiv 2402.14660, has 16 to 20), so that one of them may look hopeless
by chance: it is taken to be like its siblings until its own questions say otherwise. What the teacher cannot do either
cannot be distilled from it, hence the difference; unlike a quotient, it stays bounded where the teacher's accuracy is
small. r is Eq. 2 between the children of each node: exponentiated, with the same floor, which between N domains is
(1 − α)/N. Where all are equally weak, every domain is drawn equally often. It is applied once, not again at every
interval, as the accuracies are of one measurement: repeating it would count that measurement many times over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ddk.domain_tree import inner_nodes, lineage
from ddk.mixture import exponentiated_mixture, weighted_mixture
from ddk.values import Mixture, Tally

PRIOR_QUESTIONS = 10
"""m: so many questions of its own weigh as much as the accuracy of what lies above."""
_Z = 1.959963984540054
"""Of a normal distribution, 95% lie within so many standard deviations of the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracies:
    """What was measured, by the questions' own paths."""

    student: Mapping[str, Tally]
    teacher: Mapping[str, Tally] | None = None
    """On the same questions; None where it was not asked."""


def wilson(tally: Tally) -> tuple[float, float]:
    """The 95% interval of an accuracy by Wilson's score (1927), which keeps to [0, 1] and holds for few questions too.

    Of scores between 0 and 1 it is wider than need be, as their variance is at most p(1 − p).
    """
    n, p = tally.asked, tally.accuracy
    centre = p + _Z**2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    whole = 1 + _Z**2 / n
    return max(0.0, (centre - half) / whole), min(1.0, (centre + half) / whole)


def rolled_up_tallies(tallies: Mapping[str, Tally]) -> dict[str, Tally]:
    """The tallies of every node at and above the paths, each the sum of all questions below it."""
    found: dict[str, Tally] = {}
    for path, tally in tallies.items():
        for node in lineage(path):
            found[node] = found[node] + tally if node in found else tally
    return found


def weakest_first(tallies: Mapping[str, Tally]) -> list[str]:
    """All nodes, each before those below it; of siblings the weakest first (of equally weak ones by name)."""
    accuracy = {node: tally.accuracy for node, tally in rolled_up_tallies(tallies).items()}
    return sorted(accuracy, key=lambda node: [(accuracy[above], above) for above in lineage(node)])


def strangers(paths: Iterable[str], domains: Collection[str]) -> list[str]:
    """The paths that lie neither at, above nor below any domain, sorted: their questions say nothing of the domains."""
    nodes = {*domains, *inner_nodes(domains)}
    leaves = set(domains)
    return sorted(path for path in paths if path not in nodes and not leaves & set(lineage(path)))


def unasked(paths: Iterable[str], domains: Iterable[str]) -> list[str]:
    """The domains of which no question is at or below them, sorted: they have the accuracy of what lies above."""
    asked = {node for path in paths for node in lineage(path)}
    return sorted(domain for domain in domains if domain not in asked)


def shrunk_accuracies(tallies: Mapping[str, Tally], domains: Collection[str]) -> dict[str, float]:
    """ã of every domain and of every node above them.

    Args:
        tallies: by path; those of strangers do not count.

    Raises:
        ValueError: no path belongs to any domain.
    """
    unknown = set(strangers(tallies, domains))
    known = {path: tally for path, tally in tallies.items() if path not in unknown}
    if not known:
        raise ValueError(
            f"the questions have the paths {_some(tallies)}, and none of them lies at, above or below one of the "
            f"domains {_some(domains)}"
        )
    own = rolled_up_tallies(known)
    total = sum(tally.asked for tally in known.values())
    found = {"": math.fsum(tally.right for tally in known.values()) / total}
    for domain in domains:
        above = ""
        for node in lineage(domain):
            right, asked = (own[node].right, own[node].asked) if node in own else (0.0, 0)
            found[node] = (right + PRIOR_QUESTIONS * found[above]) / (asked + PRIOR_QUESTIONS)
            above = node
    del found[""]
    return found


def weaknesses(accuracies: Accuracies, domains: Collection[str]) -> dict[str, float]:
    """w, in [0, 1], of every domain and of every node above them. Raises as `shrunk_accuracies`."""
    student = shrunk_accuracies(accuracies.student, domains)
    if accuracies.teacher is None:
        return {node: 1.0 - accuracy for node, accuracy in student.items()}
    teacher = shrunk_accuracies(accuracies.teacher, domains)
    return {node: max(0.0, teacher[node] - accuracy) for node, accuracy in student.items()}


def concept_mixture(
    domains: Collection[str],
    weakness: Mapping[str, float],
    *,
    alpha: float,
    temperature: float,
    base: Mixture | None = None,
) -> Mixture:
    """r of every domain: the formula above, level by level.

    Args:
        domains: no one of which lies below another.
        weakness: w by domain and by node above them, in [0, 1].
        alpha: α in [0, 1].
        temperature: τ > 0, in accuracy.
        base: q, over the same domains; None: every domain equally often.

    Raises:
        ValueError: a node has no weakness, the base is over other domains, or α lies outside of [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must lie in [0, 1]")
    if base is not None and set(base.domains) != set(domains):
        raise ValueError(f"the mixture has domains {sorted(base.domains)}, the tree {sorted(domains)}")
    if missing := sorted({node for domain in domains for node in lineage(domain)} - set(weakness)):
        raise ValueError(f"there is no weakness of '{missing[0]}'")
    below = _leaves_below(domains)
    share = {"": 1.0}
    for node, children in _children(domains).items():
        alike = weighted_mixture({child: float(len(below[child])) for child in children})
        old = alike
        if base is not None:
            weights = {child: math.fsum(base.probabilities[leaf] for leaf in below[child]) for child in children}
            # Eq. 1 may leave a whole branch without any probability.
            old = weighted_mixture(weights) if any(weights.values()) else alike
        rise = {child: weakness[child] / temperature for child in children}
        weak = exponentiated_mixture(old, rise, 1.0).probabilities
        for child, floor in alike.probabilities.items():
            share[child] = share[node] * (alpha * weak[child] + (1.0 - alpha) * floor)
    return weighted_mixture({domain: share[domain] for domain in domains})


def _children(domains: Iterable[str]) -> dict[str, list[str]]:
    """The children of the root ('') and of every node above the domains, each node after the one above it."""
    found: dict[str, list[str]] = {"": []}
    for domain in domains:
        above = ""
        for node in lineage(domain):
            siblings = found.setdefault(above, [])
            if node not in siblings:
                siblings.append(node)
            above = node
    return dict(sorted(found.items(), key=lambda item: len(lineage(item[0])) if item[0] else 0))


def _leaves_below(domains: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for domain in domains:
        for node in lineage(domain):
            found.setdefault(node, []).append(domain)
    return found


def _some(names: Iterable[str], most: int = 4) -> str:
    """'a, b, c, d and 3 more'."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(f"'{name}'" for name in ordered[:most]) + more
