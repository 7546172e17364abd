"""One suite for every kind of storage: each test that asks for `place` runs on the local disk and on S3.

What S3 alone does (requests, retries, deadlines, options) is in `test_s3.py`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from repository import REPOSITORY

from storage.errors import StoreDamagedError, StoreError, UnreachableError, explained
from storage.files import uri

# Names


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("s3://bucket/data", ("runs", "a"), "s3://bucket/data/runs/a"),
        ("s3://bucket/data/", ("/runs/", "a.json"), "s3://bucket/data/runs/a.json"),
        ("s3://bucket", ("a/b",), "s3://bucket/a/b"),
        ("s3://", ("bucket", "a"), "s3://bucket/a"),
        ("memory://", ("a",), "memory://a"),
        ("file:///tmp", ("a",), "file:///tmp/a"),
        ("/", ("a", "b"), "/a/b"),
        ("/tmp/", ("a",), "/tmp/a"),
        ("relative", ("a",), "relative/a"),
        ("s3://bucket/data/", (), "s3://bucket/data"),
    ],
)
def test_join(url: str, parts: tuple[str, ...], joined: str) -> None:
    assert uri.join(url, *parts) == joined


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://other/a", "s3://other/a"),
        ("zip://a::s3://other/b.zip", "zip://a::s3://other/b.zip"),
        ("file:///a", "file:///a"),
        ("/a/b", "/a/b"),
        ("a/b.jsonl", "s3://bucket/base/a/b.jsonl"),
    ],
)
def test_absolute(url: str, found: str) -> None:
    assert uri.absolute(url, "s3://bucket/base/") == found


def test_absolute_knows_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert uri.absolute("~/a", "/base") == "/home/someone/a"
    assert uri.absolute("a", "/base") == "/base/a"


# Files, the same on every kind of storage


def test_what_is_written_is_read(place: str) -> None:
    url = uri.join(place, "folder/deeper", "a.bin")
    for content in (b"", b"one", bytes(range(256)) * 1000):
        uri.write_bytes(url, content)
        assert uri.read_bytes(url) == content
        assert uri.size_of(url) == len(content)
    assert uri.exists(url)
    uri.write_json(url, {"b": [1, None, 0.1], "a": "ü"})
    assert uri.read_json(url) == {"a": "ü", "b": [1, None, 0.1]}
    before = uri.read_bytes(url)
    uri.write_json(url, {"a": "ü", "b": [1, None, 0.1]})
    assert uri.read_bytes(url) == before


def test_what_is_not_there(place: str) -> None:
    url = uri.join(place, "none.json")
    assert uri.read_bytes(url) is None
    assert uri.read_json(url) is None
    assert uri.size_of(url) is None
    assert not uri.exists(url)
    assert uri.list_names(place) == []
    with uri.local_copy(url) as path:
        assert path is None
    uri.remove_file(url)
    uri.remove_tree(place)
    uri.remove_temporaries(place)
    uri.write_bytes(url, b"")
    assert uri.read_bytes(uri.join(url, "below-a-file")) is None
    assert uri.list_names(uri.join(url, "below-a-file")) == []


def test_what_is_no_json_is_named(place: str) -> None:
    for content in (b"{", b"\xff", b"", b"[" * 100_000, b"1" * 5_000):
        uri.write_bytes(uri.join(place, "a.json"), content)
        with pytest.raises(StoreDamagedError, match=r"/a\.json is not valid JSON"):
            uri.read_json(uri.join(place, "a.json"))


def test_names_are_listed_in_order_and_afresh(place: str) -> None:
    for name in ("b", "a/1", "a/2", "c.json"):
        uri.write_bytes(uri.join(place, name), b"x")
    assert uri.list_names(place) == ["a", "b", "c.json"]
    assert uri.list_names(place + "/") == ["a", "b", "c.json"]
    assert uri.list_names(uri.join(place, "b")) == []
    # Another process adds and removes: nothing that was listed before is taken for the present.
    code = """
