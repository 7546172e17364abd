from __future__ import annotations

from typing import Any

import pytest

from storage.files import uri
from storage.runs.folder import RunFolder, name_to_make_again
from storage.stores.generations import newest_complete, to_make_again
from storage.stores.manifest import StoreWriter

DIMS = {"seq_len": 6, "vocab_size": 500, "shard_blocks": 4}


@pytest.fixture
def make(place: str, maker: Any) -> Any:
    def make(number: int, *, complete: bool) -> str:
        url = f"{place}/blocks/3f{'' if number == 1 else f'.{number}'}/math.zarr"
        content = {"train": maker.arrays("blocks", DIMS, 5), "validation": maker.arrays("blocks", DIMS, 2)}
        writer = StoreWriter(url, "blocks", {}, DIMS)
        maker.write_shards(writer, content)
        if complete:
            writer.finish()
        return url

    return make


def test_the_first_is_made_and_read_where_there_is_none(place: str) -> None:
    first = f"{place}/blocks/3f/math.zarr"
    assert newest_complete(first) == first
    assert to_make_again(first) == first


def test_made_again_beside_and_read_once_it_is_complete(make: Any) -> None:
    first = make(1, complete=True)
    assert newest_complete(first) == first
    second = to_make_again(first)
    assert second == make(2, complete=False)
    assert newest_complete(first) == first, "what is half done is not read"
    assert to_make_again(first) == second, "it was begun so, and goes on"
    make(2, complete=True)
    assert newest_complete(first) == second
    assert to_make_again(first) == make(3, complete=False)
    assert newest_complete(first) == second


def test_an_unfinished_first_is_left_alone(make: Any) -> None:
    first = make(1, complete=False)
    assert to_make_again(first) == make(2, complete=False)
    assert newest_complete(first) == first


def test_other_domains_have_generations_of_their_own(make: Any) -> None:
    make(1, complete=True)
    second = make(2, complete=True)
    code = make(1, complete=True).replace("math", "code")
    assert newest_complete(code) == code
    assert uri.exists(f"{second}/manifest.json")


def test_a_run_made_again_has_the_next_free_name(place: str) -> None:
    def begin(name: str, *, finish: bool) -> None:
        folder = RunFolder(place, name)
        folder.claim({"seed": 0}, {})
        if finish:
            folder.finish({})

    assert name_to_make_again(place, "run") == "run"
    begin("run", finish=True)
    assert name_to_make_again(place, "run") == "run.2"
    begin("run.2", finish=False)
    assert name_to_make_again(place, "run") == "run.2", "it was begun so, and goes on"
    begin("run.2", finish=True)
    assert name_to_make_again(place, "run") == "run.3"
