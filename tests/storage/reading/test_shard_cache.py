"""Copies of remote shards on the local disk: a real S3 server (moto), before it a proxy that counts and breaks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from repository import REPOSITORY
from s3_proxy import HANG, TEAR, S3Proxy

from ddk.data import TrainData, prefetch
from ddk.mixture import equal_mixture
from ddk.sampler import Window, draw, initial_state
from ddk.values import Draw
from storage.blocks import open_blocks
from storage.errors import StoreDamagedError, StoreError, UnreachableError
from storage.files import uri
from storage.reading import shard_cache
from storage.reading.shard_cache import NotWhatWasWrittenError, ShardCache, ShardObject, shared
from storage.stores.layout import array_specs, encode_shard
from storage.targets import open_targets

DIMS = {"seq_len": 6, "vocab_size": 152_064, "shard_blocks": 4, "k": 3}
BLOCK_DIMS = {name: size for name, size in DIMS.items() if name != "k"}
BLOCKS = 19
"""In shards of 4, 4, 4, 4 and 3."""
ARRAYS = ("ids", "logprobs", "tail_mass", "true_logprobs")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where copies are kept."""
    monkeypatch.setenv("DDK_SHARD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DDK_SHARD_CACHE_MIB", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def content(maker):
    return {"train": maker.arrays("targets", DIMS, BLOCKS), "validation": maker.arrays("targets", DIMS, 5, seed=1)}


@pytest.fixture
def store(s3_server: str, folder: Path, maker, content) -> str:
    url = f"{s3_server}/{uuid.uuid4().hex}"
    maker.write(url, "targets", DIMS, content)
    return url


@pytest.fixture
def place(s3_server: str) -> str:
    return f"{s3_server}/{uuid.uuid4().hex}"


@pytest.fixture
def cache_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ShardCache]:
    """A cache of so many bytes, which every store that is opened from then on uses."""

    def make(capacity: int) -> ShardCache:
        cache = ShardCache(str(tmp_path / "cache"), capacity)
        monkeypatch.setattr(shard_cache, "shared", lambda: cache)
        return cache

    return make


def put(url: str, size: int = 10_000) -> ShardObject:
    content = bytes([len(url) % 256]) * size
    uri.write_bytes(url, content)
    return ShardObject(url, size, hashlib.sha256(content).hexdigest())


def content_of(cache: ShardCache, wanted: ShardObject, **how: bool) -> bytes | None:
    held = cache.obtain(wanted, **how)
    if held is None:
        return None
    with open(held.descriptor, "rb") as file:
        return file.read()


def files_in(folder: Path) -> dict[str, int]:
    """Name and bytes of what the folder holds, besides its own record."""
    found = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a lock that is let go of
            found[path.name] = path.stat().st_size
    return {name: size for name, size in found.items() if name != "usage"}


def held_in(folder: Path) -> int:
    """Bytes in the folder at one moment, while others fill it."""
    if not (folder / "usage").exists():
        return 0
    with open(folder / "usage", "rb") as usage:  # nothing is removed or renamed meanwhile
        fcntl.flock(usage, fcntl.LOCK_EX)
        return sum(files_in(folder).values())


def shard_gets(proxy: S3Proxy) -> Counter[str]:
    """How often each shard object was asked for."""
    return Counter(
        request.key for request in proxy.requests if request.operation == "GET" and not request.key.endswith(".json")
    )


def check(view, content, indices) -> None:
    read = view.read(indices)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(read, name), content["train"][name][indices])


# Requests


def test_each_shard_is_fetched_once_for_many_random_reads(store: str, content, s3_proxy: S3Proxy) -> None:
    view, rng = open_targets(store), np.random.default_rng(0)
    for _ in range(60):
        check(view, content, rng.integers(0, BLOCKS, 4))
    assert len(shard_gets(s3_proxy)) == 4 * 5
    assert s3_proxy.counts() == {"GET": 1 + 4 * 5}, "the manifest, and each object once"
    assert all(request.range is None for request in s3_proxy.requests)
    s3_proxy.forget()
    check(open_targets(store), content, np.arange(BLOCKS))
    assert s3_proxy.counts() == {"GET": 1}, "another view, and in truth another process, finds them"


