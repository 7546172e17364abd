from __future__ import annotations

import json
import os
import time
from pathlib import Path

import fsspec
import pytest

from ddk.errors import UserError
from storage.files import digests
from storage.files.digests import DigestCache, digest

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def put(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed, in order."""
    calls: list[str] = []

    def counting(url: str) -> str:
        calls.append(url)
        return digest(url)

    monkeypatch.setattr(digests, "digest", counting)
    return calls


def later() -> float:
    return time.time() + 10


def test_digest(tmp_path: Path) -> None:
    assert digest(put(tmp_path / "a", b"")) == EMPTY
    with pytest.raises(UserError, match="none is no longer there"):
        digest(f"{tmp_path}/none")


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, hashed: list[str]) -> None:
    store, file = f"{tmp_path}/state/digests.json", put(tmp_path / "a.txt", b"one")
    other = put(tmp_path / "b.txt", b"")
    first = DigestCache(store, later).get(file)
    assert DigestCache(store, later).get_all([other, file]) == {other: EMPTY, file: first}
    assert hashed == [file, other]
    stat = os.stat(file)
    Path(file).write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same modification time
    second = DigestCache(store, later).get(file)
    assert second == digest(file) != first
    assert DigestCache(store, later).get_all([file, other]) == {file: second, other: EMPTY}
    assert hashed == [file, other, file]


def test_a_file_modified_just_now_is_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    cache, file = DigestCache(f"{tmp_path}/digests.json"), put(tmp_path / "a.txt", b"one")
    assert cache.get(file) == cache.get(file)
    assert hashed == [file, file]


@pytest.mark.parametrize("content", [b"{broken", b"[]", b'{"FILE": 3}', b"\xff"])
def test_a_damaged_cache_costs_time_only(tmp_path: Path, content: bytes) -> None:
    file = put(tmp_path / "a.txt", b"")
    cache = put(tmp_path / "digests.json", content.replace(b"FILE", file.encode()))
    assert DigestCache(cache, later).get(file) == EMPTY
    assert json.loads(Path(cache).read_bytes())["facts"][file]["sha256"] == EMPTY


def test_a_digit_changed_in_the_cache_is_not_believed(tmp_path: Path, hashed: list[str]) -> None:
    cache, file = f"{tmp_path}/digests.json", put(tmp_path / "a.txt", b"")
    assert DigestCache(cache, later).get(file) == EMPTY
    content = Path(cache).read_text()
    Path(cache).write_text(content.replace(EMPTY, EMPTY[:-1] + ("0" if EMPTY[-1] != "0" else "1")))
    assert DigestCache(cache, later).get(file) == EMPTY
    assert hashed == [file, file]


def test_what_was_hashed_before_an_error_is_kept(tmp_path: Path, hashed: list[str]) -> None:
    cache, file = DigestCache(f"{tmp_path}/digests.json", later), put(tmp_path / "a.txt", b"")
    with pytest.raises(UserError, match="none is no longer there"):
        cache.get_all([file, f"{tmp_path}/none"])
    cache.get(file)
    assert hashed == [file]


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.txt", b"one")

    def growing(url: str) -> str:
        Path(url).write_bytes(b"three")
        return "?"

    monkeypatch.setattr(digests, "digest", growing)
    with pytest.raises(UserError, match=r"a\.txt changed while it was read; run again"):
        DigestCache(f"{tmp_path}/digests.json", later).get(file)


def test_a_file_without_a_stamp_is_always_hashed(tmp_path: Path, hashed: list[str]) -> None:
    fsspec.filesystem("memory").pipe_file("/corpus/a.txt", b"")
    cache = DigestCache(f"{tmp_path}/digests.json", later)
    assert cache.get("memory://corpus/a.txt") == cache.get("memory://corpus/a.txt") == EMPTY
    assert len(hashed) == 2


def test_digests_on_s3(s3_server: str, hashed: list[str]) -> None:
    root, fs = f"{s3_server}/digests", fsspec.filesystem("s3")
    files = [f"{root}/{name}" for name in ("a.txt", "b.txt")]
    for file in files:
        fs.pipe_file(file, b"six")
    cache = DigestCache(f"{root}/digests.json")
    before = cache.get_all(files)
    assert cache.get_all(files) == before
    assert hashed == files
    fs.pipe_file(files[1], b"SIX")
    assert cache.get(files[1]) == digest(files[1]) != before[files[1]]
    assert len(hashed) == 3
    fs.rm(files[1])
    with pytest.raises(UserError, match=r"b\.txt is no longer there"):
        cache.get(files[1])