import sys
from storage.files import uri
uri.write_bytes(sys.argv[1] + "/d", b"x")
uri.remove_tree(sys.argv[1] + "/a")
"""
    subprocess.run([sys.executable, "-c", code, place], check=True, cwd=REPOSITORY)
    assert uri.read_bytes(uri.join(place, "d")) == b"x"
    assert uri.exists(uri.join(place, "d"))
    assert uri.read_jsons([uri.join(place, "e"), uri.join(place, "a/1")]) == [None, None]
    assert uri.list_names(place) == ["b", "c.json", "d"]
    assert not uri.exists(uri.join(place, "a/1"))


def test_removing(place: str) -> None:
    for name in ("a/1", "a/b/2", "ab"):
        uri.write_bytes(uri.join(place, name), b"x")
    uri.remove_tree(uri.join(place, "a"))
    assert uri.list_names(place) == ["ab"]
    uri.remove_file(uri.join(place, "ab"))
    assert uri.list_names(place) == []


def test_many_records_at_once(place: str) -> None:
    urls = [uri.join(place, f"{number}.json") for number in range(40)]
    for number, url in enumerate(urls):
        if number != 7:
            uri.write_json(url, number)
    assert uri.read_jsons(urls) == [None if number == 7 else number for number in range(40)]
    assert uri.read_jsons(urls[:1]) == [0]
    assert uri.read_jsons([]) == []
    uri.write_bytes(urls[3], b"{")
    with pytest.raises(StoreDamagedError, match=r"/3\.json is not valid JSON"):
        uri.read_jsons(urls)


def test_many_files_at_once(place: str) -> None:
    urls = [uri.join(place, f"{number}") for number in range(40)]
    for url in urls[::2]:
        uri.write_bytes(url, url.encode())
    assert uri.read_whole_many(urls) == [url.encode() if n % 2 == 0 else None for n, url in enumerate(urls)]
    assert uri.read_whole_many([]) == []


def test_ranges_are_slices(place: str) -> None:
    content, url, rng = bytes(range(256)) * 4, uri.join(place, "a"), random.Random(5)
    uri.write_bytes(url, content)
    ranges = [(rng.randrange(1100), rng.randrange(300)) for _ in range(40)]
    ranges += [(0, 1024), (0, 9999), (1024, 1), (5000, 5), (1023, 1), (7, 0)]
    assert uri.read_ranges(url, ranges) == [content[start : start + length] for start, length in ranges]
    assert uri.read_ranges(url, []) == []
    for start, length, expected in (
        (-4, 4, content[-4:]),
        (-100, 30, content[-100:-70]),
        (-4, 99, content[-4:]),
        (-5000, 5, content[:5]),
        (-1, 0, b""),
    ):
        assert uri.read_range(url, start, length) == expected
    uri.write_bytes(url, b"")
    assert uri.read_ranges(url, [(0, 5), (3, 1), (-9, 9)]) == [b"", b"", b""]
    with pytest.raises(FileNotFoundError):
        uri.read_range(uri.join(place, "none"), 0, 1)


ODD_NAMES = [
    "a b",
    "a#b",
    "a?b",
    "a%20b",
    "a%",
    "a+b",
    "a&b=c",
    "a*",
    "a[b]",
    "[!x]",
    "ü 三",
    "a'b\"c",
    "a;b",
    "a\\b",
    "~a",
    "a^",
]


def test_names_with_special_characters_are_what_they_are(place: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"copied")
    for name in ODD_NAMES:
        folder = uri.join(place, f"folder {name}")
        url = uri.join(folder, name)
        uri.write_bytes(url, name.encode())
        assert uri.read_bytes(url) == name.encode()
        assert uri.read_range(url, 0, 1) == name.encode()[:1]
        assert uri.read_whole_many([url]) == [name.encode()]
        assert uri.size_of(url) == len(name.encode())
        assert uri.exists(url)
        assert uri.list_names(folder) == [name]
        uri.put_file(str(tmp_path / "source"), url)
        with uri.local_copy(url) as path:
            assert Path(path).read_bytes() == b"copied"
    assert uri.list_names(place) == sorted(f"folder {name}" for name in ODD_NAMES)
    # A name with * or ? is no pattern: its neighbours stay.
    for name in ODD_NAMES:
        uri.remove_tree(uri.join(place, f"folder {name}"))
        assert f"folder {name}" not in uri.list_names(place)
    assert uri.list_names(place) == []
    uri.write_bytes(uri.join(place, "ab"), b"")
    uri.remove_file(uri.join(place, "a?"))
    assert uri.list_names(place) == ["ab"]


def test_files_and_folders_are_copied(place: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "a").write_bytes(b"one")
    (source / "below" / "b").write_bytes(b"two")
    uri.put_folder(str(source), uri.join(place, "copy"))
    assert uri.read_bytes(uri.join(place, "copy/below/b")) == b"two"
    uri.put_file(str(source / "below" / "b"), uri.join(place, "copy/a"))
    with uri.local_copy(uri.join(place, "copy/a")) as path:
        assert Path(path).read_bytes() == b"two"
        if place.startswith("s3://"):
            assert os.path.basename(path) == "a"
    assert Path(path).exists() == (not place.startswith("s3://"))


def test_an_error_while_writing_leaves_the_old_file(place: str) -> None:
    url = uri.join(place, "a")
    uri.write_bytes(url, b"old")
    with pytest.raises(OSError, match="disk full"), uri.writing(url) as path:  # noqa: PT012
        Path(path).write_bytes(b"half")
        raise OSError("disk full")
    assert uri.read_bytes(url) == b"old"
    if not place.startswith("s3://"):
        assert os.listdir(place) == ["a"]


MANY_THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from storage.files import uri

def work(n):
    url = f"{sys.argv[1]}/{n % 4}/{n}"
    uri.write_bytes(url, bytes([n]) * 1000)
    uri.write_json(url + ".json", n)
    assert uri.read_bytes(url) == bytes([n]) * 1000
    assert uri.read_ranges(url, [(0, 2), (-3, 3)]) == [bytes([n]) * 2, bytes([n]) * 3]
    assert f"{n}.json" in uri.list_names(f"{sys.argv[1]}/{n % 4}"), "what this thread has just written"
    assert uri.size_of(url) == 1000
    assert uri.read_jsons([url + ".json"]) == [n]
    uri.remove_file(url)
    assert uri.read_bytes(url) is None

with ThreadPoolExecutor(8) as executor:
    list(executor.map(work, range(48)))
print("done")
"""


