from __future__ import annotations

import pytest

from storage.fingerprint import differences, fingerprint

INPUTS = {"seq_len": 512, "files": [{"name": "a", "sha256": "00"}], "text": "三", "eos": None, "mass": 0.1}


def test_a_fingerprint_is_fixed_for_ever() -> None:
    assert fingerprint(INPUTS) == "041c5c810d1a5312"


def test_the_order_of_keys_does_not_matter_and_that_of_lists_does() -> None:
    assert fingerprint(dict(reversed(INPUTS.items()))) == fingerprint(INPUTS)
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint({"a": (1, 2)}) == fingerprint({"a": [1, 2]})


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 513},
        {"seq_len": "512"},
        {"files": []},
        {"text": "二"},
        {"eos": 0},
        {"mass": 0.1000000001},
        {"more": None},
    ],
)
def test_every_field_matters(change) -> None:
    assert fingerprint({**INPUTS, **change}) != fingerprint(INPUTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"x"])
def test_what_is_not_plain_json_is_refused(value) -> None:
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"a": value})


def test_differences_name_the_nested_fields() -> None:
    old = {"a": 1, "b": {"c": [1], "d": {"e": "x"}}, "gone": 1, "none": None, "same": {"x": 1}}
    new = {"a": 2, "b": {"c": [1], "d": {"e": "y"}}, "new": None, "none": {"x": 1}, "same": {"x": 1}}
    assert differences(old, new) == [
        "a: 1 → 2",
        "b.d.e: 'x' → 'y'",
        "gone: 1 → (absent)",
        "new: (absent) → None",
        "none: None → {'x': 1}",
    ]
    assert differences(old, dict(old)) == []
