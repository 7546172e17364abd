"""Renders conversations by the teacher's own chat template, and says which of the text the assistant wrote.

If the template marks what the assistant generates (`{% generation %}`), its marks are taken. If not, each of the
assistant's turns is found by rendering the conversation up to it:

    turns before it, asking for an answer   <|user|>2 + 2?<|end|><|assistant|>
    turns up to it                          <|user|>2 + 2?<|end|><|assistant|>4<|end|>

Both must be how the whole conversation begins; what the second has more is the turn. Some templates write the last turn
unlike the others (with an empty thought, say). Then the end of the turn is found by putting a placeholder in place of
what it says. If that fails too, the template is refused, for a loss on the wrong tokens would not be noticed.

A text that spells a control token (`</s>` in a question about HTML) must not become that token. Before rendering, each
spelling is replaced by a placeholder; afterwards, its letters are encoded in the placeholder's place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ddk.errors import UserError, first_line
from ddk.values import BoolArray, Int32Array
from storage.corpus.conversations import Conversation
from tasks.packing.encoder import TextEncoder
from tasks.planning.store_plan import chat_template

TODAY = datetime(2025, 1, 1, tzinfo=UTC)
"""What a template takes for the current date: blocks must not depend on the day on which they were packed."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE = range(0xE000, 0xF8FF)
"""Characters that no text should hold, for placeholders."""

