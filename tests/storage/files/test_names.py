"""Names from data, before they become paths."""

from __future__ import annotations

from typing import Any

import pytest

from storage.errors import StoreDamagedError
from storage.files.names import plain_name, plain_path, why_not_plain

PLAIN = ["rank-00000.safetensors", "math~Algebra~Linear=20algebra.zarr", "0a1b.2", "...", ".hidden", "数学 1", "a@b+c"]
LEADS_OUT = ["", ".", "..", "../x", "/etc/passwd", "a/b", "a/../../b", "a\\..\\b", "a/", "//host/share"]
READ_AS_MORE = [
    *("C:x", "x::file:", "a*", "a?versionId=b", "[a]", "a#b", "a%2e%2e%2fb", "a\nb", "a\0", "a\x1b[31m", "a\u202eb"),
    *(" a", "a ", "\ud800", "a" * 256, "é" * 128, '"', "<img>", "a|b"),
]
NO_TEXT: list[Any] = [None, 3, True, ["a"], {"a": 1}, b"a"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_name_is_used_as_it_is(name: str) -> None:
    assert plain_name(name, "s3://b/state.json") == name
    assert plain_path(f"report/{name}", "s3://b/state.json") == f"report/{name}"


@pytest.mark.parametrize("name", LEADS_OUT + READ_AS_MORE + NO_TEXT)
def test_another_name_is_refused_with_its_place(name: Any) -> None:
    assert why_not_plain(name) is not None
    with pytest.raises(StoreDamagedError, match=r"^s3://b/s\.json names the file .+; restore s3://b") as error:
        plain_name(name, "s3://b/s.json")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a/b:c", "a/*", "\\a", *NO_TEXT])
def test_a_path_stays_below_its_folder(path: Any) -> None:
    with pytest.raises(StoreDamagedError, match=r"^m\.json names the file"):
        plain_path(path, "m.json")
