"""How well a model completes code, one line at a time: exact match and edit similarity, as in the paper's Table 10.

A document is cut before one of its lines. The model reads the text before the cut and generates greedily up to the end
of the line. The result is compared with the original line, ignoring surrounding whitespace.

- **Exact match**: the two are equal.
- **Edit similarity**: 1 − Lev(a, b) / max(|a|, |b|), with the Levenshtein distance Lev of inserted, removed and
  replaced characters (Svyatkovskiy et al., IntelliCode Compose, 2020). CodeXGLUE and CrossCodeEval report a ratio of
  a library in its place that counts a replaced character as two edits and divides by |a| + |b|; the two differ by
  some points, never in what is equal.

Everything here is pure: the choice of lines depends only on the documents, their number and the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_CHARACTERS = 5
"""Of a line that is asked for, without the blanks around it: below, it is a bracket or an `else:`."""
MAX_CHARACTERS = 200
MAX_PREFIX_CHARACTERS = 6_000
"""What a model reads at most: lines from the end of what stands before the cut."""
MAX_TOKENS = 96
"""That a model generates at most; a line of `MAX_CHARACTERS` of code is rarely longer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One line that is asked for."""

    prefix: str
    """All before it, or the last lines of that; ends with a line feed."""
    target: str
    """The line, without its end."""


def draw_completions(documents: Sequence[str], count: int, seed: int) -> list[Completion]:
    """So many lines of all that may be asked for, drawn uniformly and without replacement, in the documents' order.

    A line may be asked for where something other than blanks stands before it, and where it is between
    `MIN_CHARACTERS` and `MAX_CHARACTERS` long and holds a letter or a digit.
    """
    places = [(d, start) for d, document in enumerate(documents) for start in _line_starts(document)]
    if len(places) > count:
        drawn = np.random.Generator(np.random.Philox(key=seed)).choice(len(places), size=count, replace=False)
        places = [places[i] for i in sorted(drawn.tolist())]
    return [_completion(documents[d], start) for d, start in places]


def _line_starts(document: str) -> list[int]:
    """Where the lines that may be asked for begin. Only a line feed ends a line."""
    starts, start = [], 0
    begun = False
    for line in document.split("\n"):
        code = line.strip()
        if begun and MIN_CHARACTERS <= len(code) <= MAX_CHARACTERS and any(map(str.isalnum, code)):
            starts.append(start)
        begun = begun or bool(code)
        start += len(line) + 1
    return starts


def _completion(document: str, start: int) -> Completion:
    prefix = document[:start]
    if len(prefix) > MAX_PREFIX_CHARACTERS:
        # From the beginning of a line on, unless the last one alone is longer.
        cut = prefix.find("\n", len(prefix) - MAX_PREFIX_CHARACTERS - 1, len(prefix) - 1) + 1
        prefix = prefix[cut or len(prefix) - MAX_PREFIX_CHARACTERS :]
    return Completion(prefix, document[start:].partition("\n")[0].rstrip("\r"))


def exact_match(generated: str, target: str) -> float:
    """1.0 or 0.0."""
    return float(generated.strip() == target.strip())


def edit_similarity(generated: str, target: str) -> float:
    """From 0.0 (nothing in common) to 1.0 (equal)."""
    a, b = generated.strip(), target.strip()
    longer = max(len(a), len(b))
    return 1.0 - levenshtein(a, b) / longer if longer else 1.0


def levenshtein(a: str, b: str) -> int:
    """The fewest characters to insert, remove or replace that make one text of the other.

    Myers' bit-parallel algorithm in Hyyrö's form (2003): a column of the table of distances is two integers, whose bit
    i says whether the distance rises or falls from row i to row i + 1.
    """
    if not a:
        return len(b)
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    where: dict[str, int] = {}
    for i, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << i
    rises, falls, distance = full, 0, len(a)
    for character in b:
        equal = where.get(character, 0)
        vertical = equal | falls
        horizontal = (((equal & rises) + rises) ^ rises) | equal
        right_rises, right_falls = (falls | ~(horizontal | rises)) & full, rises & horizontal
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises, right_falls = (right_rises << 1 | 1) & full, (right_falls << 1) & full
        rises, falls = (right_falls | ~(vertical | right_rises)) & full, right_rises & vertical
    return distance
