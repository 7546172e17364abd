from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resealing import resealed

from storage.errors import FormatVersionError, StoreDamagedError
from storage.files import uri
from storage.runs.checkpoints import CheckpointFolder

STATE = {"drawn": {"math": 3, "数学": 0}, "mixture_versions": [0, 1], "rate": 0.1 + 0.2}


def files(step: int, size: int = 1000) -> dict[str, Callable[[str], None]]:
    contents = {"model.safetensors": b"m%d" % step * size, "optimizer.safetensors": b"o%d" % step * size}

    def writer(content: bytes) -> Callable[[str], None]:
        def write(path: str) -> None:
            Path(path).write_bytes(content)

        return write

    return {name: writer(content) for name, content in contents.items()}


def save(folder: CheckpointFolder, step: int, files: Any, state: Any) -> None:
    folder.begin(step)
    folder.commit(step, {name: folder.put(step, name, write) for name, write in files.items()}, state)


def read(folder: CheckpointFolder, step: int, name: str) -> bytes:
    with folder.folder(step) as path:
        return (Path(path) / name).read_bytes()


@pytest.fixture
def folder(place: str) -> CheckpointFolder:
    return CheckpointFolder(f"{place}/runs/a")


def test_what_is_saved_is_read(folder: CheckpointFolder) -> None:
    assert folder.steps() == []
    for step in (100, 20, 123_456_789):
        save(folder, step, files(step), {**STATE, "step": step})
    assert folder.steps() == [20, 100, 123_456_789]
    for step in folder.steps():
        assert folder.state(step) == {**STATE, "step": step}
        assert read(folder, step, "model.safetensors") == b"m%d" % step * 1000
        assert read(folder, step, "optimizer.safetensors") == b"o%d" % step * 1000


def test_one_that_is_saved_again_is_replaced(folder: CheckpointFolder) -> None:
    save(folder, 5, files(1), {"a": 1})
    save(folder, 5, files(2), {"a": 2})
    assert folder.steps() == [5]
    assert (folder.state(5), read(folder, 5, "model.safetensors")[:2]) == ({"a": 2}, b"m2")


def test_what_a_kill_left_of_one_goes_when_it_is_saved_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    place = Path(folder.url(4))
    (place / "rank-00000.safetensors.ab.tmp.parts").mkdir(parents=True)
    (place / "rank-00000.safetensors.ab.tmp.parts" / "shard").write_bytes(b"half of it")
    (place / "rank-00000.safetensors.ab.tmp").write_bytes(b"a third")
    save(folder, 4, files(4), {})
    assert {path.name for path in place.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_one_that_fails_while_it_is_saved_again_no_longer_counts(folder: CheckpointFolder) -> None:
    def fail(path: str) -> None:
        raise OSError("disk full")

    save(folder, 4, files(4), {})
    save(folder, 5, files(5), {})
    with pytest.raises(OSError, match="disk full"):
        save(folder, 5, {**files(6), "optimizer.safetensors": fail}, {})
    assert folder.steps() == [4]


def test_only_what_is_committed_counts(folder: CheckpointFolder, place: str) -> None:
    save(folder, 10, files(10), STATE)
    base = f"{place}/runs/a/checkpoints"
    uri.write_bytes(f"{base}/step-00000020/model.safetensors", b"half")
    uri.write_bytes(f"{base}/step-notes/state.json", b"{}")
    uri.write_bytes(f"{base}/notes.txt", b"")
    assert folder.steps() == [10]
    with pytest.raises(StoreDamagedError, match=r"there is no checkpoint at .*step-00000020"):
        folder.state(20)


def test_killed_anywhere_the_one_before_stays_the_newest(
    tmp_path: Path, killed_at_each_rename: Callable[..., list[int]]
) -> None:
    code = """
from pathlib import Path
from storage.runs.checkpoints import CheckpointFolder
checkpoints = CheckpointFolder(folder)
def writer(letter):
    return lambda path: Path(path).write_bytes(letter * 100_000) and None
for step in (10, 20, 30):
    checkpoints.begin(step)
    put = {name: checkpoints.put(step, name, writer(name[:1].encode())) for name in ("model", "optimizer")}
    checkpoints.commit(step, put, {"step": step})
    checkpoints.prune(1)
"""
    deaths = killed_at_each_rename(code, f"{tmp_path}/out")
    assert deaths == list(range(1, 10))  # two files and the commit of each
    for death in deaths:
        folder = CheckpointFolder(f"{tmp_path}/out/{death}")
        newest = (death - 1) // 3 * 10
        assert folder.steps() == ([newest] if newest else [])
        if newest:
            assert folder.state(newest) == {"step": newest}
            assert read(folder, newest, "optimizer") == b"o" * 100_000
        # The next save and prune leave nothing of what was cut off.
        save(folder, 40, files(40), {})
        folder.prune(1)
        assert os.listdir(f"{tmp_path}/out/{death}/checkpoints") == ["step-00000040"]
        assert sorted(os.listdir(folder.url(40))) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_killed_at_any_moment_the_newest_is_whole(place: str, killed_after_lines: Callable[..., None]) -> None:
    code = """
import sys
from pathlib import Path
from storage.runs.checkpoints import CheckpointFolder
checkpoints = CheckpointFolder(sys.argv[1])
def writer(step):
    return lambda path: Path(path).write_bytes(bytes([step % 256]) * 300_000) and None
for step in range(10_000):
    checkpoints.begin(step)
    put = {name: checkpoints.put(step, name, writer(n)) for name, n in (("model", step), ("optimizer", step + 1))}
    checkpoints.commit(step, put, {"step": step})
    checkpoints.prune(2)
    print(step, flush=True)
"""
    for lines in (4,) if place.startswith("s3://") else (1, 2, 4):
        url = f"{place}/{lines}"
        killed_after_lines(code, url, lines=lines)
        folder = CheckpointFolder(url)
        steps = folder.steps()
        assert len(steps) in (1, 2, 3)
        assert steps[-1] >= lines - 1
        for step in steps:
            assert folder.state(step) == {"step": step}
            assert read(folder, step, "model") == bytes([step % 256]) * 300_000
            assert read(folder, step, "optimizer") == bytes([(step + 1) % 256]) * 300_000


def test_a_damaged_file_is_never_handed_out(folder: CheckpointFolder) -> None:
    save(folder, 10, files(10), STATE)
    url = f"{folder.url(10)}/model.safetensors"
    whole = uri.read_bytes(url)
    message = r"model\.safetensors is missing or damaged; remove the folder .*step-00000010 and run the same command"
    for position in (0, 1234, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        uri.write_bytes(url, bytes(damaged))
        with pytest.raises(StoreDamagedError, match=message):
            read(folder, 10, "model.safetensors")
    for damaged in (whole[:-1], whole + b"\0", b""):
        uri.write_bytes(url, damaged)
        with pytest.raises(StoreDamagedError, match=message):
            read(folder, 10, "model.safetensors")
    uri.remove_file(url)
    with pytest.raises(StoreDamagedError, match=message):
        read(folder, 10, "model.safetensors")


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"[]", b"{}", b'{"format_version": 3, "step": 10}'])
def test_a_damaged_state_is_named(folder: CheckpointFolder, damaged: bytes) -> None:
    save(folder, 10, files(10), STATE)
    uri.write_bytes(f"{folder.url(10)}/state.json", damaged)
    for use in (folder.state, lambda step: read(folder, step, "model.safetensors")):
        with pytest.raises(
            StoreDamagedError, match=r"state\.json is no.*; remove the folder .*step-00000010 and run the same command"
        ):
            use(10)


