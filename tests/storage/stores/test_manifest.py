from __future__ import annotations

import cProfile
import json
import os
from pathlib import Path

import numpy as np
import pytest
from resealing import resealed

from storage.blocks import open_blocks
from storage.errors import FormatVersionError, StoreDamagedError, StoreMissingError
from storage.files import uri
from storage.stores import manifest as storage_manifest
from storage.stores.manifest import StoreWriter, read_manifest
from storage.targets import open_targets

DIMS = {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4}
TARGET_DIMS = {**DIMS, "k": 3}
INPUTS = {"corpus": {"files": [["a.jsonl", "00"]]}, "seq_len": 6}


@pytest.fixture
def content(maker):
    """Ten train blocks (shards of 4, 4 and 2) and three validation blocks (one shard)."""
    return {"train": maker.arrays("blocks", DIMS, 10), "validation": maker.arrays("blocks", DIMS, 3, seed=1)}


# Beginning, resuming, finishing


def test_a_store_opens_when_it_is_finished_and_not_before(place: str, maker, content) -> None:
    with pytest.raises(StoreMissingError, match=r"there is no store at .*; run `ddk pack` first, or correct the URL"):
        open_blocks(place)
    with pytest.raises(StoreMissingError, match="run `ddk cache` first"):
        open_targets(place)
    writer = StoreWriter(place, "blocks", INPUTS, DIMS)
    unfinished = r"is not finished; run `ddk pack` again, it resumes where it stopped"
    with pytest.raises(StoreMissingError, match=unfinished):
        open_blocks(place)
    maker.write_shards(writer, content)
    with pytest.raises(StoreMissingError, match=unfinished):
        open_blocks(place)
    assert writer.finish({"tokens": 91}).complete
    np.testing.assert_array_equal(open_blocks(place).read(range(10)), content["train"]["tokens"])
    np.testing.assert_array_equal(open_blocks(place, "validation").read(range(3)), content["validation"]["tokens"])
    with pytest.raises(StoreMissingError, match=r"holds blocks, not targets; correct the URL"):
        open_targets(place)


def test_the_manifest_says_what_the_store_is(place: str, maker, content) -> None:
    maker.write(place, "blocks", DIMS, content, **INPUTS)
    found = read_manifest(place)
    assert (found.kind, found.inputs, found.dims, found.facts) == ("blocks", INPUTS, DIMS, {"seconds": 1.5})
    assert [shard.blocks for shard in found.splits["train"].shards] == [4, 4, 2]
    assert [shard.facts for shard in found.splits["train"].shards] == [{"shard": number} for number in range(3)]
    assert {split: found.splits[split].blocks for split in found.splits} == {"train": 10, "validation": 3}
    assert uri.size_of(f"{place}/train/tokens/c/2/0") == found.splits["train"].shards[2].objects["tokens"].bytes
    assert not uri.exists(f"{place}/commits")


def test_another_writer_goes_on_where_one_stopped(place: str, maker, content) -> None:
    first = StoreWriter(place, "blocks", INPUTS, DIMS)
    first.write_shard("train", 1, {"tokens": content["train"]["tokens"][4:8]}, {"shard": 1, "next": [0, 17]})
    first.write_shard("validation", 0, content["validation"], {"shard": 0})
    second = StoreWriter(place, "blocks", INPUTS, DIMS)
    assert {number: record.facts["next"] for number, record in second.committed("train").items()} == {1: [0, 17]}
    assert list(second.committed("validation")) == [0]
    assert maker.write_shards(second, content) == [("train", 0), ("train", 2)]
    second.finish()
    np.testing.assert_array_equal(open_blocks(place).read(range(10)), content["train"]["tokens"])


def test_gaps_are_refused(place: str, content) -> None:
    writer = StoreWriter(place, "blocks", INPUTS, DIMS)
    tokens = content["train"]["tokens"]
    writer.write_shard("validation", 0, content["validation"])
    writer.write_shard("train", 0, {"tokens": tokens[:4]})
    writer.write_shard("train", 2, {"tokens": tokens[8:]})
    with pytest.raises(ValueError, match=r"lacks shards of 'train'; committed are \[0, 2\]"):
        writer.finish()
    writer.write_shard("train", 1, {"tokens": tokens[4:7]})
    with pytest.raises(ValueError, match="lacks shards of 'train'"):
        writer.finish()
    with pytest.raises(StoreMissingError, match="not finished"):
        open_blocks(place)


