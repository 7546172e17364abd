"""Conversations as records hold them, in one form: what a chat template takes.

A record's field holds a list of turns, in either of two spellings:

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}        ShareGPT's

A list of text parts (`[{"type": "text", "text": "4"}]`) is one text. A record may have `tools` beside it: the functions
that the assistant can call, as a list or as the JSON of one.

A conversation's canonical text, compact JSON with sorted keys, is what the rest of the project takes for the document:
it is hashed, held out and counted as any text is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError

CANONICAL_VERSION = 1
"""Of the canonical text; raised where a record would have another."""
CONVERSATIONS = ("messages", "conversations")
"""Fields that hold one where the configuration names none, in the order in which they are looked for."""
TOOLS = "tools"
"""Field that holds the functions that could be called, where a record has it."""
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_KEPT = ("name", "reasoning_content", "tool_calls", "tool_call_id")
"""Of a turn, besides its role and its content; templates know these."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the functions that could be called."""

    messages: list[dict[str, Any]]
    """Each with `role` (of ROLES) and `content` (a string; None where there are calls only)."""
    tools: list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The canonical text."""
        return json.dumps(
            {"messages": self.messages, **({"tools": self.tools} if self.tools else {})},
            ensure_ascii=False,
            sort_keys=True,
            separators=(",", ":"),
        )

    @property
    def plain(self) -> str:
        """What was said, without who said it."""
        return "\n\n".join(message["content"] for message in self.messages if message["content"])

    @classmethod
    def of(cls, text: str) -> Conversation:
        """From its canonical text."""
        found = json.loads(text)
        return cls(found["messages"], found.get("tools", []))


def conversation(turns: Any, tools: Any, field: str, place: str) -> Conversation:
    """From what a record's fields hold.

    Args:
        turns: what its field `field` holds.
        tools: what its field `tools` holds; None where it has none.

    Raises:
        UserError: it is no conversation; the message begins with `place` and names the turn.
    """
    if isinstance(turns, str):  # the JSON of a list
        try:
            turns = json.loads(turns)
        except ValueError:
            turns = None
    if not isinstance(turns, list):
        raise UserError(
            f"{place}: field '{field}' is not a list of turns; each turn is an object such as "
            f'{{"role": "user", "content": "…"}}: correct or remove the record, or set messages_field'
        )
    messages = [_message(turn, f"{place}, turn {number}") for number, turn in enumerate(turns, start=1)]
    return Conversation(messages, _tools(tools, place))


def _message(turn: Any, place: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise UserError(f"{place} is not an object with 'role' and 'content'; correct or remove the record")
    if turn.get("role") is not None:
        role, content = turn["role"], turn.get("content")
        known = role in ROLES
    elif turn.get("from") is not None:
        role, content = _SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None, turn.get("value")
        known = role is not None
    else:
        raise UserError(f"{place} has neither 'role' nor 'from', which say whose it is; correct or remove the record")
    if not known:
        named = str(turn.get("role") or turn.get("from"))[:40]
        raise UserError(
            f"{place} has the role {named!r}; known are {', '.join(ROLES)} (and ShareGPT's human, gpt, function_call, "
            f"observation): rename it"
        )
    further = {name: turn[name] for name in _KEPT if turn.get(name) is not None}
    if "tool_calls" in further:
        further["tool_calls"] = _calls(further["tool_calls"], place)
    return {"role": role, "content": _content(content, place, optional=bool(further.get("tool_calls"))), **further}


def _content(content: Any, place: str, *, optional: bool) -> str | None:
    if content is None and optional:
        return None
    if isinstance(content, list):
        parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if strange := next((part for part in content if isinstance(part, Mapping) and "text" not in part), None):
            kind = str(strange.get("type", "unknown"))[:40]
            raise UserError(f"{place} holds a part of type {kind!r}, and only text can be distilled; remove the record")
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else parts
    if not isinstance(content, str):
        raise UserError(f"{place} has no content that is a string; correct or remove the record")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is not Unicode
        half = f"\\u{ord(content[error.start]):04x}"
        raise UserError(f"{place} holds {half}, half a character; correct the record") from None
    return content


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{place}: its tool_calls are not a list of objects; correct or remove the record")
    return [_call(dict(call)) for call in calls if call]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """With its arguments as an object, as templates take them; OpenAI's interface writes their JSON."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            return {**call, "function": {**function, "arguments": parsed}}
    return {**call, "function": dict(function)}


def _tools(tools: Any, place: str) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise UserError(f"{place}: field 'tools' is a string that is no JSON; correct the record") from None
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError(f"{place}: field 'tools' is not a list of functions' schemas (objects); correct the record")
    return [dict(tool) for tool in tools]
