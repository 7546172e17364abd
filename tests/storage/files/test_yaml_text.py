"""What YAML would silently turn into something else is refused, with place and remedy."""

from __future__ import annotations

import datetime

import pytest

from ddk.errors import UserError
from storage.files.yaml_text import MOST_CHARACTERS, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "c.yaml:3:1: the key 'a' stands here a second time (first in line 1; remove one)"),
        ("x: [{y: {a: 1, a: 1}}]", "c.yaml:1:16: the key 'a' stands here a second time"),
        ("d: {en: 1, no: 2}", "c.yaml:1:12: YAML reads the key no as true or false; write it in quotes: 'no'"),
        ("0777: 1", "YAML reads the key 0777 as a number; write it in quotes: '0777'"),
        ("~: 1", "YAML reads the key ~ as nothing"),
        ("? [a]\n: 1", "a key must be a name"),
        ("k: 010", "c.yaml:1:4: YAML reads 010 as octal; write the number without leading zeros"),
        ("k: [1:30]", "YAML reads 1:30 as minutes or hours, to the base of 60"),
        ("a: " + "[" * 100_000, "c.yaml: it is nested too deeply (50 levels at most)"),
        ("a: " + "[" * 60 + "]" * 60, "c.yaml:1:53: it is nested too deeply (50 levels at most)"),
        (BOMB, "its aliases unfold to more than 100,000 values; write them out"),
        ("a: &a {b: *a}", "c.yaml:1:4: an alias (*name) occurs within its own value"),
        ("a: &a {<<: *a}", "an alias (*name) occurs within its own value"),
        ("a: " + "9" * 5000, "c.yaml:1:4: a number has 5,000 digits"),
        ("a: 0b_", "c.yaml: not valid YAML"),
        ("a: [\n", "c.yaml:2:1: not valid YAML (expected the node content"),
        ("a:\n\tb: 1\n", "c.yaml:2:1: not valid YAML (found character '\\t' that cannot start any token; indent with"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2:1: not valid YAML (a second document begins here"),
        ("a: \0", "c.yaml: not valid YAML (character 0x00 is no text)"),
        ("a: !!python/object:os.system x", "c.yaml:1:4: not valid YAML (could not determine a constructor"),
        ("#" * (MOST_CHARACTERS + 1), "c.yaml: it is larger than 1 MiB; is it the right file?"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_yaml(text, "c.yaml")
    message = str(refused.value)
    assert message.startswith(says) or says in message
    assert len(message) < 300
    assert "\n" not in message


def test_what_is_taken() -> None:
    text = """
        base: &base {steps: 3, rate: 1.5e-3, names: ["010", 2024-01-01, 0x10]}
        own: {<<: *base, steps: 4}
        again: {<<: *base, on_time: yes}
    """
    base = {"steps": 3, "rate": 0.0015, "names": ["010", "2024-01-01", 16]}
    found = parse_yaml(text, "c.yaml")
    assert found == {"base": base, "own": {**base, "steps": 4}, "again": {**base, "on_time": True}}
    assert not any(isinstance(name, datetime.date) for name in found["base"]["names"])
    assert parse_yaml("", "c.yaml") is None
