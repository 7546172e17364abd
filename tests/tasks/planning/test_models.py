"""What a model's folder may name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddk.errors import UserError
from flows.stores.exchange import _blocks_url
from storage.errors import StoreDamagedError
from storage.files.digests import DigestCache
from storage.stores.manifest import Manifest
from tasks.comparing.collect import Collector
from tasks.planning.models import weight_digests


def folder(path: Path, index: bytes) -> str:
    for name in ("config.json", "a.safetensors"):
        (path / name).write_bytes(b"{}")
    (path / "model.safetensors.index.json").write_bytes(index)
    return str(path)


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "x/../../b", "", "..", 3, None, ["a"], {"a": 1}])
def test_an_index_of_weights_names_files_of_its_own_folder(tmp_path: Path, name: Any) -> None:
    index = json.dumps({"weight_map": {"w": "a.safetensors", "v": name}}).encode()
    with pytest.raises(StoreDamagedError, match=r"model\.safetensors\.index\.json names the file"):
        weight_digests(folder(tmp_path, index), DigestCache(str(tmp_path / "digests.json")), "teacher.model")


@pytest.mark.parametrize("index", [b"[]", b"{}", b'{"weight_map": ["a"]}', b"{"])
def test_an_index_that_is_none_is_named(tmp_path: Path, index: bytes) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is no"):
        weight_digests(folder(tmp_path, index), DigestCache(str(tmp_path / "digests.json")), "teacher.model")


def test_an_index_of_files_that_are_there_passes(tmp_path: Path) -> None:
    place = folder(tmp_path, b'{"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}')
    found = weight_digests(place, DigestCache(str(tmp_path / "digests.json")), "teacher.model")
    assert sorted(found) == ["a.safetensors", "config.json"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", None])
def test_a_fingerprint_that_was_stored_is_no_path(tmp_path: Path, name: Any) -> None:
    with pytest.raises(StoreDamagedError, match=r"identity\.json"):
        Collector(str(tmp_path), {})._manifest("blocks", "math", name)
    manifest = Manifest.model_construct(inputs={"blocks": name})
    with pytest.raises(StoreDamagedError, match=r"manifest\.json names the file"):
        _blocks_url("/r/targets/f/math.zarr", manifest)