Span = tuple[int, int]
"""Characters of a rendered conversation, from the first on, up to and without the second."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as tokens."""

    ids: Int32Array
    """Token ids [n]."""
    loss: BoolArray
    """[n], whether predicting the token carries loss: true for those that the assistant wrote."""


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        args: further arguments of the template.
        domain: for messages.

    Raises:
        UserError: the tokenizer has no template, or cannot tell where in a text its tokens lie.
    """

    def __init__(self, tokenizer: Any, args: Mapping[str, Any], domain: str) -> None:
        chat_template(domain, tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"domain '{domain}' has format: messages, and the tokenizer of '{tokenizer.name_or_path}' is "
                f"not a fast one, so that the assistant's tokens cannot be told from others; add its tokenizer.json to "
                f"that folder"
            )
        self._tokenizer = tokenizer
        # The special tokens by name, as transformers gives them to a template.
        self._args = {**tokenizer.special_tokens_map, **args, "strftime_now": TODAY.strftime}

    def encode(self, conversation: Conversation, encoder: TextEncoder, place: str) -> Encoded:
        """Tokens, as the template and the tokenizer give them, and marks.

        Args:
            encoder: of the same tokenizer, with control tokens.
            place: where the record lies, for messages.

        Raises:
            UserError: the template refuses the conversation, leaves out what was said, or does not show where the
                assistant's turns lie.
        """
        protected = _Protected(conversation, encoder.special)
        text, spans = self._render(protected, place, encoder)
        return _encode(text, spans, protected, encoder)

    def _render(self, protected: _Protected, place: str, encoder: TextEncoder) -> tuple[str, list[Span]]:
        messages, tools = protected.messages, protected.tools
        template = self._tokenizer.get_chat_template(tools=tools or None)

        def render(messages: Sequence[Mapping[str, Any]], *, ask: bool = False, marked: bool = False) -> Any:
            texts, found = render_jinja_template(
                [list(messages)],
                tools=tools or None,
                chat_template=template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=marked,
                **self._args,
            )
            return (texts[0], found[0]) if marked else texts[0]

        marked = _MARKS.search(template) is not None
        try:
            if marked:
                text, found = render(messages, marked=True)
                spans = [(start, end) for start, end in found if end > start]
            else:
                text = render(messages)
        except Exception as error:  # the template is a program
            raise _refused(place, error) from error
        _check_said(text, messages, place)
        if marked:
            if not spans:
                raise UserError(
                    f"{place}: the chat template marks what the assistant generates ({{% generation %}}), and marks "
                    f"nothing in this conversation; correct the template, or remove its marks"
                )
            return text, spans
        return text, _turns(text, messages, render, encoder, place)


def has_answer(conversation: Conversation) -> bool:
    """Whether the assistant says anything, so that something carries loss."""
    return any(
        message["role"] == "assistant" and (message["content"] or message.get("tool_calls"))
        for message in conversation.messages
    )


def _refused(place: str, error: Exception) -> UserError:
    # The template's own words, such as 'Conversation roles must alternate'.
    said = first_line(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {first_line(error)}"
    return UserError(
        f"{place}: the teacher's chat template refuses the conversation ({said}); correct or remove the record, or "
        f"give the template what it asks for (template_args)"
    )


def _check_said(text: str, messages: Sequence[Mapping[str, Any]], place: str) -> None:
    """That the template has not dropped what the system or the user said."""
    for number, message in enumerate(messages, start=1):
        said = (message["content"] or "").strip()
        if message["role"] in ("system", "developer", "user") and said not in text:
            raise UserError(
                f"{place}, turn {number}: the teacher's chat template leaves out what the {message['role']} says; "
                f"remove such turns, or correct the template"
            )


def _turns(
    text: str,
    messages: Sequence[Mapping[str, Any]],
    render: Callable[..., str],
    encoder: TextEncoder,
    place: str,
) -> list[Span]:
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not (message["content"] or message.get("tool_calls")):
            continue
        try:
            before = render(messages[:number], ask=True)
            upto = render(messages[: number + 1])
        except Exception as error:  # the template is a program
            raise _refused(f"{place}, turn {number + 1}", error) from error
        start = len(before) if text.startswith(before) else None
        end = len(upto) if text.startswith(upto) else _end(text, messages, number, render)
        answer = (message["content"] or "").strip()[-20:]
        if start is None or end is None or end <= start or (answer and answer not in text[start:end]):
            raise UserError(
                f"{place}, turn {number + 1}: which of the text the assistant wrote cannot be told, as the teacher's "
                f"chat template writes the turns before it differently once the turn follows; put {{% generation %}} "
                f"marks into the template (chat_template.jinja), or split the conversation after each answer"
            )
        spans.append((start, start + len(_until_control(text[start:end], encoder))))
    return spans


def _until_control(turn: str, encoder: TextEncoder) -> str:
    """Without the white space behind the token that ends the turn: nothing is generated after it."""
    bare = turn.rstrip()
    return bare if any(bare.endswith(token) for token in encoder.control_tokens) else turn


def _end(text: str, messages: Sequence[Mapping[str, Any]], number: int, render: Callable[..., str]) -> int | None:
    """Where a turn ends that is written in another way where it is the last; None if that cannot be told."""
    if messages[number]["content"] is None:
        return None
    mark = _unused(text) * 3
    changed = [*messages[:number], {**messages[number], "content": mark}, *messages[number + 1 :]]
    try:
        whole, last = render(changed), render(changed[: number + 1])
    except Exception:  # the template is a program, and minds what is said
        return None
    if whole.count(mark) != 1 or last.count(mark) != 1:
        return None
    rest, ending = whole.partition(mark)[2], last.partition(mark)[2]
    if not rest.startswith(ending) or not text.endswith(rest):
        return None
    return len(text) - len(rest) + len(ending)


class _Protected:
    """A conversation with placeholders for what spells a control token.

    Args:
        special: matches a spelling; None where a spelling stands for the token.
    """

    def __init__(self, conversation: Conversation, special: re.Pattern[str] | None) -> None:
        self.spelled: list[str] = []
        self._special, self._mark = special, ""
        self.messages: list[dict[str, Any]] = conversation.messages
        self.tools: list[dict[str, Any]] = conversation.tools
        text = conversation.text
        if special is not None and special.search(text):
            self._mark = _unused(text)
            self.messages, self.tools = self._without(self.messages), self._without(self.tools)

    def _without(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(self._placeholder, value) if self._special is not None else value
        if isinstance(value, Mapping):
            return {name: one if name == "role" else self._without(one) for name, one in value.items()}
        return [self._without(one) for one in value] if isinstance(value, list) else value

    def _placeholder(self, match: re.Match[str]) -> str:
        self.spelled.append(match[0])
        return f"{self._mark}{len(self.spelled) - 1}{self._mark}"

    def parts(self, text: str) -> list[tuple[str, int, str | None]]:
        """A rendered text, cut at the placeholders: each part, where it begins, and what was spelled in its place."""
        if not self.spelled:
            return [(text, 0, None)]
        parts: list[tuple[str, int, str | None]] = []
        at = 0
        for match in re.finditer(f"{self._mark}([0-9]+){self._mark}", text):
            parts += [(text[at : match.start()], at, None), (match[0], match.start(), self.spelled[int(match[1])])]
            at = match.end()
        return [part for part in (*parts, (text[at:], at, None)) if part[0]]


def _unused(text: str) -> str:
    return next(chr(code) for code in _PRIVATE if chr(code) not in text)


def _encode(text: str, spans: Sequence[Span], protected: _Protected, encoder: TextEncoder) -> Encoded:
    ids, starts = [], []
    for part, at, spelled in protected.parts(text):
        if spelled is None:
            found, offsets = encoder.with_starts(part)
            ids.append(found)
            starts.append(offsets + at)
        else:
            ids.append(encoder.as_text(spelled))
            starts.append(np.full(len(ids[-1]), at))
    began = np.concatenate(starts)
    loss = np.zeros(len(began), dtype=np.bool_)
    for start, end in spans:
        loss |= (began >= start) & (began < end)
    return Encoded(np.concatenate(ids), loss)
