"""A sealed file is read as it was written, where it was written, or not at all."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from storage.errors import FormatVersionError, StoreDamagedError
from storage.files import uri
from storage.files.sealed import Sealed, sealed_rows, unsealed_rows

KIND = Sealed(what="letter", version=2, remedy="write {url} again, in {folder}")
CONTENT = {"seven": 7, "third": 1 / 3, "名": ["a", None, True, {"deep": -0.0}], "question": "?" * 63}


def test_what_was_written_is_read(place: str) -> None:
    url = f"{place}/a.json"
    assert KIND.read(url, "a") is None
    KIND.write(url, CONTENT, "a")
    assert KIND.read(url, "a") == {**CONTENT, "format_version": 2}
    assert KIND.read(url) == KIND.read(url, "a")
    assert not KIND.create(url, {"other": 1}, "a")
    assert KIND.create(url, CONTENT, "a"), "our own, where a PUT is made again"
    assert KIND.read_many([url, f"{place}/b.json"], ["a", "b"]) == [KIND.read(url), None]


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    url = f"{tmp_path}/a.json"
    KIND.write(url, CONTENT, "a")
    whole, rng = Path(url).read_bytes(), random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        Path(url).write_bytes(changed)
        with pytest.raises((StoreDamagedError, FormatVersionError), match=rf"{url} (is|has) "):
            KIND.read(url, "a")
    for changed in (whole[:-1], whole + b" ", whole.replace(b"\n", b"\r\n"), b"", b"null", b"[]", b"{}"):
        Path(url).write_bytes(changed)
        with pytest.raises(StoreDamagedError, match=rf"write {url} again, in {tmp_path}"):
            KIND.read(url, "a")


def test_an_intact_file_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    KIND.write(f"{tmp_path}/a.json", CONTENT, "the first")
    with pytest.raises(StoreDamagedError, match="it is that of the first, and this is the place of the second"):
        KIND.read(f"{tmp_path}/a.json", "the second")


def test_other_versions_say_what_to_do(tmp_path: Path) -> None:
    url = f"{tmp_path}/a.json"
    Sealed(what="letter", version=3, remedy="").write(url, CONTENT, "a")
    with pytest.raises(FormatVersionError, match=r"has format version 3, and this .* reads version 2; update"):
        KIND.read(url, "a")
    Sealed(what="letter", version=1, remedy="").write(url, CONTENT, "a")
    with pytest.raises(FormatVersionError, match=r"of an older version of ddk, .*; write .* again"):
        KIND.read(url, "a")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"seal": {"of": "\\ud800", "sha256": "\\ud800"}, "format_version": 2}',
        b'{"seal": 7, "format_version": 2}',
        b'{"seal": {"of": [], "sha256": {}}, "format_version": 2}',
        b'{"format_version": true}',
    ],
)
def test_what_no_project_writes_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StoreDamagedError, match=r"a\.json is no"):
        KIND.read(f"{tmp_path}/a.json", "a")


def test_a_table_stays_a_list(tmp_path: Path) -> None:
    rows = [{"ce": 2.5, "step": 1}, {"ce": float("nan"), "step": 2}]
    raw = sealed_rows(rows, "a")
    assert json.loads(raw)[0] == rows[0]
    assert str(unsealed_rows("here", raw, "a", "remedy")) == str(rows)
    assert unsealed_rows("here", sealed_rows([], "a"), "a", "remedy") == []
    for changed in (raw.replace(b"2.5", b"2.6"), b"[]", b"[7]", b'[{"step": 1}]', raw[:-3]):
        with pytest.raises(StoreDamagedError, match=r"here is no.*; remedy"):
            unsealed_rows("here", changed, "a", "remedy")
    with pytest.raises(StoreDamagedError, match="it is that of a, and this is the place of b"):
        unsealed_rows("here", raw, "b", "remedy")


def test_a_content_that_holds_the_mark_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds what marks the place of its digest"):
        KIND.write(f"{tmp_path}/a.json", {"a": "?" * 64}, "a")
    assert uri.list_names(str(tmp_path)) == []
