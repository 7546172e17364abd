"""Which leaves a file holds, and what changes a leaf's digest: its own documents, and nothing else."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddk.errors import UserError
from storage.corpus import leaves as module
from storage.corpus.documents import Text
from storage.corpus.domain import DomainConfig, domain_seed
from storage.corpus.files import CorpusFile
from storage.corpus.leaves import Leaf, LeafIndex, in_leaf_validation, iter_leaf_documents, read_leaves
from storage.files.remembered import remember

RECORDS: list[dict[str, Any]] = [
    {"text": f"document {n}", "topic": ["algebra/linear", "algebra/rings", "geometry"][n % 3], "id": n}
    for n in range(30)
]


def config(**more: Any) -> DomainConfig:
    return DomainConfig.model_validate({"train": "a", "validation": "b", "path_field": "topic", **more})


def put(path: Path, records: list[dict[str, Any]]) -> CorpusFile:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return CorpusFile(url=str(path), name=path.name, size=path.stat().st_size)


@pytest.mark.parametrize(
    ("depth", "counts"),
    [(None, {"algebra/linear": 10, "algebra/rings": 10, "geometry": 10}), (1, {"algebra": 20, "geometry": 10})],
)
def test_leaves_and_how_many_documents_they_have(tmp_path: Path, depth: int | None, counts: dict[str, int]) -> None:
    file = put(tmp_path / "a.jsonl", RECORDS)
    found = read_leaves(file, config(path_depth=depth))
    assert {path: leaf.documents for path, leaf in found.items()} == counts
    assert list(found) == sorted(counts)
    documents = [document.text for path, document in iter_leaf_documents(file, config(path_depth=depth))]
    assert documents == [record["text"] for record in RECORDS]


def test_the_digest_is_of_the_documents_not_of_the_file(tmp_path: Path) -> None:
    want = read_leaves(put(tmp_path / "a.jsonl", RECORDS), config())
    assert len({leaf.digest for leaf in want.values()}) == 3
    renamed = [{"body": record["text"], "where": f" /{record['topic']}/ "} for record in RECORDS]
    for name, records, fields in (
        ("b.jsonl.gz", RECORDS, {}),
        ("c.parquet", RECORDS, {}),
        ("d.jsonl", renamed, {"text_field": "body", "path_field": "where"}),
        ("e.jsonl", [*RECORDS, {"text": "  ", "topic": "geometry"}], {}),  # no document
    ):
        assert read_leaves(put(tmp_path / name, records), config(**fields)) == want, name


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        (lambda r: [{"text": "new", "topic": "geometry"}, *r], {"geometry"}),
        (lambda r: [*r[:5], {"text": "new", "topic": "algebra/rings"}, *r[5:]], {"algebra/rings"}),
        (lambda r: r[1:], {"algebra/linear"}),
        (lambda r: [r[3], *r[1:3], r[0], *r[4:]], {"algebra/linear"}),  # two of its documents change places
        (lambda r: [r[1], r[0], *r[2:]], set()),  # each leaf's own order stays
        (lambda r: [{**r[0], "topic": "geometry"}, *r[1:]], {"algebra/linear", "geometry"}),
        (lambda r: [{**one, "id": 0} for one in r], set()),
    ],
)
def test_a_change_touches_its_own_leaf_alone(tmp_path: Path, change: Any, touched: set[str]) -> None:
    before = read_leaves(put(tmp_path / "a.jsonl", RECORDS), config())
    after = read_leaves(put(tmp_path / "b.jsonl", change(RECORDS)), config())
    assert {path for path in before if before[path] != after[path]} == touched


def test_a_prompt_is_part_of_the_document(tmp_path: Path) -> None:
    def digest(prompt: Any, text: str) -> str:
        record = {"prompt": prompt, "text": text, "topic": "a"}
        return read_leaves(put(tmp_path / "a.jsonl", [record]), config(prompt_field="prompt"))["a"].digest

    assert digest("ab", "c") != digest("a", "bc")
    assert digest(None, "c") == digest("", "c")


def test_what_was_read_is_remembered_by_content_and_fields(tmp_path: Path) -> None:
    file, url = put(tmp_path / "a.jsonl", RECORDS), str(tmp_path / "paths.json")
    found = read_leaves(file, config())
    LeafIndex(url).remember(file, "abc", config(), found)
    LeafIndex(url).remember(file, "def", config(), {"other": Leaf(1, "x")})
    index = LeafIndex(url)
    assert index.remembered(file, "abc", config()) == found
    elsewhere = CorpusFile(url="/elsewhere/b.jsonl", name="b.jsonl", size=0)
    assert index.remembered(elsewhere, "abc", config(max_train_blocks=3)) == found
    assert index.remembered(file, "abd", config()) is None
    for fields in ({"path_depth": 1}, {"path_field": "id"}, {"text_field": "id"}, {"prompt_field": "id"}):
        assert index.remembered(file, "abc", config(**fields)) is None
    whole = (tmp_path / "paths.json").read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole) - 1, 7)]
    assert len(flipped) > 20
    for damaged in (b"", b"[]", b"{", b'{"a": 1}', b"[" * 100_000, whole.replace(b"facts", b"fact"), *flipped):
        (tmp_path / "paths.json").write_bytes(damaged)
        assert LeafIndex(url).remembered(file, "abc", config()) is None
    LeafIndex(url).remember(file, "abc", config(), found)
    assert LeafIndex(url).remembered(file, "abc", config()) == found


@pytest.mark.parametrize(
    "leaves",
    [
        {"../x//": [1, "0" * 64]},
        {"a\n": [1, "0" * 64]},
        {"a": [0, "0" * 64]},
        {"a": [True, "0" * 64]},
        {"a": [10**400, "0" * 64], "": [1, "0" * 64]},
        {"a": [1, "../" * 22]},
        {"a": [1]},
        {"a": "x"},
        {},
        {str(number): [1, "0" * 64] for number in range(module.MOST_LEAVES + 1)},
    ],
)
def test_what_is_remembered_is_checked_whoever_wrote_it(tmp_path: Path, leaves: dict[str, Any]) -> None:
    url, file = f"{tmp_path}/paths.json", put(tmp_path / "a.jsonl", RECORDS)
    remember(url, {module._key(file, "abc", config()): leaves})
    assert LeafIndex(url).remembered(file, "abc", config()) is None


def test_a_field_that_is_no_path_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_LEAVES", 29)
    numbered = [{**record, "id": str(record["id"])} for record in RECORDS]
    file = put(tmp_path / "a.jsonl", numbered)
    with pytest.raises(UserError, match=r"a\.jsonl: field 'id' has more than 29 different paths, .*set path_depth"):
        read_leaves(file, config(path_field="id"))
    assert len(read_leaves(put(tmp_path / "b.jsonl", numbered[1:]), config(path_field="id"))) == 29


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, r"line 2: no field 'topic'; set path_field to one .*, or give the record one: 'text'"),
        ({"text": "x", "topic": None}, "line 2: field 'topic' is not a string but null; correct or remove the record"),
        ({"text": "x", "topic": ["a", "b"]}, "line 2: field 'topic' is not a string but an array"),
        (
            {"text": "x", "topic": " "},
            r"line 2: field 'topic' holds ' ', which is no path \(it is empty\); write",
        ),
        ({"text": "x", "topic": "a//b"}, r"line 2: field 'topic' holds 'a//b', which is no path \(a part of it is"),
    ],
)
def test_a_record_without_a_path_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        read_leaves(put(tmp_path / "a.jsonl", [RECORDS[0], record]), config())


def test_a_row_without_a_path_is_named(tmp_path: Path) -> None:
    rows = [{"text": "x", "topic": "a"}, {"text": "y", "topic": None}]
    with pytest.raises(UserError, match=r"a\.parquet, row 2: column 'topic' is null; fill or remove such rows"):
        read_leaves(put(tmp_path / "a.parquet", rows), config())
    with pytest.raises(UserError, match=r"a\.parquet: no column 'subject'; set path_field to one that is there"):
        read_leaves(put(tmp_path / "a.parquet", rows[:1]), config(path_field="subject"))
    with pytest.raises(UserError, match=r"column 'topic' holds int64, not strings; name a text column as path_field"):
        read_leaves(put(tmp_path / "a.parquet", [{"text": "x", "topic": 1}]), config())


def test_the_split_of_a_leaf_is_by_content_and_fixed_for_ever() -> None:
    def held_out(domain: str, fraction: float) -> set[int]:
        seed = domain_seed(domain)
        return {n for n in range(10_000) if in_leaf_validation(seed, Text(7, f"t{n}", ""), fraction)}

    assert sorted(held_out("math/a", 0.001)) == [116, 1655, 1691, 2192, 2336, 3520, 6912, 7045, 7565]
    base = held_out("math/a", 0.1)
    assert 850 < len(base) < 1150
    assert base < held_out("math/a", 0.2)
    assert held_out("math/a", 0.0) == set()
    assert len(base & held_out("math/b", 0.1)) < 200
    seed = domain_seed("math/a")
    for record in (0, 1):  # wherever it lies
        assert in_leaf_validation(seed, Text(record, "same", "p"), 0.5) == in_leaf_validation(
            seed, Text(2, "same", "p"), 0.5
        )


def test_validation_files_need_no_number_to_choose_by(tmp_path: Path) -> None:
    """All of their records are kept; those for training must have it."""
    chosen = config(select={"by": "field", "field": "quality", "at_least": 0.5})
    file = put(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(UserError, match="no field 'quality'"):
        read_leaves(file, chosen)
    assert read_leaves(file, chosen, held_out=True) == read_leaves(file, config())
    index = LeafIndex(f"{tmp_path}/paths.json")
    index.remember(file, "0" * 64, chosen, read_leaves(file, chosen, held_out=True), held_out=True)
    again = LeafIndex(f"{tmp_path}/paths.json")
    assert again.remembered(file, "0" * 64, chosen) is None
    assert again.remembered(file, "0" * 64, chosen, held_out=True) == read_leaves(file, config())