def test_what_is_missing_is_fetched_at_the_same_time(store: str, content, s3_proxy: S3Proxy) -> None:
    check(open_targets(store), content, np.arange(BLOCKS))
    assert s3_proxy.most_at_once > 4


READER = """
import sys, time
from pathlib import Path
import numpy as np
from storage.targets import open_targets

view, rng = open_targets(sys.argv[1]), np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(30):
    blocks = rng.permutation(len(view))[:3]
    assert np.array_equal(view.read(blocks).ids, np.load(sys.argv[3])[blocks])
print("done", flush=True)
"""


def test_processes_share_one_download_of_each_object(store: str, content, s3_proxy: S3Proxy, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", content["train"]["ids"])
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, store, str(number), str(tmp_path / "ids.npy")],
            cwd=REPOSITORY,
            env={**os.environ, "AWS_ENDPOINT_URL": s3_proxy.url},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for reader in readers:
        assert reader.stdout.readline() == "ready\n"
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
    for reader in readers:
        assert reader.communicate(timeout=60)[0] == "done\n"
        assert reader.returncode == 0
    assert set(shard_gets(s3_proxy).values()) == {1}
    assert len(shard_gets(s3_proxy)) == 4 * 5


def test_threads_share_one_download(place: str, folder: Path, s3_proxy: S3Proxy) -> None:
    cache, wanted = ShardCache(str(folder), 10**6), put(f"{place}/a")
    s3_proxy.forget()
    with ThreadPoolExecutor(16) as executor:
        found = list(executor.map(lambda _: content_of(cache, wanted), range(32)))
    assert found == [found[0]] * 32
    assert s3_proxy.counts() == {"GET": 1}


# Capacity