def test_a_newer_format_is_refused(folder: CheckpointFolder) -> None:
    save(folder, 10, files(10), STATE)
    url = f"{folder.url(10)}/state.json"
    uri.write_json(url, {**uri.read_json(url), "format_version": 4, "something_new": 1})
    with pytest.raises(FormatVersionError, match=r"state\.json has format version 4, .* reads version 3; update ddk"):
        folder.state(10)


def test_a_changed_number_and_an_exchanged_state_are_refused(folder: CheckpointFolder) -> None:
    for step in (10, 20):
        save(folder, step, files(step), STATE)
    first, second = (f"{folder.url(step)}/state.json" for step in (10, 20))
    whole = uri.read_bytes(first)
    uri.write_bytes(first, whole.replace(b'"math": 3', b'"math": 13'))
    with pytest.raises(StoreDamagedError, match="its content is not what was written"):
        folder.state(10)
    uri.write_bytes(first, uri.read_bytes(second))
    with pytest.raises(StoreDamagedError, match=r"is that of the checkpoint of step 20 .*exchanged or moved"):
        folder.state(10)


@pytest.mark.parametrize("name", ["/etc/cron.d/evil", "../../../evil", "a/b", "..", ""])
def test_a_state_names_no_file_outside_its_folder(folder: CheckpointFolder, tmp_path: Path, name: str) -> None:
    """On S3 a file of that name was written to the local disk."""
    save(folder, 10, files(10), STATE)
    record = {"bytes": 4, "sha256": "0" * 64}
    resealed(f"{folder.url(10)}/state.json", files={name.replace("/etc/cron.d", str(tmp_path)): record})
    with pytest.raises(StoreDamagedError, match=r"state\.json names the file .*, which would lead out of its folder"):
        read(folder, 10, "model.safetensors")
    assert not (tmp_path / "evil").exists()


def test_pruning_keeps_the_newest(folder: CheckpointFolder, place: str) -> None:
    folder.prune(2)
    for step in (10, 20, 30, 40):
        save(folder, step, files(step), {})
    folder.prune(9)
    assert folder.steps() == [10, 20, 30, 40]
    folder.prune(2)
    assert folder.steps() == [30, 40]
    assert uri.list_names(f"{place}/runs/a/checkpoints") == ["step-00000030", "step-00000040"]
    with pytest.raises(ValueError, match="keep is 0; the newest checkpoint always stays"):
        folder.prune(0)
    folder.prune(1)
    assert read(folder, 40, "model.safetensors")[:3] == b"m40"


def test_pruning_that_is_cut_off_leaves_nothing_that_counts(
    folder: CheckpointFolder, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(url: str) -> None:
        raise KeyboardInterrupt

    for step in (10, 20, 30):
        save(folder, step, files(step), {})
    with monkeypatch.context() as patch:
        patch.setattr(uri, "remove_tree", die)
        with pytest.raises(KeyboardInterrupt):
            folder.prune(1)
    assert folder.steps() == [20, 30]
    assert uri.exists(f"{folder.url(10)}/model.safetensors")
    # What is newer than those that are kept may be in writing, and stays.
    uri.write_bytes(f"{folder.url(40)}/model.safetensors", b"half")
    folder.prune(1)
    assert folder.steps() == [30]
    assert uri.list_names(f"{place}/runs/a/checkpoints") == ["step-00000030", "step-00000040"]


def test_a_large_file_is_written_once(tmp_path: Path) -> None:
    seen: list[str] = []

    def write(path: str) -> None:
        seen.append(path)
        Path(path).write_bytes(b"x")

    folder = CheckpointFolder(f"{tmp_path}/runs/a")
    save(folder, 1, {"model": write}, {})
    assert os.path.dirname(seen[0]) == folder.url(1)  # beside its place, and not first in a small /tmp