def test_many_threads_may_begin_at_once(place: str) -> None:
    """In a process where nothing has been opened before: all eight make their first call together."""
    command = [sys.executable, "-c", MANY_THREADS, place]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert uri.list_names(place) == ["0", "1", "2", "3"]


# Killed

WRITING_FOR_EVER = """
import sys
from storage.files import uri
size = int(sys.argv[2])
while True:
    for letter in (b"a", b"b", b"c"):
        uri.write_bytes(sys.argv[1] + "/big", letter * size)
        print("written", flush=True)
"""


def test_a_reader_never_sees_a_torn_file(place: str, killed_after_lines: Callable[..., None]) -> None:
    size = 200_000 if place.startswith("s3://") else 8_000_000
    for lines in (3,) if place.startswith("s3://") else (1, 2, 4):
        killed_after_lines(WRITING_FOR_EVER, place, str(size), lines=lines)
        content = uri.read_bytes(uri.join(place, "big"))
        assert len(content) == size
        assert len(set(content)) == 1
        assert uri.list_names(place) == ["big"]


def test_a_reader_beside_the_writer_never_sees_a_torn_file(place: str) -> None:
    size, reads, seen = (200_000, 12, set()) if place.startswith("s3://") else (2_000_000, 40, set())
    command = [sys.executable, "-c", WRITING_FOR_EVER, place, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as writer:
        writer.stdout.readline()
        for _ in range(reads):
            content = uri.read_bytes(uri.join(place, "big"))
            assert len(content) == size
            assert len(set(content)) == 1
            seen.add(content[:1])
            writer.stdout.readline()
        writer.kill()
    assert len(seen) > 1


def test_killed_between_writing_and_renaming(tmp_path: Path, killed_at_each_rename: Callable[..., list[int]]) -> None:
    code = """
from storage.files import uri
for letter in (b"a", b"b"):
    uri.write_bytes(folder + "/file", letter * 3_000_000)
"""
    assert killed_at_each_rename(code, f"{tmp_path}/out") == [1, 2]
    for number, content in ((1, None), (2, b"a"), (3, b"b")):
        folder = f"{tmp_path}/out/{number}"
        found = uri.read_bytes(f"{folder}/file")
        assert found == (None if content is None else content * 3_000_000)
        assert uri.list_names(folder) == ([] if content is None else ["file"])
        assert len([name for name in os.listdir(folder) if name.endswith(".tmp")]) == (number < 3)
        uri.remove_temporaries(folder)
        assert os.listdir(folder) == uri.list_names(folder)


def test_canonical_json_is_readable_by_others(tmp_path: Path) -> None:
    uri.write_json(f"{tmp_path}/a.json", {"b": 1, "a": {"d": 2, "c": "三"}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["a", "b"]
    assert "三" in text
    assert text.endswith("}\n")


def test_a_url_with_credentials_is_never_opened_and_never_shown() -> None:
    for url in ("s3://SECRETID:s3cr3t@bucket/a.zarr", "simplecache::s3://SECRETID@bucket/a", "https://h/a?sig=s3cr3t"):
        for call in (uri.exists, uri.read_bytes, uri.list_names, uri.remove_tree, uri.size_of):
            with pytest.raises(StoreError, match="holds a password, key or signature") as error:
                call(url)
            assert "SECRETID" not in str(error.value)
            assert "s3cr3t" not in str(error.value)


def test_what_s3_repeats_of_a_key_is_not_told_on() -> None:
    said = "The Access Key Id 'SECRETID' does not exist; <AWSAccessKeyId>SECRETID</AWSAccessKeyId>, AKIASECRETID0000"
    refusal = ClientError({"Error": {"Code": "InvalidAccessKeyId", "Message": said}}, "GetObject")
    message = str(explained(refusal, "s3://bucket/a"))
    assert message.startswith("s3://bucket/a: the S3 server refused the request (InvalidAccessKeyId: The Access Key Id")
    assert "SECRETID" not in message


# What a machine refuses


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file/below", "a part of this path is a file; name another place"),
        ("/proc/ddk/a.json", "no folder can be made there; name another place"),
        ("a" * 300, "the name is too long for this disk; shorten it"),
    ],
)
@pytest.mark.parametrize("write", [uri.write_json, uri.create_json])
def test_a_place_that_takes_no_file_is_named(
    tmp_path: Path, write: Callable[..., object], place: str, says: str
) -> None:
    (tmp_path / "file").touch()
    url = place if place.startswith("/") else str(tmp_path / place)
    with pytest.raises(UnreachableError) as refused:
        write(url, {})
    assert str(refused.value).startswith(f"{url} cannot be written: ")
    assert says in str(refused.value)
    assert str(explained(refused.value)) == str(refused.value)


def test_a_full_disk_is_named_with_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    url = str(tmp_path / "a.bin")
    for full in (OSError(errno.ENOSPC, "No space"), OSError(errno.EDQUOT, "Quota", f"{url}.tmp.parts")):
        with pytest.raises(UnreachableError, match=r"a\.bin cannot be written: .* free some"), uri.writing(url):
            raise full
    assert list(tmp_path.iterdir()) == []


def test_what_was_read_meanwhile_is_not_taken_for_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), uri.writing(str(tmp_path / "a.bin")):
        (tmp_path / "elsewhere" / "source").read_bytes()


