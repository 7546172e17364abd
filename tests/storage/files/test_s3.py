"""S3 through a real server (moto) and a proxy before it, which counts the requests and breaks some of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import botocore.retryhandler
import fsspec
import numpy as np
import pytest
import zarr
from repository import REPOSITORY
from resealing import resealed
from s3_proxy import DROP, HANG, RESET, TEAR, S3Proxy
from silent_server import SilentServer
from zarr.storage import FsspecStore

from storage.blocks import open_blocks
from storage.errors import StoreError, UnreachableError, explained
from storage.files import s3, settings, uri
from storage.stores.layout import array_specs, encode_shard
from storage.stores.manifest import StoreWriter

MIB = 1 << 20
TRANSIENT = ["429 TooManyRequests", "500 InternalError", "502", "503 SlowDown", "503 <html>", "504", DROP, RESET]


@pytest.fixture
def folder(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own, with the files `a` (100 bytes) and `below/b`."""
    url = f"{s3_server}/{abs(hash(request.node.name))}"
    uri.write_bytes(f"{url}/a", bytes(range(100)))
    uri.write_bytes(f"{url}/below/b", b"b")
    return url


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)  # the smallest that S3 takes


def calls(folder: str, tmp_path: Path) -> dict[str, tuple[Callable[[], Any], Any, dict[str, int]]]:
    """What can be done, what comes of it, and with which requests."""
    local = tmp_path / "local"
    local.write_bytes(b"local")

    def copy() -> bytes:
        with uri.local_copy(f"{folder}/a") as path:
            return Path(str(path)).read_bytes()

    hundred = bytes(range(100))
    ranges = [(0, 10), (10, 10), (50, 1), (-5, 5)]
    cut = [hundred[:10], hundred[10:20], hundred[50:51], hundred[-5:]]
    return {
        "read_bytes": (lambda: uri.read_bytes(f"{folder}/a"), hundred, {"GET": 1}),
        "read_range": (lambda: uri.read_range(f"{folder}/a", 3, 2), b"\3\4", {"GET": 1}),
        "read_ranges": (lambda: uri.read_ranges(f"{folder}/a", ranges), cut, {"GET": 3}),
        "read_whole_many": (
            lambda: uri.read_whole_many([f"{folder}/a", f"{folder}/none", f"{folder}/below/b"]),
            [hundred, None, b"b"],
            {"GET": 3},
        ),
        "local_copy": (copy, hundred, {"GET": 1}),
        "size_of": (lambda: uri.size_of(f"{folder}/a"), 100, {"HEAD": 1}),
        "size_of nothing": (lambda: uri.size_of(f"{folder}/none"), None, {"HEAD": 1}),
        "exists": (lambda: uri.exists(f"{folder}/a"), True, {"HEAD": 1}),
        "exists not": (lambda: uri.exists(f"{folder}/none"), False, {"HEAD": 1, "LIST": 1}),
        "list_names": (lambda: uri.list_names(folder), ["a", "below"], {"LIST": 1}),
        "list_names of nothing": (lambda: uri.list_names(f"{folder}/none"), [], {"LIST": 1}),
        "write_bytes": (lambda: uri.write_bytes(f"{folder}/new", b"x"), None, {"PUT": 1}),
        "write_json": (lambda: uri.write_json(f"{folder}/new", 1), None, {"PUT": 1}),
        "put_file": (lambda: uri.put_file(str(local), f"{folder}/new"), None, {"PUT": 1}),
        "remove_file": (lambda: uri.remove_file(f"{folder}/new"), None, {"DELETE": 1}),
        "remove_tree": (lambda: uri.remove_tree(f"{folder}/below"), None, {"LIST": 1, "DELETES": 1}),
        "remove_tree of nothing": (lambda: uri.remove_tree(f"{folder}/none"), None, {"LIST": 1}),
    }


# Requests


