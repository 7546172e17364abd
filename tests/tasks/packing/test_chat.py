from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from byte_tokenizers import byte_tokenizer
from chat_templates import CHATML, COUNTED, DROPPED, SHAPES, TOKENS, with_marks, without_marks
from tokenizers import AddedToken

from ddk.errors import UserError
from ddk.student import load_tokenizer
from storage.corpus.conversations import Conversation, conversation
from storage.corpus.documents import iter_documents
from storage.corpus.domain import DomainConfig
from storage.corpus.files import resolve_files
from tasks.packing.chat import TODAY, ChatTemplate
from tasks.packing.encoder import TextEncoder
from tasks.packing.tokenizing import tokenize_documents

PLACE = "chats.jsonl, line 1"
TALK = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": " and 3 + 3? "},
    {"role": "assistant", "content": "  6, of course.\n"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def tokenizer(folder: Path, shape: str, template: str) -> Any:
    named = TOKENS.get(shape, [])
    config = {"bos_token": named[0]} if shape in ("headers", "inst", "turns") else {}
    config |= dict(zip(["bos_token", "eos_token"], named[:2], strict=True)) if shape == "inst" else {}
    thoughts = [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    byte_tokenizer(folder, added=[*named, *thoughts], **config)
    found = load_tokenizer(str(folder))
    found.chat_template = template
    return found


def encoded(tokenizer: Any, messages: list[dict[str, Any]], *, control: bool = False, **options: Any) -> Any:
    template = ChatTemplate(tokenizer, options.pop("args", {}), "chat")
    encoder = TextEncoder(tokenizer, control=True, spelled_is_token=control)
    return template.encode(Conversation(messages, options.pop("tools", [])), encoder, PLACE)


def answers(tokenizer: Any, found: Any) -> list[str]:
    """What carries loss, run by run."""
    texts, run = [], []
    for token, mark in [*zip(found.ids.tolist(), found.loss.tolist(), strict=True), (0, False)]:
        if mark:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            run = []
    return texts


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_marks_are_those_of_transformers(tmp_path: Path, shape: str, system: bool) -> None:
    """With the template's marks and without them: found turn by turn, they are the same."""
    messages = [SYSTEM, *TALK] if system else TALK
    marked, bare = (
        tokenizer(tmp_path / name, shape, change(SHAPES[shape]))
        for name, change in (("marked", with_marks), ("bare", without_marks))
    )
    if shape == "turns" and system:
        for one in (marked, bare):
            with pytest.raises(
                UserError, match=rf"{PLACE}: the teacher's chat template .* \(System role not supported"
            ):
                encoded(one, messages)
        return
    reference = marked.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, strftime_now=TODAY.strftime
    )
    wanted = np.array(reference["assistant_masks"], dtype=np.bool_)
    assert 0 < wanted.sum() < len(wanted)
    for one in (marked, bare):
        found = encoded(one, messages)
        assert found.ids.tolist() == reference["input_ids"]
        if shape == "plain" and one is bare:
            assert answers(bare, found) == ["4\n\n", "  6, of course.\n\n\n"]
        np.testing.assert_array_equal(found.loss, wanted)


def test_calls_and_tools_are_written(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "name": "add"},
        {"role": "assistant", "content": "It is 4."},
    ]
    found = conversation(turns, [{"name": "add"}], "messages", PLACE)
    one = tokenizer(tmp_path, "chatml", without_marks(CHATML))
    written = encoded(one, found.messages, tools=found.tools)
    assert answers(one, written) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ]
    text = one.decode(written.ids)
    assert '# Tools\n{"name": "add"}' in text
    assert "<|im_start|>tool\n4<|im_end|>" in text
    assert "2 + 2?" in text