def test_what_rust_says_of_the_system_is_understood() -> None:
    error = ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "the disk is full; free some space" in str(explained(error))
    assert explained(ValueError("(os error x)")) is None


def test_a_file_that_is_being_written_does_not_look_like_the_file(tmp_path: Path) -> None:
    """TensorBoard takes every name with 'tfevents', in order, and would go past the file that comes of it."""
    url = str(tmp_path / "events.out.tfevents.00000002.train")
    with uri.writing(url) as temporary:
        assert os.path.dirname(temporary) == str(tmp_path)
        assert "tfevents" not in os.path.basename(temporary)
        Path(temporary).write_bytes(b"points")
    assert os.listdir(tmp_path) == [os.path.basename(url)]


def test_a_folder_that_vanishes_while_it_is_found_there_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`os.makedirs` meets a folder, which is gone when it looks what it met: it then says that it is no folder."""
    folder, make, left = tmp_path / "claims", os.mkdir, [True]

    def mkdir(path: str, mode: int = 0o777) -> None:
        if left and str(path) == str(folder):
            left.clear()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    uri.write_bytes(str(folder / "a.json"), b"mine")
    assert (folder / "a.json").read_bytes() == b"mine"
    assert not left


@pytest.mark.parametrize("write", [uri.write_bytes, uri.create_bytes])
def test_a_folder_that_another_removes_while_it_is_still_empty_is_made_again(
    tmp_path: Path, write: Callable[[str, bytes], Any]
) -> None:
    """Of several who share the shards, who ends removes empty folders, of which another has just made one."""
    done, interval = threading.Event(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that the threads meet within each file, and not within each hundred

    def clear() -> None:
        while not done.is_set():
            uri.remove_empty_folders(str(tmp_path / "store"))

    with ThreadPoolExecutor(2) as executor:
        clearing = [executor.submit(clear) for _ in range(2)]
        try:
            for number in range(500):
                path = tmp_path / "store" / "claims" / f"{number}.json"
                write(str(path), b"mine")
                assert path.read_bytes() == b"mine"
                uri.remove_file(str(path))
        finally:
            done.set()
            sys.setswitchinterval(interval)
        for one in clearing:
            one.result()