def test_each_call_makes_the_requests_that_are_documented(folder: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    for name, (call, result, requests) in calls(folder, tmp_path).items():
        s3_proxy.forget()
        assert call() == result, name
        assert s3_proxy.counts() == requests, name


def test_a_listing_and_a_removal_take_a_request_for_each_thousand(s3_server: str, s3_proxy: S3Proxy) -> None:
    folder = f"{s3_server}/thousand"
    with ThreadPoolExecutor(16) as executor:
        list(executor.map(lambda n: uri.write_bytes(f"{folder}/{n:04d}", b""), range(1001)))
    s3_proxy.forget()
    assert len(uri.list_names(folder)) == 1001
    assert s3_proxy.counts() == {"LIST": 2}
    uri.remove_tree(folder)
    assert s3_proxy.counts() == {"LIST": 4, "DELETES": 2}
    assert uri.list_names(folder) == []


def test_many_reads_are_made_at_once_but_not_all(folder: str, s3_proxy: S3Proxy) -> None:
    assert uri.read_whole_many([f"{folder}/{name}" for name in ["a", "none"] * 50]) == [bytes(range(100)), None] * 50
    assert s3_proxy.counts() == {"GET": 100}
    assert 4 < s3_proxy.most_at_once <= s3.AT_ONCE


def test_large_content_goes_up_in_parts_of_64_mib(s3_server: str, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    url, content = f"{s3_server}/large", os.urandom(MIB) * 128
    uri.write_bytes(url, content[:-1])
    assert s3_proxy.counts() == {"PUT": 1}
    s3_proxy.forget()
    (tmp_path / "large").write_bytes(content)
    uri.put_file(str(tmp_path / "large"), url)
    assert s3_proxy.counts() == {"CREATE": 1, "PART": 2, "COMPLETE": 1}
    s3_proxy.forget()
    assert uri.size_of(url) == len(content)
    assert uri.read_bytes(url) == content
    with uri.local_copy(url) as path:
        assert Path(str(path)).read_bytes() == content
    assert s3_proxy.counts() == {"HEAD": 1, "GET": 2}
    uri.remove_file(url)


# Retries


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("how", TRANSIENT)
def test_what_passes_is_tried_again(folder: str, s3_proxy: S3Proxy, tmp_path: Path, how: str) -> None:
    for name, (call, result, requests) in calls(folder, tmp_path).items():
        s3_proxy.forget()
        for operation in requests:
            s3_proxy.fail(how, operation, times=2)
        assert call() == result, name
        keys = {(request.operation, request.key) for request in s3_proxy.requests}
        assert len(s3_proxy.requests) == sum(requests.values()) + 2 * len(keys), name


@pytest.mark.usefixtures("short_waits", "small_parts")
@pytest.mark.parametrize("how", ["503 SlowDown", "500 InternalError", DROP, "200 InternalError"])
def test_a_multipart_upload_survives(s3_server: str, s3_proxy: S3Proxy, tmp_path: Path, how: str) -> None:
    url, content = f"{s3_server}/parts", os.urandom(11 * MIB)
    (tmp_path / "parts").write_bytes(content)
    # An answer of 200 that holds an error is what S3 has for an upload that fails while it is put together.
    operations = ["COMPLETE"] if how.startswith("200") else ["CREATE", "PART", "COMPLETE"]
    for write in (lambda: uri.write_bytes(url, content), lambda: uri.put_file(str(tmp_path / "parts"), url)):
        s3_proxy.forget()
        for operation in operations:
            s3_proxy.fail(how, operation, times=2)
        write()
        failed = {operation: 2 * (operation in operations) for operation in ("CREATE", "PART", "COMPLETE")}
        expected = {"CREATE": 1, "PART": 3, "COMPLETE": 1}
        assert s3_proxy.counts() == {operation: n + failed[operation] for operation, n in expected.items()}
        assert uri.read_bytes(url) == content
        uri.remove_file(url)


@pytest.mark.usefixtures("short_waits", "small_parts")
def test_an_upload_that_fails_leaves_what_was_there(s3_server: str, s3_proxy: S3Proxy) -> None:
    url = f"{s3_server}/failed"
    uri.write_bytes(url, b"old")
    s3_proxy.fail("500 InternalError", "PART")
    with pytest.raises(UnreachableError, match=r"/failed: the S3 server answered 500 8 times"):
        uri.write_bytes(url, bytes(11 * MIB))
    assert s3_proxy.counts()["ABORT"] == 1
    assert uri.read_bytes(url) == b"old"
    fs, path = uri.open_fs(url)
    assert fs.list_multipart_uploads(path.split("/")[0]) == []


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("how", ["429 TooManyRequests", "503 SlowDown", "502", DROP, RESET])
def test_after_eight_attempts_one_line_says_what_to_do(
    folder: str, s3_proxy: S3Proxy, tmp_path: Path, how: str
) -> None:
    for name, (call, _, requests) in calls(folder, tmp_path).items():
        s3_proxy.forget()
        s3_proxy.fail(how, next(iter(requests)))
        with pytest.raises(UnreachableError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(folder), name
        assert "\n" not in message
        assert "run the same command again later" in message or "check AWS_ENDPOINT_URL" in message
        assert ("8 times" in message) == (how not in (DROP, RESET))
        assert str(explained(caught.value)) == message
        # What is in flight for other keys may have got its eight attempts too. A connection that was in use before is
        # tried once more by aiohttp itself.
        most = max(sum(r.key == key for r in s3_proxy.requests) for key in {r.key for r in s3_proxy.requests})
        assert 8 <= most / (3 if name == "read_ranges" else 1) <= (16 if how in (DROP, RESET) else 8), name


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("403 AccessDenied", "access denied (AccessDenied: as the test wants); check the credentials"),
        ("403 RequestTimeTooSkewed", "the S3 server refuses this machine's clock"),
        ("400 ExpiredToken", "access denied (ExpiredToken"),
        ("400 AuthorizationHeaderMalformed", "the bucket lies in another region"),
        ("404 NoSuchBucket", "there is no such bucket; create it"),
        ("400 InvalidRequest", "the S3 server refused the request (InvalidRequest: as the test wants)"),
    ],
)
def test_what_does_not_pass_is_asked_once(
    folder: str, s3_proxy: S3Proxy, tmp_path: Path, how: str, message: str
) -> None:
    chosen = ("read_bytes", "read_range", "local_copy", "write_bytes", "put_file", "list_names", "remove_tree")
    for name in chosen:
        s3_proxy.forget()
        s3_proxy.fail(how)
        with pytest.raises(UnreachableError) as caught:
            calls(folder, tmp_path)[name][0]()
        assert str(caught.value).startswith(folder)
        assert message in str(caught.value), name
        assert len(s3_proxy.requests) == 1, name


def test_no_bucket_is_not_taken_for_no_file(s3_server: str) -> None:
    for call in (uri.read_bytes, uri.read_json, uri.list_names, lambda url: uri.write_bytes(url, b"")):
        with pytest.raises(UnreachableError, match=r"^s3://no-such-bucket/a: there is no such bucket; create it"):
            call("s3://no-such-bucket/a")


@pytest.mark.usefixtures("short_waits")
def test_a_body_that_breaks_off_is_read_again(folder: str, s3_proxy: S3Proxy) -> None:
    content = bytes(range(256)) * 1024
    uri.write_bytes(f"{folder}/body", content)
    s3_proxy.forget()
    s3_proxy.fail(TEAR, "GET", times=2)
    assert uri.read_bytes(f"{folder}/body") == content
    assert s3_proxy.counts() == {"GET": 3}
    s3_proxy.forget()
    s3_proxy.fail(TEAR, "GET", times=2)
    with uri.local_copy(f"{folder}/body") as path:
        assert Path(str(path)).read_bytes() == content
    assert s3_proxy.requests[0].range is None
    assert s3_proxy.requests[1].range == f"bytes={len(content) // 2}-", "it goes on where it broke off"
    s3_proxy.forget()
    s3_proxy.fail(TEAR, "GET")
    with pytest.raises(UnreachableError, match=r"/body: the connection to the S3 server broke again and again"):
        uri.read_bytes(f"{folder}/body")
    assert s3_proxy.counts() == {"GET": 5}


@pytest.mark.usefixtures("short_waits")
def test_a_silent_server_is_asked_again(folder: str, s3_proxy: S3Proxy) -> None:
    settings.use_options("s3", {"endpoint_url": s3_proxy.url, "config_kwargs": {"read_timeout": 0.3}})
    s3_proxy.fail(HANG, times=1)
    assert uri.read_bytes(f"{folder}/a") == bytes(range(100))
    assert s3_proxy.counts() == {"GET": 2}
    s3_proxy.forget()
    s3_proxy.fail(HANG)
    with pytest.raises(UnreachableError, match=r"broke again and again .*Read timeout"):
        uri.read_bytes(f"{folder}/a")
    assert s3_proxy.counts() == {"GET": 8}


@pytest.mark.usefixtures("s3_server", "short_waits")
@pytest.mark.parametrize("phase", ["answer", "continue", "body", "trickle"])
def test_a_request_has_one_deadline_in_whatever_phase_a_server_falls_silent(
    monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr("storage.files.deadlines.DEADLINE_S", 6.0)
    monkeypatch.setattr("storage.files.deadlines.SLOWEST", 16 * MIB)
    content = bytes(8 * MIB if phase == "body" else 100)
    call = partial(uri.read_bytes, "s3://ddk-tests/a")
    if phase != "trickle":
        call = partial(uri.write_bytes, "s3://ddk-tests/a", content)
    with SilentServer(phase) as server:
        silence = {"read_timeout": 0.3, "connect_timeout": 0.3}
        settings.use_options("s3", {"endpoint_url": server.url, "config_kwargs": silence})
        try:
            with pytest.raises(UnreachableError, match="broke again and again"):
                call()
            # The server stays silent for ever, so an attempt without an end would not come back. How many there are in
            # the request's deadline follows from how long each takes at least: 0.6 s and 16 MiB/s for a body of 8 MiB,
            # or the whole deadline where a byte comes now and then.
            most = {"body": 6, "trickle": 2}.get(phase, s3.ATTEMPTS)
            assert server.connections <= most
            assert server.connections > (0 if phase == "trickle" else 1), "it was tried again"
        finally:
            settings.use_options("s3", {})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """How long botocore decides to wait, in seconds, by the number of the attempt before."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    decide = botocore.retryhandler.delay_exponential

    def noted(base: float | str, growth_factor: float, attempts: int) -> float:
        found[attempts].append(decide(base, growth_factor, attempts))
        return found[attempts][-1]

    monkeypatch.setattr("botocore.retryhandler.delay_exponential", noted)
    return found


def test_the_waits_grow_and_are_random(folder: str, s3_proxy: S3Proxy, waits: dict[int, list[float]]) -> None:
    s3_proxy.fail("503 SlowDown", times=2)
    uri.read_whole_many([f"{folder}/{n}" for n in range(12)])
    first, second = waits[1], waits[2]
    assert (len(first), len(second), len(waits)) == (12, 12, 2)
    assert max(first) <= 1.0
    assert max(second) <= 2.0
    assert max(first) - min(first) > 0.2, "not all at the same moment"
    assert sum(second) > sum(first)
    asked = [[request.at for request in s3_proxy.requests if request.key.endswith(f"/{n}")] for n in range(12)]
    assert [len(times) for times in asked] == [3] * 12
    assert sum(times[-1] - times[0] for times in asked) >= sum(first) + sum(second), "and they are waited for"


@pytest.mark.usefixtures("short_waits")
def test_many_reads_that_fail_at_once_all_come_through(folder: str, s3_proxy: S3Proxy) -> None:
    """botocore's newer modes share one quota of retries, and would give up most of these."""
    s3_proxy.fail("503 SlowDown", times=2)
    assert uri.read_whole_many([f"{folder}/{n}" for n in range(150)]) == [None] * 150
    assert len(s3_proxy.requests) == 450


def test_the_environment_may_say_how_often(folder: str, s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3_proxy.fail("503 SlowDown")
    with pytest.raises(UnreachableError, match="answered 503 2 times"):
        uri.read_bytes(f"{folder}/a")
    assert s3_proxy.counts() == {"GET": 2}


@pytest.mark.parametrize("code", ["InternalError", "AccessDenied"])
def test_a_key_that_cannot_be_deleted_is_named(folder: str, s3_proxy: S3Proxy, code: str) -> None:
    error = f"<Error><Key>x/b</Key><Code>{code}</Code><Message>not this one</Message></Error>"
    s3_proxy.fail(f"200 <DeleteResult>{error}</DeleteResult>", "DELETES")
    with pytest.raises(UnreachableError, match=rf"{code}: not this one"):
        uri.remove_tree(f"{folder}/below")


# Stores


def test_a_store_of_a_hundred_thousand_shards_is_opened_and_read_by_what_is_needed(
    s3_server: str, s3_proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDK_SHARD_CACHE_DIR", str(tmp_path))
    url, shards, tokens = f"{s3_server}/large-store", 100_000, np.arange(28, dtype=np.int32).reshape(4, 7)
    dims = {"seq_len": 6, "vocab_size": 100, "shard_blocks": 4}
    writer = StoreWriter(url, "blocks", {}, dims)
    record = writer.write_shard("train", 0, {"tokens": tokens})
    writer.write_shard("validation", 0, {"tokens": tokens})
    writer.finish()
    content = encode_shard(array_specs("blocks", dims)[0], tokens[::-1], 4)
    other = {"tokens": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    records = [record.model_dump()] * shards
    records[77_777] = {**record.model_dump(), "objects": other}
    splits = uri.read_json(f"{url}/manifest.json")["splits"]
    resealed(f"{url}/manifest.json", splits=splits | {"train": {"blocks": 4 * shards, "shards": records}})
    uri.write_bytes(f"{url}/train/tokens/c/77777/0", content)
    s3_proxy.forget()
    view = open_blocks(url)
    assert len(view) == 4 * shards
    assert s3_proxy.counts() == {"GET": 1}
    assert view.fetch([2, 4 * 77_777]) is True
    np.testing.assert_array_equal(view.read([4 * 77_777, 2, 4 * 77_777 + 3]), tokens[[3, 2, 0]])
    assert s3_proxy.counts() == {"GET": 3}


# Threads


@pytest.mark.usefixtures("short_waits")
def test_a_reader_and_a_writer_share_one_process(folder: str, s3_proxy: S3Proxy) -> None:
    s3_proxy.fail("503 SlowDown", times=1)

    def write(n: int) -> None:
        uri.write_bytes(f"{folder}/{n}", bytes([n]) * 50_000)

    with ThreadPoolExecutor(4) as executor:
        written = [executor.submit(write, n) for n in range(30)]
        read = [executor.submit(uri.read_range, f"{folder}/a", n, 5) for n in range(30)]
        assert [future.result() for future in read] == [bytes(range(n, n + 5)) for n in range(30)]
        for future in written:
            future.result()
    names = [f"{folder}/{n}" for n in range(30)]
    assert uri.read_whole_many(names) == [bytes([n]) * 50_000 for n in range(30)]


# Settings


def test_options_hold_for_every_later_call(s3_server: str, s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    region = {"region_name": "eu-central-1"}
    options = {"endpoint_url": s3_proxy.url, "key": "mine", "secret": "hidden", "client_kwargs": region}
    settings.use_options("s3", options)
    url = f"{s3_server}/options"
    uri.write_bytes(f"{url}/a.txt", b"text")
    zarr.create_array(FsspecStore.from_url(f"{url}/a.zarr"), shape=(2,), dtype="int32")[:] = 7
    assert zarr.open_array(FsspecStore.from_url(f"{url}/a.zarr"), mode="r")[1] == 7
    with fsspec.open(f"simplecache::{url}/a.txt", "rb") as file:
        assert file.read() == b"text"
    assert len(s3_proxy.requests) > 5
    assert {request.access_key for request in s3_proxy.requests} == {"mine"}
    fs = uri.open_fs(url)[0]
    assert fs.s3.meta.region_name == "eu-central-1"
    assert "hidden" not in repr(fs) + repr(FsspecStore.from_url(url))
    s3_proxy.fail("403 InvalidAccessKeyId")
    with pytest.raises(UnreachableError) as caught:
        uri.read_bytes(url)
    assert "hidden" not in str(caught.value)


def test_options_replace_and_end(s3_server: str, s3_proxy: S3Proxy) -> None:
    settings.use_options("s3", {"endpoint_url": s3_proxy.url, "key": "first", "secret": "x"})
    uri.read_bytes(f"{s3_server}/none")
    settings.use_options("s3", {"endpoint_url": s3_proxy.url})
    uri.read_bytes(f"{s3_server}/none")
    assert [request.access_key for request in s3_proxy.requests] == ["first", "testing"]
    settings.use_options("s3", {})
    uri.read_bytes(f"{s3_server}/none")
    assert len(s3_proxy.requests) == 2


@pytest.mark.parametrize(("name", "value"), [("AWS_REGION", "eu-west-3"), ("AWS_DEFAULT_REGION", "eu-north-1")])
def test_the_region_comes_from_either_variable(
    s3_server: str, s3_proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert uri.open_fs(s3_server)[0].s3.meta.region_name == value


def test_fsspec_variables_count_too(s3_server: str, s3_proxy: S3Proxy) -> None:
    code = "import sys; from storage.files import uri; print(uri.read_bytes(sys.argv[1]))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"FSSPEC_S3_KEY": "from-fsspec", "FSSPEC_S3_SECRET": "x", "FSSPEC_S3_ENDPOINT_URL": s3_proxy.url}
    environment["FSSPEC_S3"] = json.dumps({"client_kwargs": {"region_name": "us-east-1"}})
    command = [sys.executable, "-c", code, f"{s3_server}/none"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "None\n", done.stderr
    assert [request.access_key for request in s3_proxy.requests] == ["from-fsspec"]


def test_an_unknown_option_is_named_and_no_value(s3_server: str) -> None:
    with pytest.raises(StoreError, match=r"^s3 has no option acces_key; there are .*key, .*secret") as caught:
        settings.use_options("s3", {"acces_key": "hidden", "secret": "hidden"})
    assert "hidden" not in str(caught.value)


def test_credentials_that_come_later_are_used(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, waits: dict[int, list[float]]
) -> None:
    """No file system that was opened without them is in the way."""
    assert uri.read_bytes(f"{s3_server}/none") is None
    with monkeypatch.context() as without:
        without.delenv("AWS_ACCESS_KEY_ID")
        without.delenv("AWS_SECRET_ACCESS_KEY")
        settings.use_options("s3", {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]})
        with pytest.raises(UnreachableError, match=r"/none: no credentials for S3 were found; set AWS_ACCESS_KEY_ID"):
            uri.read_bytes(f"{s3_server}/none")
        assert waits == {}, "another attempt would find none either"
        settings.use_options("s3", {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "key": "k", "secret": "s"})
        assert uri.read_bytes(f"{s3_server}/none") is None
    settings.use_options("s3", {})
