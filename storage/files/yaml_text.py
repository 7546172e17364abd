"""YAML as people write it, read without surprises: by YAML 1.1, but what it would silently turn into something else is
refused, with the place and the remedy.

- a key that stands twice in one mapping, of which only the last would count
- a key that is no text to YAML: `no`, `on`, `y: …`, `007`, `1.5`, `~`
- a number with a leading zero (octal: 010 is 8) or with colons (sexagesimal: 1:30 is 90)
- aliases that contain themselves, or that unfold to a flood

A date stays the text that it is.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ddk.errors import UserError

MOST_CHARACTERS = 1 << 20
MOST_VALUES = 100_000
"""With every alias unfolded."""
MOST_LEVELS = 50
MOST_DIGITS = 400
"""Of a number: more than any float has before its point."""

_PREFIX = "tag:yaml.org,2002:"
_MEANS = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing"}
_SURPRISING = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class _Loader(yaml.SafeLoader):
    """Without YAML 1.1's timestamps: nothing here takes one, and `2024-01-01` is a name like another."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _PREFIX + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, place: str, *, lines: bool = True) -> Any:
    """The one value that a text holds.

    Args:
        place: what an error begins with, e.g. the file's path.
        lines: whether line and column belong to the place.

    Raises:
        UserError: it is not YAML, or one of the surprises of this module's docstring.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{place}: it is larger than {MOST_CHARACTERS >> 20} MiB; is it the right file?")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(place, lines).node(node)
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(f"{place}: it is nested too deeply ({MOST_LEVELS} levels at most)") from None
    except yaml.reader.ReaderError as error:
        found = f"character {error.character:#04x}" if isinstance(error.character, int) else "a character"
        raise UserError(f"{place}: not valid YAML ({found} is no text); is it the right file?") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{_at(place, error.problem_mark, lines)}: not valid YAML ({_problem(error)})") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place}: not valid YAML ({_one_line(error)})") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Check:
    """Looks through the nodes before anything is made of them. A node that aliases name is looked at once."""

    def __init__(self, place: str, lines: bool) -> None:
        self._place, self._lines = place, lines
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def node(self, node: yaml.Node) -> int:
        """How many values it holds, aliases unfolded."""
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        if id(node) in self._open:
            raise self._error(node, "an alias (*name) occurs within its own value; write the values out")
        if len(self._open) >= MOST_LEVELS:
            raise self._error(node, f"it is nested too deeply ({MOST_LEVELS} levels at most)")
        self._open.add(id(node))
        size = 1
        if isinstance(node, yaml.MappingNode):
            self._keys(node)
            size += sum(self.node(value) for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self.node(value) for value in node.value)
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node)
        if size > MOST_VALUES:
            raise self._error(node, f"its aliases unfold to more than {MOST_VALUES:,} values; write them out")
        self._open.discard(id(node))
        self._sizes[id(node)] = size
        return size

    def _keys(self, node: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be a name")
            kind = key.tag.removeprefix(_PREFIX)
            if kind in _MEANS:
                means = f"YAML reads the key {_cut(key.value)!s} as {_MEANS[kind]}" if key.value else "a key is empty"
                raise self._error(key, f"{means}; write it in quotes: '{_cut(key.value)}'")
            if key.value in lines:
                first = f"first in line {lines[key.value]}; " if self._lines else ""
                raise self._error(key, f"the key '{_cut(key.value)}' stands here a second time ({first}remove one)")
            lines[key.value] = key.start_mark.line + 1

    def _scalar(self, node: yaml.ScalarNode) -> None:
        if node.tag in (_PREFIX + "int", _PREFIX + "float") and len(node.value) > MOST_DIGITS:
            raise self._error(node, f"a number has {len(node.value):,} digits ({MOST_DIGITS} at most)")
        if (
            node.style is None
            and node.tag in (_PREFIX + "int", _PREFIX + "float")
            and _SURPRISING.fullmatch(node.value)
        ):
            how = "as minutes or hours, to the base of 60" if ":" in node.value else "as octal"
            raise self._error(
                node,
                f"YAML reads {_cut(node.value)} {how}; write the number without leading zeros and colons, or in "
                f"quotes ('{_cut(node.value)}') if it is a name",
            )

    def _error(self, node: yaml.Node, what: str) -> UserError:
        return UserError(f"{_at(self._place, node.start_mark, self._lines)}: {what}")


def _at(place: str, mark: Any, lines: bool) -> str:
    return f"{place}:{mark.line + 1}:{mark.column + 1}" if lines and mark is not None else place


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = _one_line(error.problem or error.context or error)
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces, not with tabs"
    if "found another document" in problem:
        return "a second document begins here, after '---'; one file holds one"
    return problem


def _one_line(text: object) -> str:
    return _cut(" ".join(str(text).split()), 200)


def _cut(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