def test_what_is_said_cannot_end_a_turn(tmp_path: Path) -> None:
    """A question about ChatML spells its tokens, and they stay letters; the template's own are tokens."""
    one = tokenizer(tmp_path, "chatml", without_marks(CHATML))
    start, end = one.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    asked = [
        SYSTEM,
        {"role": "user", "content": "What is <|im_end|>\n<|im_start|>system?"},
        {"role": "assistant", "content": "<|im_end|> ends a turn, <think> begins a thought."},
    ]
    found = encoded(one, asked)
    assert (found.ids == start).sum() == (found.ids == end).sum() == 3
    assert answers(one, found) == ["<|im_end|> ends a turn, <think> begins a thought.<|im_end|>"]
    assert one.decode(found.ids) == one.apply_chat_template(asked, tokenize=False)
    assert one.convert_tokens_to_ids("<think>") in found.ids
    meant = encoded(one, asked, control=True)
    assert (meant.ids == end).sum() == 5
    assert meant.ids.tolist() == one.apply_chat_template(asked, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (COUNTED, TALK, rf"{PLACE}, turn 2: which of the text the assistant wrote cannot be told.*generation %"),
        (DROPPED, [SYSTEM, *TALK], rf"{PLACE}, turn 1: the teacher's chat template leaves out what the system says"),
        ("{{ 1 / 0 }}", TALK, rf"{PLACE}: .* refuses the conversation \(ZeroDivisionError: division by zero\)"),
        (
            "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
            TALK,
            "marks nothing",
        ),
    ],
)
def test_a_template_that_cannot_be_trusted_is_refused(tmp_path: Path, template: str, messages, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoded(tokenizer(tmp_path, "chatml", template), messages)


def test_a_template_is_needed(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    with pytest.raises(
        UserError, match=r"'chat' has format: messages, and the tokenizer of .* has no chat template; add"
    ):
        ChatTemplate(load_tokenizer(str(tmp_path)), {}, "chat")


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    one = tokenizer(tmp_path, "chatml", "{{ mood }}: " + without_marks(CHATML))
    assert one.decode(encoded(one, TALK, args={"mood": "calm"}).ids).startswith("calm: <|im_start|>system")


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2 + 2?"},
    {"from": "gpt", "value": "4"},
]
OPENAI = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_files_of_conversations(tmp_path: Path, suffix: str) -> None:
    """Both spellings give the same blocks; one without an answer is left out, and said."""
    one = tokenizer(tmp_path / "t", "chatml", without_marks(CHATML))
    results = []
    for name, turns in (("messages", OPENAI), ("conversations", SHAREGPT)):
        rows = [{name: turns}, {name: turns[:2]}, {name: turns}]
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        config = DomainConfig.model_validate({"train": str(path), "validation_fraction": 0.5, "format": "messages"})
        unanswered: list[int] = []
        files, split = (
            resolve_files([str(path)], "chat", config.fields),
            config.model_copy(update={"validation_fraction": 0.0}),
        )
        results.append(
            list(tokenize_documents(files, split, "train", one, domain="chat", on_unanswered=unanswered.append))
        )
        assert unanswered == [1]
        assert next(document.text for document in iter_documents(files[0], config.fields)) == (
            '{"messages":[{"content":"Be brief.","role":"system"},{"content":"2 + 2?","role":"user"},'
            '{"content":"4","role":"assistant"}]}'
        )
    for first, second in zip(*results, strict=True):
        assert first.key == second.key
        assert first.whole
        np.testing.assert_array_equal(first.ids, second.ids)
        np.testing.assert_array_equal(first.loss, second.loss)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            "line 1: no field 'messages' or 'conversations', which hold a conversation; set messages_field",
        ),
        ({"messages": {"role": "user"}}, "line 1: field 'messages' is not a list of turns"),
        ({"messages": ["hello"]}, "line 1, turn 1 is not an object"),
        ({"messages": [{"content": "a"}]}, "line 1, turn 1 has neither 'role' nor 'from'"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "line 1, turn 1 has the role 'narrator'; known are"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 1, turn 1 has no content that is a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 holds a part of type 'image'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "turn 1 holds .*half a character"),
        ({"messages": [], "tools": "{"}, "field 'tools' is a string that is no JSON"),
        ({"messages": [], "tools": [3]}, "field 'tools' is not a list of functions' schemas"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]}, "its tool_calls are not a list"),
    ],
)
def test_a_record_that_is_no_conversation_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    config = DomainConfig.model_validate({"train": "a", "validation": "b", "format": "messages"})
    (file,) = resolve_files([f"{tmp_path}/a.jsonl"], "chat", config.fields)
    with pytest.raises(UserError, match=message):
        list(iter_documents(file, config.fields))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "messages", "prompt_field": "q"}, "marks the assistant's turns itself; leave prompt_field out"),
        ({"format": "messages", "text_field": "chat"}, "write messages_field: chat instead of text_field"),
        ({"format": "messages", "targets": "topk"}, "format: messages applies only to documents"),
        ({"messages_field": "chat"}, "messages_field goes with format: messages"),
        ({"template_args": {"a": 1}}, "template_args goes with format: messages"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainConfig.model_validate({"train": "a.jsonl", "validation": "b.jsonl", **settings})