def test_the_folder_never_holds_more_than_its_capacity(place: str, folder: Path) -> None:
    objects = [put(f"{place}/{n}") for n in range(24)]
    cache, most, over = ShardCache(str(folder), 55_000), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, held_in(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(3) as executor:
        found = list(executor.map(lambda wanted: content_of(cache, wanted), objects))
    over.set()
    watcher.join()
    assert all(data is not None and len(data) == 10_000 for data in found)
    assert 20_000 <= most <= 55_000
    assert 20_000 <= sum(files_in(folder).values()) <= 55_000


FILLER = """
import contextlib, fcntl, hashlib, os, sys
import numpy as np
from storage.reading.shard_cache import ShardCache, ShardObject
folder, place, seed = sys.argv[1:]
cache, rng, most = ShardCache(folder, 75_000), np.random.default_rng(int(seed)), 0
for n in rng.integers(0, 12, 40):
    sha256 = hashlib.sha256(bytes([n]) * 10_000).hexdigest()
    held = cache.obtain(ShardObject(f"{place}/{n}", 10_000, sha256))
    assert held is None or os.read(held.descriptor, 20_000) == bytes([n]) * 10_000
    with open(f"{folder}/usage", "rb") as usage:  # no file is removed or renamed meanwhile
        fcntl.flock(usage, fcntl.LOCK_EX)
        total = 0
        for name in os.listdir(folder):
            if name != "usage":
                with contextlib.suppress(FileNotFoundError):  # an empty `.part`, where the file has come meanwhile
                    total += os.path.getsize(f"{folder}/{name}")
        most = max(most, total)
print(most)
"""


def test_many_processes_keep_one_folder_within_its_capacity(place: str, folder: Path) -> None:
    for n in range(12):
        uri.write_bytes(f"{place}/{n}", bytes([n]) * 10_000)
    command = [sys.executable, "-c", FILLER, str(folder), place]
    fillers = [
        subprocess.Popen([*command, str(n)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    for filler in fillers:
        most, errors = filler.communicate(timeout=60)
        assert filler.returncode == 0, errors
        assert 40_000 <= int(most) <= 75_000
    assert sum(files_in(folder).values()) <= int((folder / "usage").read_bytes()) <= 75_000


def test_what_was_used_longest_ago_makes_room(place: str, folder: Path) -> None:
    cache = ShardCache(str(folder), 45_000)
    objects = [put(f"{place}/{n}") for n in range(5)]
    for age, wanted in enumerate(objects[:4]):
        content_of(cache, wanted)
        past = time.time() - 100 + age
        os.utime(folder / wanted.name, (past, past))
    os.close(cache.open(objects[0]))  # the oldest by far, but used just now
    content_of(cache, objects[4])
    assert set(files_in(folder)) == {objects[n].name for n in (0, 2, 3, 4)}
    assert cache.open(objects[1]) is None


def test_a_file_that_is_open_outlives_its_eviction(place: str, folder: Path) -> None:
    cache = ShardCache(str(folder), 25_000)
    held = cache.obtain(put(f"{place}/a"))
    for n in range(4):
        content_of(cache, put(f"{place}/{n}"))
    assert len(files_in(folder)) == 2
    with open(held.descriptor, "rb") as file:
        assert len(file.read()) == 10_000


def test_what_was_fetched_ahead_goes_last(place: str, folder: Path) -> None:
    cache = ShardCache(str(folder), 45_000)
    ahead, others = put(f"{place}/ahead"), [put(f"{place}/{n}") for n in range(6)]
    content_of(cache, ahead, ahead=True)
    os.utime(folder / ahead.name, (1, 1))
    for wanted in others[:4]:
        content_of(cache, wanted)
    assert ahead.name in files_in(folder)
    os.close(cache.open(ahead))
    os.utime(folder / ahead.name, (1, 1))
    content_of(cache, others[5])
    content_of(cache, others[4])
    assert ahead.name not in files_in(folder), "read, it is one like all others"


def test_a_record_of_the_bytes_that_is_wrong_is_counted_anew(place: str, folder: Path) -> None:
    cache = ShardCache(str(folder), 35_000)
    content_of(cache, put(f"{place}/a"))
    for wrong in (b"34999", b"no number", b""):
        (folder / "usage").write_bytes(wrong)
        content_of(cache, put(f"{place}/{uuid.uuid4().hex}"))
        assert int((folder / "usage").read_bytes()) == sum(files_in(folder).values())


# Kills and other accidents


KILLED = """
import sys
from storage.reading.shard_cache import ShardCache, ShardObject
print("begins", flush=True)
ShardCache(sys.argv[1], 45_000).obtain(ShardObject(sys.argv[2], 10_000, sys.argv[3]))
"""


def test_a_kill_while_fetching_leaves_nothing_wrong(place: str, folder: Path, s3_proxy: S3Proxy) -> None:
    wanted = put(f"{place}/a")
    s3_proxy.forget()
    s3_proxy.fail(TEAR, "GET", times=1)
    s3_proxy.fail(HANG, "GET")
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder), wanted.url, wanted.sha256],
        cwd=REPOSITORY,
        env={**os.environ, "AWS_ENDPOINT_URL": s3_proxy.url},
    )
    deadline = time.monotonic() + 60
    while len(s3_proxy.requests) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert files_in(folder) == {f"{wanted.name}.part": 5_000}, "half of it had come"
    s3_proxy.forget()
    cache = ShardCache(str(folder), 45_000)
    # Another's turn: what was left behind counts until someone needs the room, and goes then.
    for n in range(4):
        assert len(content_of(cache, put(f"{place}/{n}"))) == 10_000
    assert f"{wanted.name}.part" not in files_in(folder)
    assert content_of(cache, wanted) == uri.read_bytes(wanted.url)


def test_the_next_takes_over_what_a_killed_process_left(place: str, folder: Path) -> None:
    cache, wanted = ShardCache(str(folder), 45_000), put(f"{place}/a")
    folder.mkdir()
    (folder / f"{wanted.name}.part").write_bytes(b"x" * 20_000)
    assert content_of(cache, wanted) == uri.read_bytes(wanted.url)
    assert files_in(folder) == {wanted.name: 10_000}


def test_a_folder_that_is_removed_meanwhile_is_made_again(store: str, content, folder: Path) -> None:
    view = open_targets(store)
    for _ in range(3):
        check(view, content, np.arange(BLOCKS))
        shutil.rmtree(folder)
    (folder / "usage").parent.mkdir()
    check(view, content, np.arange(BLOCKS))


@pytest.mark.usefixtures("short_waits")
def test_a_download_that_fails_leaves_nothing(place: str, folder: Path, s3_proxy: S3Proxy) -> None:
    cache, wanted = ShardCache(str(folder), 45_000), put(f"{place}/a")
    s3_proxy.fail("503 SlowDown", "GET")
    with pytest.raises(UnreachableError, match=r"/a: the S3 server answered 503 8 times"):
        cache.obtain(wanted)
    s3_proxy.forget()
    with pytest.raises(FileNotFoundError):
        cache.obtain(ShardObject(f"{place}/none", 10, ""))
    with pytest.raises(NotWhatWasWrittenError, match="10,000 bytes instead of 10,001"):
        cache.obtain(ShardObject(wanted.url, 10_001, wanted.sha256))
    with pytest.raises(NotWhatWasWrittenError, match="its bytes are not those that were written"):
        cache.obtain(ShardObject(wanted.url, 10_000, "0" * 64))
    assert files_in(folder) == {}
    assert int((folder / "usage").read_bytes()) == 0
    assert len(content_of(cache, wanted)) == 10_000


# Damage


def test_a_damaged_copy_is_fetched_once_more(store: str, content, folder: Path, s3_proxy: S3Proxy) -> None:
    view = open_targets(store)
    check(view, content, np.arange(BLOCKS))
    largest = max(files_in(folder), key=files_in(folder).__getitem__)
    whole = (folder / largest).read_bytes()
    flipped = bytearray(whole)
    flipped[3] ^= 1
    for damaged in (bytes(flipped), whole[:-5], whole[:-5] + b"12345", b"", whole + b"x"):
        (folder / largest).write_bytes(damaged)
        s3_proxy.forget()
        check(view, content, np.arange(BLOCKS))
        assert s3_proxy.counts() == {"GET": 1}
        assert (folder / largest).read_bytes() == whole


def test_damage_where_the_shard_lies_is_named_and_its_copy_dropped(store: str, content, s3_proxy: S3Proxy) -> None:
    url = f"{store}/train/ids/c/1/0/0"
    whole = uri.read_bytes(url)
    uri.write_bytes(url, whole[:3] + bytes([whole[3] ^ 1]) + whole[4:])
    view = open_targets(store)
    for _ in range(2):
        s3_proxy.forget()
        with pytest.raises(StoreDamagedError, match=r"array 'train/ids' is damaged in shard 1 \("):
            view.read([4, 5, 6, 7])
        assert shard_gets(s3_proxy)[url.removeprefix("s3://")] == 2, "once more, and not again and again"
    uri.write_bytes(url, whole)
    check(view, content, np.arange(4, 8))


def test_a_shard_that_was_made_anew_is_another_file(store: str, content, maker, folder: Path) -> None:
    check(open_targets(store), content, np.arange(BLOCKS))
    before = set(files_in(folder))
    changed = {**content, "train": maker.arrays("targets", DIMS, BLOCKS, seed=9)}
    uri.remove_tree(store)
    maker.write(store, "targets", DIMS, changed)
    check(open_targets(store), changed, np.arange(BLOCKS))
    assert len(set(files_in(folder)) - before) == 4 * 5


def test_a_shard_that_was_made_anew_is_read_by_ranges_too(
    place: str, maker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDK_SHARD_CACHE_MIB", "0")
    dims = {**BLOCK_DIMS, "seq_len": 200}
    tokens = maker.arrays("blocks", dims, 4)["tokens"]
    tokens[0] = 0  # compresses better than the others
    maker.write(place, "blocks", dims, {"train": {"tokens": tokens}, "validation": {"tokens": tokens[:1]}})
    view = open_blocks(place)
    np.testing.assert_array_equal(view.read([0, 1]), tokens[:2])
    spec = array_specs("blocks", dims)[0]
    again = encode_shard(spec, tokens[::-1], 4)
    assert len(again) == uri.size_of(f"{place}/train/tokens/c/0/0"), "only what lies where has changed"
    uri.write_bytes(f"{place}/train/tokens/c/0/0", again)
    np.testing.assert_array_equal(view.read([0, 3]), tokens[[3, 0]])


# The disk


LIMITED = """
import logging, resource, sys
import numpy as np
from storage.targets import open_targets
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
view = open_targets(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
for _ in range(3):
    assert np.array_equal(view.read(np.arange(len(view))).ids, np.load(sys.argv[2]))
"""


def test_where_nothing_can_be_written_blocks_are_read_by_ranges(
    store: str, content, folder: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "ids.npy", content["train"]["ids"])
    command = [sys.executable, "-c", LIMITED, store, str(tmp_path / "ids.npy")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING") == 1
    assert f"shards cannot be copied to {folder} ([Errno 27] File too large), so they are read remotely" in done.stdout
    assert all(size <= 200 for size in files_in(folder).values())
    assert not any(name.endswith(".part") for name in files_in(folder))


def test_a_full_disk_is_tried_again_later(
    store: str, content, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def full(path, *_):
        calls.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    view = open_targets(store)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "ddk"):
        patch.setattr("s3fs.core.open", full, raising=False)
        for _ in range(3):
            check(view, content, np.arange(BLOCKS))
    assert 0 < len(calls) <= 4 * 5, "not for every read"
    (record,) = caplog.records
    assert record.message.startswith(
        f"shards cannot be copied to {folder} ([Errno 28] No space left on device), so they "
    )
    assert "free some space there, set DDK_SHARD_CACHE_DIR to a folder with more space" in record.message
    assert files_in(folder) == {}
    monkeypatch.setattr(view._reader._cache, "_paused_until", 0.0)
    check(view, content, np.arange(BLOCKS))
    assert len(files_in(folder)) == 4 * 5


def test_a_folder_of_someone_else_is_refused(store: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = rf"^{folder}, where .* is not a folder of this user, .*; set DDK_SHARD_CACHE_DIR to one of your own"
    folder.write_bytes(b"")
    with pytest.raises(StoreError, match=message):
        open_targets(store).read([0])
    folder.unlink()
    folder.mkdir()
    monkeypatch.setattr("os.getuid", lambda: os.stat(folder).st_uid + 1)
    with pytest.raises(StoreError, match=message):
        open_targets(store).read([0])


def test_the_default_folder_is_this_users_alone(
    store: str, content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DDK_SHARD_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    default = tmp_path / f"ddk-shards-{os.getuid()}"
    default.symlink_to(tmp_path)
    with pytest.raises(StoreError, match="is not a folder of this user"):
        open_targets(store).read([0])
    default.unlink()
    check(open_targets(store), content, [0])
    assert stat.S_IMODE(default.stat().st_mode) == 0o700
    assert len(files_in(default)) == 4


# What the environment says


def test_the_environment_is_read_when_a_store_is_opened(
    store: str, content, folder: Path, monkeypatch: pytest.MonkeyPatch, s3_proxy: S3Proxy
) -> None:
    assert shared().capacity == 2048 * 2**20
    monkeypatch.setenv("DDK_SHARD_CACHE_MIB", "7")
    assert (shared().capacity, shared().folder) == (7 * 2**20, str(folder))
    assert shared() is shared()
    for wrong in ("many", "-1", "1.5"):
        monkeypatch.setenv("DDK_SHARD_CACHE_MIB", wrong)
        with pytest.raises(StoreError, match=rf"DDK_SHARD_CACHE_MIB is '{wrong}'; it must be a whole number of MiB"):
            open_targets(store)
    monkeypatch.setenv("DDK_SHARD_CACHE_MIB", "0")
    view = open_targets(store)
    check(view, content, [7, 1, 0])
    assert view.fetch([0, 9]) is True
    assert not folder.exists()
    assert all(request.range for request in s3_proxy.requests if not request.key.endswith(".json"))


def test_a_local_store_is_read_in_place(tmp_path: Path, maker, content, folder: Path) -> None:
    maker.write(f"{tmp_path}/a", "targets", DIMS, content)
    view = open_targets(f"{tmp_path}/a")
    assert view.fetch(range(BLOCKS)) is True
    check(view, content, np.arange(BLOCKS))
    assert not folder.exists()


# When copies are not worth it


def test_a_cache_that_holds_hardly_three_shards_is_not_used(
    store: str, content, folder: Path, s3_proxy: S3Proxy, cache_of
) -> None:
    sizes = [
        sum(o.bytes for o in shard.objects.values()) for shard in open_targets(store).manifest.splits["train"].shards
    ]
    for capacity, copies in ((3 * max(sizes) - 1, False), (3 * max(sizes), True)):
        cache_of(capacity)
        view = open_targets(store)
        s3_proxy.forget()
        check(view, content, np.array([9, 2]))
        assert all((request.range is None) == copies for request in s3_proxy.requests)


def test_copies_that_are_hardly_read_are_given_up(
    place: str, maker, s3_proxy: S3Proxy, cache_of, caplog: pytest.LogCaptureFixture
) -> None:
    dims = {**BLOCK_DIMS, "seq_len": 500, "shard_blocks": 32}
    content = {"train": maker.arrays("blocks", dims, 640), "validation": maker.arrays("blocks", dims, 1)}
    maker.write(place, "blocks", dims, content)
    cache_of(5 * 32 * 2_000)
    # In order, every block of what is fetched is read.
    view = open_blocks(place)
    for start in range(0, 640, 16):
        view.read(range(start, start + 16))
    assert set(shard_gets(s3_proxy).values()) == {1}
    # One of each: all is fetched for a thirty-second of it.
    rng, read = np.random.default_rng(0), 0
    while view._reader._cache is not None:
        blocks = 32 * rng.permutation(20)[:4] + rng.integers(0, 32, 4)
        np.testing.assert_array_equal(view.read(blocks), content["train"]["tokens"][blocks])
        read += 4
        assert read < 400
    s3_proxy.forget()
    with caplog.at_level(logging.WARNING, "ddk"):
        np.testing.assert_array_equal(view.read([639, 5, 5]), content["train"]["tokens"][[639, 5, 5]])
    assert all(request.range for request in s3_proxy.requests)
    assert view.fetch([0, 100]) is True


def test_all_stores_are_judged_together_and_given_up_singly(folder: Path) -> None:
    cache = ShardCache(str(folder), 100)
    # Of the token blocks little is read, but they are little beside the targets.
    assert cache.is_worth_it("targets", 190, 190)
    assert cache.is_worth_it("blocks", 20, 1)
    assert cache.is_worth_it("targets", 0, 0)
    # Not judged before the capacity could have been filled twice.
    assert cache.is_worth_it("targets", 190, 5)
    assert cache.is_worth_it("blocks", 9, 8)
    assert cache.is_worth_it("blocks", 1, 2)
    assert not cache.is_worth_it("targets", 0, 0)
    assert cache.is_worth_it("blocks", 0, 0)


def test_the_warning_says_how_much_was_wasted(place: str, maker, cache_of, caplog: pytest.LogCaptureFixture) -> None:
    dims = {**BLOCK_DIMS, "seq_len": 500, "shard_blocks": 32}
    maker.write(place, "blocks", dims, {split: maker.arrays("blocks", dims, 320) for split in ("train", "validation")})
    cache_of(4 * 32 * 2_000)
    view = open_blocks(place)
    with caplog.at_level(logging.WARNING, "ddk"):
        for _ in range(10):
            view.read(np.arange(0, 320, 32))
    (record,) = caplog.records
    assert re.match(
        r"of \d+ MiB of shards that were copied to .*, only \d+ MiB were read before the copies", record.message
    )
    assert f"are read remotely: {place} (train). Raise DDK_SHARD_CACHE_MIB" in record.message


# Fetching ahead


def test_what_was_fetched_is_read_without_a_request(store: str, content, folder: Path, s3_proxy: S3Proxy) -> None:
    view = open_targets(store)
    assert view.fetch([17, 0, 1]) is True
    assert len(shard_gets(s3_proxy)) == 2 * 4
    assert len(files_in(folder)) == 2 * 4
    s3_proxy.forget()
    assert view.fetch([2, 18]) is True
    check(view, content, np.array([0, 3, 18, 16]))
    assert s3_proxy.requests == []
    with pytest.raises(IndexError, match="of 19"):
        view.fetch([19])


def test_no_more_is_fetched_ahead_than_half_of_the_cache(store: str, content, folder: Path, cache_of) -> None:
    shard = sum(o.bytes for o in open_targets(store).manifest.splits["train"].shards[0].objects.values())
    cache_of(4 * shard + 400)
    view = open_targets(store)
    assert view.fetch(range(8)) is True
    assert view.fetch(range(12)) is False
    assert 2 * 4 <= len(files_in(folder)) < 3 * 4
    check(view, content, [0])
    assert view.fetch(range(12)) is True
    assert len(files_in(folder)) == 3 * 4


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which thread made each download."""
    threads: list[str] = []
    original = shard_cache._download

    def noting(*arguments) -> None:
        threads.append(threading.current_thread().name)
        original(*arguments)

    monkeypatch.setattr(shard_cache, "_download", noting)
    return threads


def test_the_loader_finds_every_shard_here(
    s3_server: str, folder: Path, maker, s3_proxy: S3Proxy, downloads: list[str], cache_of
) -> None:
    """Three domains, each far larger than the cache; a window at a time is here, and the next is fetched meanwhile."""
    dims, root, sizes = {**DIMS, "seq_len": 20}, f"{s3_server}/{uuid.uuid4().hex}", {"a": 61, "b": 80, "c": 47}
    block_dims = {name: size for name, size in dims.items() if name != "k"}
    arrays, blocks, targets, stored = {}, {}, {}, []
    for number, (domain, size) in enumerate(sizes.items()):
        arrays[domain] = maker.arrays("blocks", dims, size, seed=number)
        split = {"train": arrays[domain], "validation": maker.arrays("blocks", dims, 1)}
        stored.append(maker.write(f"{root}/blocks/{domain}", "blocks", block_dims, split))
        split = {part: maker.arrays("targets", dims, len(found["tokens"])) for part, found in split.items()}
        stored.append(maker.write(f"{root}/targets/{domain}", "targets", dims, split))
    stored_shards = [shard for one in stored for part in one.splits.values() for shard in part.shards]
    cache_of(sum(record.bytes for shard in stored_shards for record in shard.objects.values()) // 2)
    for domain in sizes:
        blocks[domain] = open_blocks(f"{root}/blocks/{domain}")
        targets[domain] = open_targets(f"{root}/targets/{domain}")
    data = TrainData(blocks=blocks, targets=targets)
    state, plans, mixture = initial_state(sizes), [], equal_mixture(list(sizes))
    windows = {domain: Window(4, 2) for domain in sizes}
    for _ in range(60):
        plan, state = draw(mixture, sizes, 3, state, 3, windows)
        plans.append(plan)
    s3_proxy.forget()
    late: list[int] = []
    for step, batch in enumerate(prefetch(plans, data, fetch_ahead=12)):
        expected = np.stack([arrays[one.domain]["tokens"][one.index] for one in plans[step]])
        np.testing.assert_array_equal(batch.tokens_BL1, expected)
        time.sleep(0.15)  # the training; a slow server fetches a window meanwhile
        late.append(sum(not name.startswith("ddk-fetch") for name in downloads))
    assert late[-1] == late[5], "after the first steps the reading thread never fetched"
    assert len(downloads) > 5 * late[-1]
    assert len(shard_gets(s3_proxy)) > 0.9 * 5 * sum(-(-size // 4) for size in sizes.values())
    assert Counter(shard_gets(s3_proxy).values())[1] > 0.9 * len(shard_gets(s3_proxy)), "hardly any was fetched twice"


def test_closing_the_loader_in_the_middle_of_a_fetch_does_not_hang(store: str, s3_proxy: S3Proxy, maker) -> None:
    blocks_url = f"{store}-blocks"
    content = {split: maker.arrays("blocks", DIMS, BLOCKS) for split in ("train", "validation")}
    maker.write(blocks_url, "blocks", BLOCK_DIMS, content)
    data = TrainData(blocks={"a": open_blocks(blocks_url)}, targets={"a": open_targets(store)})
    s3_proxy.fail(HANG, "GET", "train/ids/c/4/")
    batches = prefetch([[Draw(domain="a", index=index)] for index in (0, 1, 2, 3, 4, 5, 18)], data)
    next(batches)
    deadline = time.monotonic() + 30
    while not any(request.answered == HANG for request in s3_proxy.requests) and time.monotonic() < deadline:
        time.sleep(0.01)
    batches.close()
    hanging = [request for request in s3_proxy.requests if request.answered == HANG]
    assert len(hanging) == 1, "whoever waited for the fetch would see it given up, and tried again"
