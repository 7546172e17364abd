"""Communication between an untrusted program and its tests: two processes, each in its own sandbox.

The tests run in one process (`judge`), the program in the other (`serve`). The tests get only values from the program.
Plain values (numbers, texts, lists, …) are copied and become ordinary Python objects in the tests' process, so that a
value cannot claim to equal the expected one. Any other object stays in the program's process, and the tests hold a
`Remote`, which is equal only to itself. The tests' text and the verdict are never in the program's process. Whatever a
program does to its own interpreter, it can influence the tests only by the values that it returns.

A message is its length (4 bytes) and JSON. Only the standard library is used, and nothing of the project.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import decimal
import fractions
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

LONGEST = 64 << 20
"""Bytes of a message."""
_CHANGED = (list, dict, set, bytearray)


class EndedError(Exception):
    """The other process has ended, or said what is no message."""


def send(channel: int, message: Any) -> None:
    content = json.dumps(message).encode()
    content = len(content).to_bytes(4, "big") + content
    while content:
        content = content[os.write(channel, content) :]


def receive(channel: int) -> Any:
    size = int.from_bytes(_read(channel, 4), "big")
    if size > LONGEST:
        raise EndedError(f"a message of {size} bytes")
    return json.loads(_read(channel, size))


def _read(channel: int, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        part = os.read(channel, min(size - len(content), 1 << 20))
        if not part:
            raise EndedError("nothing more came")
        content += part
    return bytes(content)


def encode(value: Any, keep: Callable[[Any], Any]) -> Any:
    """A value as JSON data.

    Args:
        keep: what stands for a value that is not plain.
    """
    for kinds, encoded in _PLAIN:
        if isinstance(value, kinds):
            return encoded(value)
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, keep) for item in value]}
    return keep(value)


# An instance of a subclass becomes one of Python's own.
_PLAIN: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((bool, type(None)), lambda value: value),
    (str, str.__str__),
    (float, float.__float__),
    (int, lambda value: {"int": hex(int.__int__(value))} if abs(value) >> 62 else int.__int__(value)),
    (bytes, lambda value: {"bytes": value.hex()}),
    (bytearray, lambda value: {"bytearray": value.hex()}),
    (complex, lambda value: {"complex": [value.real, value.imag]}),
    (range, lambda value: {"range": [hex(number) for number in (value.start, value.stop, value.step)]}),
    (fractions.Fraction, lambda value: {"fraction": str(value)}),
    (decimal.Decimal, lambda value: {"decimal": str(value)}),
)
_SEQUENCES: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "keys": type({}.keys()),
    "items": type({}.items()),
    "values": type({}.values()),
}
_MADE: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "items": lambda items: dict(items).items(),
    "values": lambda items: dict(enumerate(items)).values(),
    "iterator": iter,
}
_READ: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda numbers: range(*(int(number, 16) for number in numbers)),
    "fraction": fractions.Fraction,
    "decimal": decimal.Decimal,
}


def decode(data: Any, kept: Callable[[Any], Any]) -> Any:
    """The value of JSON data.

    Args:
        kept: the value for what `keep` gave.
    """
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "dict":
        return {decode(key, kept): decode(item, kept) for key, item in content}
    if name in _MADE:
        return _MADE[name]([decode(item, kept) for item in content])
    return _READ[name](content) if name in _READ else kept(data)


# ---- the program's side


def serve(channel: int, program: str) -> None:
    """Run the program, say how it ended, then do what the tests ask for until they end."""
    space: dict[str, Any] = {"__name__": "__main__"}
    kept: list[Any] = []
    places: dict[int, int] = {}

    def keep(value: Any) -> Any:
        if id(value) not in places:
            places[id(value)] = len(kept)
            kept.append(value)
        return {"kept": places[id(value)]}

    def find(data: Any) -> Any:
        return kept[data["kept"]]

    def do(request: Any) -> Any:
        if "global" in request:
            return [encode(space[request["global"]], keep) if request["global"] in space else {"missing": True}]
        positional, named = (decode(request[part], find) for part in ("args", "named"))
        given = [*positional, *named.values()]
        before = [encode(value, keep) if type(value) in _CHANGED else None for value in given]
        result = encode(_OPERATIONS[request["do"]](kept[request["of"]], *positional, **named), keep)
        after = [encode(value, keep) if type(value) in _CHANGED else None for value in given]
        return [result, {str(place): new for place, new in enumerate(after) if new != before[place]}]

    try:
        exec(compile(program, "program.py", "exec"), space)  # noqa: S102 (what this is for)
    except BaseException as error:
        send(channel, {"raised": type(error).__name__})
        return
    send(channel, {"done": []})
    while True:
        try:
            answer = {"done": do(receive(channel))}
        except EndedError:
            return
        except BaseException as error:
            answer = {"raised": type(error).__name__}
        send(channel, answer)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda value, *args, **named: value(*args, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda value, key: value[key],
    "set item": lambda value, key, item: value.__setitem__(key, item),
    "length": len,
    "iterate": iter,
    "next": next,
    "text": str,
}


# ---- the tests' side


def judge(channel: int, tests: str, setup: str, entries: Sequence[str]) -> str | None:
    """Run the tests of the program at the other end.

    Args:
        setup: what the tests need besides; it runs here.
        entries: names that are the program's in the tests, whatever they mean elsewhere.

    Returns:
        None if the tests came to their end, else the name of the exception that ended them.
    """
    link = _Link(channel)
    try:
        link.answer()
        space = _space(link, tests, setup, entries)
        exec(compile(tests, "tests.py", "exec"), space)  # noqa: S102 (what this is for)
    except _ProgramError as error:
        return error.name
    except (EndedError, BrokenPipeError, ConnectionResetError):
        return "killed"
    except BaseException as error:
        return type(error).__name__
    return None


class _ProgramError(Exception):
    """An exception of the program that Python does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Link:
    """Asks the program."""

    def __init__(self, channel: int) -> None:
        self._channel = channel

    def ask(self, what: str, remote: Remote, args: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Any:
        named = dict(named or {})
        values = {"args": encode(list(args), self._keep), "named": encode(named, self._keep)}
        send(self._channel, {"do": what, "of": object.__getattribute__(remote, "_place"), **values})
        result, changed = self.answer()
        given = [*args, *named.values()]
        for place, new in changed.items():
            _change(given[int(place)], decode(new, self._kept))
        return decode(result, self._kept)

    def global_of(self, name: str) -> tuple[bool, Any]:
        send(self._channel, {"global": name})
        (found,) = self.answer()
        missing = found == {"missing": True}
        return not missing, None if missing else decode(found, self._kept)

    def answer(self) -> Any:
        message = receive(self._channel)
        if "raised" in message:
            raise _exception(str(message["raised"]))
        return message["done"]

    def _keep(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return {"kept": object.__getattribute__(value, "_place")}
        if isinstance(value, Iterator):
            return {"iterator": [encode(item, self._keep) for item in value]}
        raise TypeError(f"a {type(value).__name__} of the tests cannot be given to the program")

    def _kept(self, data: Any) -> Remote:
        return Remote(self, int(data["kept"]))


class Remote:
    """An object of the program's process."""

    __slots__ = ("_link", "_place")

    def __init__(self, link: _Link, place: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_place", place)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return _ask("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        return _ask("get", self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        _ask("set", self, (name, value))

    def __getitem__(self, key: Any) -> Any:
        return _ask("item", self, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask("set item", self, (key, value))

    def __contains__(self, item: Any) -> bool:
        # Looked for here: the program would be told what is wanted, and could say yes.
        return any(one == item for one in self)

    def __len__(self) -> int:
        return int(_ask("length", self))

    def __iter__(self) -> Any:
        return _ask("iterate", self)

    def __next__(self) -> Any:
        return _ask("next", self)

    def __str__(self) -> str:
        return str(_ask("text", self))

    __repr__ = __str__


def _ask(what: str, remote: Remote, args: Sequence[Any] = (), named: Mapping[str, Any] | None = None) -> Any:
    link: _Link = object.__getattribute__(remote, "_link")
    try:
        return link.ask(what, remote, args, named)
    except StopIteration:
        if what == "next":
            raise
        # Else it would end a loop of the tests that had only begun.
        raise RuntimeError("the program raised StopIteration") from None


def _exception(name: str) -> BaseException:
    found = getattr(builtins, name, None)
    if isinstance(found, type) and issubclass(found, Exception):
        with contextlib.suppress(TypeError):  # a few take arguments, which are not known here
            return found()
    return _ProgramError(name)


def _change(value: Any, new: Any) -> None:
    """What the program has done to an argument."""
    if type(value) is not type(new):
        raise EndedError("an argument became another thing")
    if isinstance(value, list | bytearray):
        value[:] = new
    else:
        value.clear()
        value.update(new)


def _space(link: _Link, tests: str, setup: str, entries: Sequence[str]) -> dict[str, Any]:
    """The names that the tests see: of the setup, of the program, and of the standard library.

    Those of Python and of its library are the tests' own: else a program could bring a `set` that makes all equal.
    """
    space: dict[str, Any] = {"__name__": "tests"}
    exec(compile(setup, "setup.py", "exec"), space)  # noqa: S102 (it comes with the tests)
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    for name in sorted(used | set(entries)):
        if name not in entries and (name in space or hasattr(builtins, name)):
            continue
        there, value = link.global_of(name)
        if not there:
            continue
        if name not in entries and name in sys.stdlib_module_names:
            value = __import__(name)
        elif name not in entries and hasattr(math, name):
            value = getattr(math, name)
        space[name] = value
    return space