def test_a_complete_store_is_never_written_again(tmp_path: Path, maker, content, files_below) -> None:
    url = f"{tmp_path}/a.zarr"
    done = maker.write(url, "blocks", DIMS, content, **INPUTS)
    before = {path: os.stat(f"{url}/{path}").st_mtime_ns for path in files_below(url)}
    again = StoreWriter(url, "blocks", INPUTS, DIMS)
    assert again.manifest == done
    assert [list(again.committed(split)) for split in ("train", "validation")] == [[0, 1, 2], [0]]
    assert maker.write_shards(again, content) == []
    assert again.finish({"seconds": 99.0}) == done
    with pytest.raises(ValueError, match="is complete; its shards are never written again"):
        again.write_shard("train", 0, {"tokens": content["train"]["tokens"][:4]})
    assert {path: os.stat(f"{url}/{path}").st_mtime_ns for path in files_below(url)} == before


def test_a_shard_of_another_form_is_refused_and_does_not_count(place: str, maker) -> None:
    writer = StoreWriter(place, "targets", INPUTS, TARGET_DIMS)
    arrays = maker.arrays("targets", TARGET_DIMS, 4)
    with pytest.raises(ValueError, match=r"a shard takes \['ids', 'logprobs', 'tail_mass', 'true_logprobs'\]"):
        writer.write_shard("train", 0, {"ids": arrays["ids"]})
    with pytest.raises(ValueError, match="all of equal length"):
        writer.write_shard("train", 0, {**arrays, "ids": arrays["ids"][:3]})
    with pytest.raises(ValueError, match="shard of 'tail_mass' has shape"):
        writer.write_shard("train", 0, {**arrays, "tail_mass": arrays["true_logprobs"].astype(np.float64)})
    assert writer.committed("train") == {}


# Killed


