"""Manifests and shards of somebody who makes every digest anew: one line that names the file, never a traceback."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resealing import resealed

from storage.blocks import open_blocks
from storage.checking.verify_store import uncommit, verify
from storage.errors import StoreDamagedError, StoreError
from storage.files import uri
from storage.stores.codec import CodecConfig, TargetFormat
from storage.stores.compact import TAIL_LEVELS
from storage.stores.layout import array_specs, encode_shard
from storage.stores.manifest import (
    COPY,
    MANIFEST,
    StoreWriter,
    read_manifest,
    require_complete,
    sound_copy,
    write_manifest,
)
from storage.stores.schema import ObjectRecord
from storage.targets import open_targets, teacher_perplexity

DIMS = {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4, "k": 3}
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def store(tmp_path: Path, maker) -> str:
    url = f"{tmp_path}/math.zarr"
    content = {split: maker.arrays("targets", DIMS, 5) for split in ("train", "validation")}
    maker.write(url, "targets", DIMS, content)
    return url


def _shard(content: dict[str, Any]) -> dict[str, Any]:
    return content["splits"]["train"]["shards"][0]


def _object(content: dict[str, Any]) -> dict[str, Any]:
    return _shard(content)["objects"]["ids"]


CRAFTED: list[Change] = [
    lambda c: c["dims"].pop("seq_len"),
    lambda c: c["dims"].pop("k"),
    lambda c: c["dims"].update(seq_len=0),
    lambda c: c["dims"].update(seq_len=-1),
    lambda c: c["dims"].update(seq_len=10**12),
    lambda c: c["dims"].update(seq_len=1e9),
    lambda c: c["dims"].update(seq_len=True),
    lambda c: c["dims"].update(k=2**24, seq_len=2**24),
    lambda c: c["dims"].update(k=501),
    lambda c: c["dims"].update(shard_blocks=0),
    lambda c: c["dims"].update(shard_blocks=2**40),
    lambda c: c["dims"].update(vocab_size=0),
    lambda c: c["dims"].update(other=1),
    lambda c: c.update(dims=[]),
    lambda c: c.update(kind="rubbish"),
    lambda c: c.update(kind="blocks"),
    lambda c: c.update(targets=None),
    lambda c: c["targets"].update(draws=-1),
    lambda c: c["targets"].update(draws=10**15),
    lambda c: c["targets"].update(temperatures=[0.0]),
    lambda c: c["targets"].update(temperatures=["x"]),
    lambda c: c["targets"]["codec"].update(levels=0),
    lambda c: c.update(splits={}),
    lambda c: c["splits"].pop("validation"),
    lambda c: c["splits"]["train"].update(blocks=10**18),
    lambda c: c["splits"]["train"].update(blocks=-5),
    lambda c: c["splits"]["train"]["shards"].reverse(),
    lambda c: _shard(c).pop("objects"),
    lambda c: _shard(c)["objects"].pop("ids"),
    lambda c: _shard(c)["objects"].update(other=_object(c)),
    lambda c: _shard(c)["objects"].update({"../../x": _object(c)}),
    lambda c: _shard(c).update(blocks=0),
    lambda c: _shard(c).update(blocks=2**62),
    lambda c: _object(c).update(bytes=0),
    lambda c: _object(c).update(bytes=-1),
    lambda c: _object(c).update(bytes=2**63),
    lambda c: _object(c).update(bytes="12"),
    lambda c: _object(c).update(sha256="0" * 63),
    lambda c: _object(c).update(sha256="../" * 22),
    lambda c: _shard(c)["facts"].update(true_logprob_sum=math.nan),
    lambda c: _shard(c)["facts"].update(true_logprob_sum=1e9),
    lambda c: _shard(c)["facts"].update(true_logprob_sum="7"),
    lambda c: _shard(c)["facts"].update(tail_mass_sum=1e308),
    lambda c: _shard(c)["facts"].update(tail_mass_sum=[]),
    lambda c: _shard(c)["facts"].update(distortion={"count": 1}),
    lambda c: _shard(c)["facts"].update(distortion={"count": 1, "total": math.inf, "largest": 0, "histogram": {}}),
    lambda c: _shard(c)["facts"].update(distortion=7),
    lambda c: c.update(fingerprint="f" * 16),
    lambda c: c.update(fingerprint="../../../../etc"),
    lambda c: c.update(inputs={"another": "corpus"}),
    lambda c: c.update(name="code.zarr", fingerprint="f" * 16),
    lambda c: c.update(unknown=1),
]


@pytest.mark.parametrize("place", range(len(CRAFTED)))
def test_a_crafted_manifest_is_one_line(store: str, place: int) -> None:
    resealed(f"{store}/manifest.json", CRAFTED[place])
    for use in (read_manifest, open_targets, teacher_perplexity):
        with pytest.raises(
            StoreError, match=r"manifest\.json is no sound manifest \(.*`ddk verify .* --repair`"
        ) as caught:
            use(store)
        assert "\n" not in str(caught.value)


def _forge(url: str, name: str, split: str, blocks: np.ndarray[Any, Any]) -> None:
    """Another shard in the place of one, with all digests made anew."""
    manifest = require_complete(url, "targets" if "/targets/" in url else "blocks")
    spec = next(one for one in array_specs(manifest.kind, manifest.dims, manifest.targets) if one.name == name)
    content = encode_shard(spec, blocks, manifest.dims["shard_blocks"])
    uri.write_bytes(f"{url}/{split}/{name}/c/0" + "/0" * len(spec.block_shape), content)
    shards = list(manifest.splits[split].shards)
    record = ObjectRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    shards[0] = shards[0].model_copy(update={"objects": {**shards[0].objects, name: record}})
    part = manifest.splits[split].model_copy(update={"shards": tuple(shards)})
    write_manifest(url, manifest.model_copy(update={"splits": {**manifest.splits, split: part}}))


COMPACT = TargetFormat(codec=CodecConfig(), entropy=False, draws=2, temperatures=())


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("id_deltas", 600, "ids that are no tokens"),
        ("id_deltas", 2**31, "ids that are no tokens"),
        ("codes", 254, None),
        ("scalars", 4, "more tokens than there are"),
        ("scalars", TAIL_LEVELS + 1, "more tokens than there are|tails beyond the grid"),
    ],
)
def test_a_crafted_shard_is_one_line(tmp_path: Path, name: str, value: int, why: str | None) -> None:
    url = f"{tmp_path}/targets/a.zarr"
    writer = StoreWriter(url, "targets", {}, DIMS, COMPACT)
    specs = {spec.name: spec for spec in array_specs("targets", DIMS, COMPACT)}
    arrays = {one: np.zeros((4, *spec.block_shape), spec.dtype) for one, spec in specs.items()}
    arrays["scalars"][:, 0] = 2
    arrays["codes"][:] = 1
    for split in ("train", "validation"):
        writer.write_shard(split, 0, arrays)
    writer.finish()
    assert open_targets(url).read([0, 1]).ids.max() < DIMS["vocab_size"]
    _forge(url, name, "train", np.full_like(arrays[name], value))
    if why is None:
        assert open_targets(url).read([0]).ids.max() < DIMS["vocab_size"]
        return
    with pytest.raises(StoreDamagedError, match=rf"'train/.*' is damaged in shard 0 \(.*({why})"):
        open_targets(url).read([0, 3])


@pytest.mark.parametrize("token", [500, 2**31 - 1])
def test_a_token_that_is_none_is_named(tmp_path: Path, maker, token: int) -> None:
    url, dims = f"{tmp_path}/blocks/a.zarr", {name: size for name, size in DIMS.items() if name != "k"}
    content = {split: maker.arrays("blocks", dims, 4) for split in ("train", "validation")}
    maker.write(url, "blocks", dims, content)
    wrong = content["train"]["tokens"].copy()
    wrong[2, 3] = token
    _forge(url, "tokens", "train", wrong)
    with pytest.raises(StoreDamagedError, match=r"'train/tokens' is damaged in shard 0 \(it holds ids that are no"):
        open_blocks(url).read([0, 1, 2])


def test_an_intact_shard_in_the_place_of_another_is_found_by_the_reader(tmp_path: Path) -> None:
    """Of equal size, and every checksum of a chunk holds."""
    url, dims = f"{tmp_path}/blocks/a.zarr", {name: size for name, size in DIMS.items() if name != "k"}
    writer = StoreWriter(url, "blocks", {}, dims)
    for shard, token in enumerate((1, 2)):
        writer.write_shard("train", shard, {"tokens": np.full((4, 7), token, np.int32)})
    writer.write_shard("validation", 0, {"tokens": np.full((4, 7), 3, np.int32)})
    writer.finish()
    one, two = (Path(f"{url}/train/tokens/c/{shard}/0") for shard in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    view = open_blocks(url)
    assert view.read([0, 4])[:, 0].tolist() == [1, 2]
    one.write_bytes(second)
    two.write_bytes(first)
    for reader in (view, open_blocks(url)):
        with pytest.raises(StoreDamagedError, match=r"its bytes are not those that were written .*--repair"):
            reader.read([0])


def test_folders_of_two_stores_that_were_exchanged_are_refused(tmp_path: Path, maker) -> None:
    urls = []
    for domain in ("math", "code"):
        inputs = {"domain": domain}
        content = {split: maker.arrays("targets", DIMS, 4) for split in ("train", "validation")}
        done = maker.write(f"{tmp_path}/made/{domain}.zarr", "targets", DIMS, content, **inputs)
        url = tmp_path / "targets" / done.fingerprint / f"{domain}.zarr"
        url.parent.mkdir(parents=True)
        (tmp_path / "made" / f"{domain}.zarr").rename(url)
        urls.append(url)
    for url in urls:
        assert len(open_targets(str(url))) == 4
    aside = tmp_path / "aside"
    urls[0].rename(aside)
    urls[1].rename(urls[0])
    aside.rename(urls[1])
    for url in urls:
        with pytest.raises(StoreDamagedError, match=r"and this is the place of .*: folders were exchanged or moved"):
            open_targets(str(url))
    # Elsewhere than under a fingerprint nothing is promised: a copy can be looked at.
    urls[0].rename(tmp_path / "copy.zarr")
    assert len(open_targets(str(tmp_path / "copy.zarr"))) == 4


def test_a_lost_or_damaged_manifest_is_put_back_from_its_copy(store: str) -> None:
    whole = uri.read_bytes(f"{store}/{MANIFEST}") or b""
    for damage in (None, whole[:-9], whole.replace(b'"seq_len": 6', b'"seq_len": 7')):
        uri.remove_file(f"{store}/{MANIFEST}") if damage is None else uri.write_bytes(f"{store}/{MANIFEST}", damage)
        with pytest.raises(StoreDamagedError, match=r"manifest\.json is no.*`ddk verify .* --repair` restores it"):
            open_targets(store)
        with pytest.raises(StoreDamagedError, match="--repair"):
            StoreWriter(store, "targets", {}, DIMS)
        manifest = sound_copy(store)
        assert manifest is not None
        damages = verify(store, manifest, full=True)
        assert [one.path for one in damages] == [MANIFEST]
        assert uncommit(store, manifest, damages) == {}
        assert uri.read_bytes(f"{store}/{MANIFEST}") == whole
    uri.remove_file(f"{store}/{COPY}")
    manifest = require_complete(store, "targets")
    (damage,) = verify(store, manifest, full=True)
    assert str(damage) == "copy/manifest.json: missing"
    uncommit(store, manifest, [damage])
    assert uri.read_bytes(f"{store}/{COPY}") == whole


def test_a_repair_never_leaves_the_store(store: str, tmp_path: Path) -> None:
    """An array's folder is a link to somewhere else: what lies there is nobody's business here."""
    precious = tmp_path / "elsewhere"
    os.rename(f"{store}/train/ids", precious)
    os.symlink(precious, f"{store}/train/ids")
    victim = precious / "c" / "1" / "0" / "0"
    victim.write_bytes(b"rubbish")
    manifest = require_complete(store, "targets")
    damages = verify(store, manifest, full=True)
    with pytest.raises(StoreDamagedError, match=r"lies outside .*, behind a symbolic link, and is not touched"):
        uncommit(store, manifest, damages)
    assert victim.read_bytes() == b"rubbish"
    assert require_complete(store, "targets") == manifest