@pytest.mark.parametrize("kind", ["blocks", "targets"])
def test_killed_anywhere_it_ends_with_the_same_bytes(
    tmp_path: Path, maker, killed_at_each_rename, files_below, kind
) -> None:
    dims = DIMS if kind == "blocks" else TARGET_DIMS
    splits = {"train": 10, "validation": 3} if kind == "blocks" else {"train": 5, "validation": 1}
    whole = {split: maker.arrays(kind, dims, blocks) for split, blocks in splits.items()}
    for split, arrays in whole.items():
        np.savez(tmp_path / f"{split}.npz", **arrays)
    code = f"""
import numpy as np
from storage.stores.manifest import StoreWriter
writer = StoreWriter(f"{{folder}}/a.zarr", {kind!r}, {INPUTS!r}, {dims!r})
for split in ("train", "validation"):
    data = dict(np.load(f"{tmp_path}/{{split}}.npz"))
    for shard in range(-(-len(next(iter(data.values()))) // 4)):
        part = {{name: values[shard * 4 : shard * 4 + 4] for name, values in data.items()}}
        writer.write_shard(split, shard, part, {{"shard": shard}})
writer.finish(facts={{"seconds": 1.5}})
"""
    deaths = killed_at_each_rename(code, f"{tmp_path}/out", every=1 if kind == "blocks" else 4)
    reference = f"{tmp_path}/reference/a.zarr"
    maker.write(reference, kind, dims, whole, **INPUTS)
    expected = files_below(reference)
    arrays = len(whole["train"])
    shards = sum(-(-blocks // 4) for blocks in splits.values())
    renames = 1 + shards * (arrays + 1) + (3 + 2 * arrays) + 2  # header, shards, zarr.json files, copy, manifest
    assert deaths == list(range(1, renames + 1, 1 if kind == "blocks" else 4))
    for death in deaths:
        url = f"{tmp_path}/out/{death}/a.zarr"
        with pytest.raises(StoreMissingError):
            storage_manifest.require_complete(url, kind)
        committed = min(max(death - 2, 0) // (arrays + 1), shards)
        kept = {
            path: os.stat(f"{url}/{path}").st_mtime_ns
            for path in files_below(url)
            if "/c/" in path and not path.endswith(".tmp")
        }
        writer = StoreWriter(url, kind, INPUTS, dims)
        written = maker.write_shards(writer, whole)
        assert len(written) == shards - committed
        redone = {f"{split}/{name}/c/{shard}/" for split, shard in written for name in whole["train"]}
        for path, modified in kept.items():
            if not path.startswith(tuple(redone)):
                assert os.stat(f"{url}/{path}").st_mtime_ns == modified, path
        writer.finish(facts={"seconds": 1.5})
        assert files_below(url) == expected


def test_killed_at_any_moment_it_resumes(place: str, maker, killed_after_lines) -> None:
    code = """
import sys
import numpy as np
from storage.stores.manifest import StoreWriter
writer = StoreWriter(sys.argv[1], "blocks", {}, {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4})
for shard in range(10_000):
    writer.write_shard("train", shard, {"tokens": np.full((4, 7), shard % 500, np.int32)})
    print(shard, flush=True)
"""
    killed_after_lines(code, place, lines=5)
    writer = StoreWriter(place, "blocks", {}, DIMS)
    committed = writer.committed("train")
    assert 5 <= len(committed) < 10_000
    assert sorted(committed) == list(range(len(committed)))
    writer.write_shard("validation", 0, {"tokens": np.zeros((1, 7), np.int32)})
    writer.write_shard("train", len(committed), {"tokens": np.full((3, 7), 499, np.int32)})
    writer.finish()
    view = open_blocks(place)
    expected = np.repeat(np.append(np.arange(len(committed)) % 500, 499), 4)[:-1]
    np.testing.assert_array_equal(view.read(range(len(view)))[:, 0], expected)


def test_killed_while_tidying_up_the_store_is_complete(tmp_path: Path, maker, content, monkeypatch) -> None:
    url = f"{tmp_path}/a.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(uri, "remove_tree", lambda url: None)
        done = maker.write(url, "blocks", DIMS, content, **INPUTS)
    assert uri.exists(f"{url}/commits")
    assert StoreWriter(url, "blocks", INPUTS, DIMS).manifest == done
    assert len(open_blocks(url)) == 10


# Refused


def test_a_foreign_store_is_refused_with_the_fields_that_differ(place: str, maker, content) -> None:
    maker.write(place, "blocks", DIMS, content, **INPUTS)
    other = {"corpus": {"files": [["b.jsonl", "00"]]}, "seq_len": 6, "eos": None}
    with pytest.raises(StoreDamagedError, match=r"holds another store .*remove that folder") as caught:
        StoreWriter(place, "blocks", other, {**DIMS, "shard_blocks": 8})
    assert "dims.shard_blocks: 4 → 8" in str(caught.value)
    assert "inputs.corpus.files: [['a.jsonl', '00']] → [['b.jsonl', '00']]" in str(caught.value)
    assert "inputs.eos: (absent) → None" in str(caught.value)
    assert "seq_len" not in str(caught.value)
    with pytest.raises(StoreDamagedError, match="kind: 'blocks' → 'targets'"):
        StoreWriter(place, "targets", INPUTS, TARGET_DIMS)
    # What JSON does not tell apart is no difference.
    StoreWriter(place, "blocks", {"seq_len": 6, "corpus": {"files": (("a.jsonl", "00"),)}}, DIMS)


def edited(place: str, **changes) -> None:
    """By somebody who makes the digest anew: what then is left are the schema and the place."""
    resealed(f"{place}/manifest.json", **changes)


def test_a_newer_format_is_refused(place: str, maker, content) -> None:
    maker.write(place, "blocks", DIMS, content, **INPUTS)
    edited(place, format_version=4, something_new={"a": 1})
    message = r"manifest.json has format version 4, and this version of ddk reads version 3; update ddk"
    for opening in (read_manifest, open_blocks, lambda url: StoreWriter(url, "blocks", INPUTS, DIMS)):
        with pytest.raises(FormatVersionError, match=message):
            opening(place)


def test_an_unreadable_manifest_is_named(place: str, maker, content) -> None:
    maker.write(place, "blocks", DIMS, content, **INPUTS)
    whole = uri.read_bytes(f"{place}/manifest.json")
    remedy = r"`ddk verify .* --repair` restores it if possible; otherwise remove .* and run the stage again"
    for damaged in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"[1]", b"{}", whole.replace(b'"dims"', b'"dimz"')):
        uri.write_bytes(f"{place}/manifest.json", damaged)
        for opening in (read_manifest, open_blocks, lambda url: StoreWriter(url, "blocks", INPUTS, DIMS)):
            with pytest.raises(StoreDamagedError, match=rf"/manifest\.json is no.*{remedy}"):
                opening(place)


@pytest.mark.parametrize("damaged", [b"{", b"{}", b"[]", b'{"blocks": "many"}'])
def test_an_unreadable_commit_record_is_named(place: str, content, damaged: bytes) -> None:
    StoreWriter(place, "blocks", INPUTS, DIMS).write_shard("validation", 0, content["validation"])
    writer = StoreWriter(place, "blocks", INPUTS, DIMS)
    uri.write_bytes(f"{place}/commits/validation-00000000.json", damaged)
    remedy = r"validation-00000000\.json is no.*run the stage again: only this shard"
    with pytest.raises(StoreDamagedError, match=remedy):
        writer.committed("validation")


# Requests


def test_opening_costs_one_request_however_many_shards_there_are(s3_calls: list[str], s3_server: str, maker) -> None:
    for number, blocks in enumerate((2, 21)):
        url = f"{s3_server}/opening-{number}"
        dims = {**TARGET_DIMS, "shard_blocks": 2}
        arrays = maker.arrays("targets", dims, blocks)
        maker.write(url, "targets", dims, {"train": arrays, "validation": maker.arrays("targets", dims, 1)})
        s3_calls.clear()
        view = open_targets(url)
        assert s3_calls == ["get_object"]
        view.true_logprobs([0])
        assert s3_calls == ["get_object"] * 2  # the shard as a whole
        view.true_logprobs([0, 1])
        assert s3_calls == ["get_object"] * 2
        s3_calls.clear()
        assert StoreWriter(url, "targets", {}, dims).manifest.complete
        assert s3_calls == ["get_object"]


def test_without_a_cache_a_store_is_read_by_ranges(
    s3_calls: list[str], s3_server: str, maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, dims = f"{s3_server}/ranges", {**TARGET_DIMS, "shard_blocks": 4}
    content = {"train": maker.arrays("targets", dims, 21), "validation": maker.arrays("targets", dims, 1)}
    maker.write(url, "targets", dims, content)
    monkeypatch.setenv("DDK_SHARD_CACHE_MIB", "0")
    view = open_targets(url)
    s3_calls.clear()
    read = view.true_logprobs([7, 0, 6, 5])
    np.testing.assert_array_equal(read, content["train"]["true_logprobs"][[7, 0, 6, 5]])
    assert s3_calls == ["get_object"] * 4  # two indices, and from each shard one range
    np.testing.assert_array_equal(view.true_logprobs([4]), content["train"]["true_logprobs"][[4]])
    assert s3_calls == ["get_object"] * 5  # the index is known
    # Lost, truncated or flipped: named all the same.
    place = f"{url}/train/true_logprobs/c/1/0"
    whole = uri.read_bytes(place)
    for damaged in (whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], b"", None):
        uri.remove_file(place) if damaged is None else uri.write_bytes(place, damaged)
        with pytest.raises(StoreDamagedError, match=r"array 'train/true_logprobs' is damaged in shard 1 \("):
            open_targets(url).true_logprobs(range(8))


def test_resuming_lists_once_and_reads_each_record_once(s3_calls: list[str], s3_server: str, maker) -> None:
    url = f"{s3_server}/resuming"
    writer = StoreWriter(url, "blocks", {}, {**DIMS, "shard_blocks": 1})
    for shard in range(12):
        writer.write_shard("train", shard, {"tokens": np.zeros((1, 7), np.int32)})
    s3_calls.clear()
    assert len(StoreWriter(url, "blocks", {}, {**DIMS, "shard_blocks": 1}).committed("train")) == 12
    assert sorted(s3_calls) == ["get_object"] * 13 + ["list_objects_v2"]


def test_the_work_of_reading_a_manifest_is_linear_in_its_shards(tmp_path: Path, maker) -> None:
    done = maker.write(f"{tmp_path}/a", "targets", {**TARGET_DIMS, "shard_blocks": 1}, {
        split: maker.arrays("targets", TARGET_DIMS, 1) for split in ("train", "validation")
    })  # fmt: skip
    splits = json.loads((tmp_path / "a/manifest.json").read_bytes())["splits"]
    (record,) = splits["train"]["shards"]

    def calls(shards: int) -> int:
        splits["train"] = {"blocks": shards, "shards": [record] * shards}
        edited(f"{tmp_path}/a", splits=splits)
        with cProfile.Profile() as profile:
            assert len(StoreWriter(f"{tmp_path}/a", "targets", {}, done.dims).committed("train")) == shards
        return sum(entry.callcount for entry in profile.getstats())

    calls(10)  # what the first reading alone does, as compiling the schema, is no part of it
    few = calls(500)
    assert calls(5_000) < 12 * few
