"""`ddk export` and `ddk import` as a user calls them: a captured cache goes out and comes in again elsewhere."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from foreign_rows import tokenizer_folder
from plain_distillkit import plain_decode, plain_unpack
from small_run import DOMAINS, Ddk, SmallRun, files_below, write_config

from ddk.errors import UserError
from flows.config import load_config
from flows.stores.describe import describe
from flows.stores.exchange import export_targets, imported_only
from flows.stores.verify import verify_all
from storage.blocks import open_blocks
from storage.exchange.distillkit import CompressionConfig
from storage.exchange.export import filled_up
from storage.targets import open_targets

K, L = 16, 96
COMPRESSION = CompressionConfig(
    d=4090, k=K, exact_k=2, exact_dtype="bfloat16", polynomial_terms=(0, 1, 2, "sqrt"), delta_encoding=False
)
SPLITS = ("train", "validation")


def store_of(root: Path, kind: str, domain: str) -> str:
    (found,) = root.glob(f"{kind}/*/{domain}.zarr")
    return str(found)


@dataclass(frozen=True)
class Exchange:
    source: Path
    """The root with the captured stores."""
    exported: Path
    """A folder for each domain; 'code' in DistillKit's format."""
    config: str
    """Imports them; the model named as teacher is a tokenizer and nothing else."""
    root: Path
    out: str
    """What `ddk import` said."""


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory, small_run: SmallRun, ddk: Ddk, teacher_folder: str) -> Exchange:
    folder = tmp_path_factory.mktemp("exchange")
    exported = folder / "exported"
    (folder / "mine.yaml").write_text(yaml.safe_dump(COMPRESSION.model_dump(mode="json")))
    formats = {"code": ("--format", "distillkit", "--config", str(folder / "mine.yaml"))}
    domains: dict[str, Any] = {}
    for domain in DOMAINS:
        for split in SPLITS:
            url = store_of(small_run.root, "targets", domain)
            export_targets(
                url,
                str(exported / domain),
                row_format="distillkit" if domain in formats else "topk",
                config=str(folder / "mine.yaml"),
                split=split,
                say=lambda line: None,
            )
        domains[domain] = {
            "targets": "distillkit" if domain in formats else "topk",
            **{split: f"./exported/{domain}/{split}-*.parquet" for split in SPLITS},
        }
    config = write_config(folder)
    data = yaml.safe_load(Path(config).read_text())
    data["domains"] = domains
    data["teacher"] = {
        "model": tokenizer_folder(teacher_folder, folder / "tokenizer"),
        "k": K,
        "shard_blocks": 1,
        "codec": {"name": "exact"},
    }
    Path(config).write_text(yaml.safe_dump(data))
    done = ddk("import", config)
    assert done.code == 0, done.err
    return Exchange(small_run.root, exported, config, folder / "root", done.out)


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_the_command_says_what_came_out(exchange: Exchange) -> None:
    lines = exchange.out.splitlines()
    assert len(lines) == 3
    for domain, line in zip(sorted(DOMAINS), lines, strict=True):
        assert line.startswith(f"{domain}: 46 shards written, teacher perplexity ")
        assert line.endswith(f"{domain}.zarr")


@pytest.mark.parametrize("split", SPLITS)
def test_topk_rows_hold_what_the_store_holds(exchange: Exchange, split: Any) -> None:
    found = rows(exchange.exported / "math", split)
    targets = open_targets(store_of(exchange.source, "targets", "math"), split)
    stored = targets.read(np.arange(len(targets)))
    tokens = open_blocks(store_of(exchange.source, "blocks", "math"), split).read(np.arange(len(targets)))
    assert [row["input_ids"] for row in found] == tokens.tolist()
    for b, row in enumerate(found):
        assert [len(ids) for ids in row["topk_ids"]] == (stored.logprobs[b] > -np.inf).sum(axis=-1).tolist()
        for j in range(L):
            count = len(row["topk_ids"][j])
            assert row["topk_ids"][j] == stored.ids[b, j, :count].tolist()
            assert row["topk_logprobs"][j] == stored.logprobs[b, j, :count].tolist()
        assert row["tail_mass"] == stored.tail_mass[b].tolist()
        assert row["true_logprobs"] == stored.true_logprobs[b].tolist()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("domain", ["math", "zh_books"])
def test_out_and_in_again_is_the_same(exchange: Exchange, domain: str, split: Any) -> None:
    ours, theirs = (open_targets(store_of(root, "targets", domain), split) for root in (exchange.root, exchange.source))
    assert len(ours) == len(theirs)
    back, gone = (view.read(np.arange(len(view))) for view in (ours, theirs))
    np.testing.assert_array_equal(back.logprobs, gone.logprobs)
    np.testing.assert_array_equal(back.ids * (back.logprobs > -np.inf), gone.ids * (gone.logprobs > -np.inf))
    np.testing.assert_array_equal(back.tail_mass, gone.tail_mass)
    np.testing.assert_array_equal(back.true_logprobs, gone.true_logprobs)
    blocks = [open_blocks(store_of(root, "blocks", domain), split) for root in (exchange.root, exchange.source)]
    first, second = (view.read(np.arange(len(view))) for view in blocks)
    np.testing.assert_array_equal(first, second)


def test_distillkits_bytes_are_what_the_format_promises(exchange: Exchange) -> None:
    folder = exchange.exported / "code"
    config = CompressionConfig.model_validate(yaml.safe_load((folder / "compression_config.yaml").read_text()))
    assert config == COMPRESSION
    schema = pq.read_schema(next(folder.glob("train-*.parquet")))
    assert [str(kind) for kind in schema.types[:3]] == [
        "list<element: uint64>",
        "list<element: list<element: uint8>>",
        "list<element: list<element: uint8>>",
    ]
    targets = open_targets(store_of(exchange.source, "targets", "code"))
    stored = targets.read(np.arange(len(targets)))
    t = np.arange(K - 2, dtype=np.float64)
    basis = np.stack([t**0, t, t**2, np.sqrt(t)], axis=1)
    for b, row in enumerate(rows(folder, "train")[:8]):
        assert len(row["compressed_logprobs"]) == len(row["bytepacked_indices"]) == len(row["input_ids"]) - 1 == L
        for j in range(0, L, 7):
            ids = plain_unpack(bytes(row["bytepacked_indices"][j]), 12, K)
            values = plain_decode(bytes(row["compressed_logprobs"][j]), config)
            entry = stored.logprobs[b, j] > -np.inf
            assert ids[: entry.sum()] == stored.ids[b, j][entry].tolist()
            assert len(set(ids)) == K, "what fills a position up are other tokens"
            np.testing.assert_allclose(values[:2], stored.logprobs[b, j, :2], rtol=2**-8)
            if entry.all():
                exact = stored.logprobs[b, j, 2:].astype(np.float64)
                fitted = basis @ np.linalg.lstsq(basis, exact, rcond=None)[0]
                np.testing.assert_allclose(values[2:], fitted, atol=1e-3)


def test_an_imported_distillkit_cache_is_a_distribution_near_the_first(exchange: Exchange) -> None:
    ours, theirs = (open_targets(store_of(root, "targets", "code")) for root in (exchange.root, exchange.source))
    back, gone = (view.read(np.arange(len(view))) for view in (ours, theirs))
    mass = np.exp(back.logprobs.astype(np.float64)).sum(axis=-1) + back.tail_mass
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    np.testing.assert_array_equal(back.true_logprobs, gone.true_logprobs)
    assert np.abs(np.exp(back.logprobs[..., 0]) - np.exp(gone.logprobs[..., 0])).mean() < 0.02


def test_the_stores_are_ordinary_ones(exchange: Exchange, ddk: Ddk) -> None:
    said: list[str] = []
    assert verify_all(str(exchange.root), full=True, repair=False, say=said.append)
    assert len([line for line in said if line.endswith("sound")]) == 6
    inspected = list(describe(store_of(exchange.root, "targets", "code")))
    assert any("imported: distillkit" in line for line in inspected)
    assert any("teacher perplexity on the validation blocks" in line for line in inspected)
    again = ddk("cache", exchange.config)
    assert again.code == 0, again.err
    assert again.err.count("complete already") == 3


def test_training_from_an_imported_cache_is_training_from_the_first(
    exchange: Exchange, small_run: SmallRun, ddk: Ddk, tmp_path: Path
) -> None:
    """Without 'code', whose bytes are approximate; the sampling of 'kd' does not look at perplexities."""
    students = []
    for name, config, root in (("from", small_run.config, exchange.source), ("into", exchange.config, exchange.root)):
        data = yaml.safe_load(Path(config).read_text())
        base = Path(config).parent
        data["domains"] = {
            domain: {
                key: str(base / value[2:]) if isinstance(value, str) and value.startswith("./") else value
                for key, value in section.items()
            }
            for domain, section in data["domains"].items()
            if domain != "code"
        }
        data |= {"root": str(root), "run": f"two-{name}", "method": "kd"}
        data["train"] |= {"steps": 2}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(data))
        done = ddk("train", str(path))
        assert done.code == 0, done.err
        students.append((root / "runs" / f"two-{name}" / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]


def test_killed_in_the_middle_and_resumed_gives_the_same_bytes(exchange: Exchange, ddk: Ddk, tmp_path: Path) -> None:
    root = tmp_path / "root"
    ddk.kill_when(
        lambda: len(list(root.glob("targets/*/math.zarr/commits/*.json"))) >= 3,
        *("import", exchange.config, "--root", str(root)),
    )
    committed = {path.name for path in root.glob("targets/*/math.zarr/commits/*.json")}
    assert 0 < len(committed) < 46
    done = ddk("import", exchange.config, "--root", str(root))
    assert done.code == 0, done.err
    assert f"math: {46 - len(committed)} shards written" in done.out
    for kind in ("blocks", "targets"):
        resumed, uninterrupted = (
            {path: content for path, content in files_below(r / kind).items() if not path.endswith("manifest.json")}
            for r in (root, exchange.root)
        )
        assert resumed == uninterrupted


def test_captured_domains_are_left_out(exchange: Exchange, small_run: SmallRun) -> None:
    ours, theirs = load_config(exchange.config), load_config(small_run.config)
    both = ours.model_copy(update={"domains": {**ours.domains, "web": theirs.domains["math"]}})
    assert list(imported_only(both).domains) == sorted(DOMAINS)
    assert list(imported_only(both, ["math"]).domains) == ["math"]
    with pytest.raises(
        UserError, match="'web' is not a domain with targets: topk or distillkit; those are code, math, zh"
    ):
        imported_only(both, ["web"])
    with pytest.raises(UserError, match=r"no domain's files hold a teacher's predictions; set domains\.<domain>"):
        imported_only(theirs)


def test_the_card_says_what_it_is(exchange: Exchange) -> None:
    card = (exchange.exported / "math" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"] == [{"split": split, "path": f"{split}-*.parquet"} for split in SPLITS]
    for words in ("| domain | math |", "| tokens in a row | 97 |", "up to 16", "4090", "targets: topk"):
        assert words in card
    assert str(exchange.source) not in card


def test_an_export_goes_on_and_touches_nothing_else(exchange: Exchange, tmp_path: Path) -> None:
    folder = tmp_path / "math"
    shutil.copytree(exchange.exported / "math", folder)
    url = store_of(exchange.source, "targets", "math")
    file = next(folder.glob("train-*.parquet"))
    before, stamp = file.read_bytes(), file.stat().st_mtime_ns

    def export(url: str, **changes: Any) -> None:
        wanted = {"row_format": "topk", "config": "k50", "split": "train", "say": lambda line: None} | changes
        export_targets(url, str(folder), **wanted)

    export(url)
    assert file.stat().st_mtime_ns == stamp
    file.unlink()
    export(url)
    assert file.read_bytes() == before
    with pytest.raises(UserError, match=r"holds train-00000-of-00001\.parquet, of something else; export to an empty"):
        export(store_of(exchange.source, "targets", "zh_books"))


def test_an_export_in_many_files_to_s3(exchange: Exchange, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.exchange.export._POSITIONS_A_FILE", 7 * L)
    folder = f"{s3_server}/{uuid.uuid4().hex}"
    said: list[str] = []
    url = store_of(exchange.source, "targets", "math")
    export_targets(url, folder, row_format="topk", config="", split="train", say=said.append)
    assert said == [f"train: 40 rows of 97 tokens in 6 files  {folder}"]
    fs, path = fsspec.core.url_to_fs(folder)
    names = sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False))
    assert names == ["README.md", *(f"train-{i:05d}-of-00006.parquet" for i in range(6))]
    tables = [pq.read_table(fs.open(f"{path}/{name}")) for name in names[1:]]
    assert [len(table) for table in tables] == [7, 7, 7, 7, 7, 5]
    found = [row for table in tables for row in table.to_pylist()]
    assert found == rows(exchange.exported / "math", "train")


def test_positions_are_filled_up_with_other_tokens() -> None:
    ids = np.array([[3, 1, 0, 0], [9, 8, 7, 6], [0, 0, 0, 0]], dtype=np.int32)
    logprobs = np.log(np.array([[0.5, 0.1, 0, 0], [0.4, 0.3, 0.2, 0.1], [0, 0, 0, 0]]) + 1e-300).astype(np.float32)
    logprobs[logprobs < -100] = -np.inf
    full_ids, full = filled_up(ids, logprobs, np.array([0.4, 0.0, 1.0], dtype=np.float32), 10)
    assert full_ids.tolist() == [[3, 1, 0, 2], [9, 8, 7, 6], [0, 1, 2, 3]]
    np.testing.assert_allclose(np.exp(full[0]), [0.5, 0.1, 0.05, 0.05], rtol=1e-5)
    np.testing.assert_allclose(np.exp(full[2]), 0.1, rtol=1e-5)


# What a user gets wrong


def test_exports_that_cannot_be(exchange: Exchange, ddk_error: Any, tmp_path: Path) -> None:
    url, folder = store_of(exchange.source, "targets", "math"), str(tmp_path / "out")
    for arguments, message in (
        ((url, folder, "--format", "arrow"), "--format takes topk or distillkit, not 'arrow'"),
        ((url, folder, "--split", "test"), "--split takes train or validation, not 'test'"),
        (
            (url, folder, "--format", "distillkit"),
            "--config k50 has k 50, and the store keeps 16 entries a position; give",
        ),
        (
            (url, folder, "--format", "distillkit", "--config", "a.yaml"),
            "there is no a.yaml; --config takes k50, k128 or",
        ),
        ((store_of(exchange.source, "blocks", "math"), folder), "holds blocks, not targets; correct the URL"),
        ((str(tmp_path), folder), "there is no store at"),
    ):
        assert message in ddk_error("export", *arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "small.yaml").write_text("d: 1000\nk: 4\nexact_k: 4\n")
    small = ("--format", "distillkit", "--config", str(tmp_path / "small.yaml"))
    assert "has d 1000, and the store a vocabulary of 4090; set d to that" in ddk_error("export", url, folder, *small)


def test_a_bad_row_is_named(exchange: Exchange, ddk: Ddk, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1, 2], "topk_ids": [[2, 2]], "topk_logprobs": [[-1, -2]]}\n')
    data = yaml.safe_load(Path(exchange.config).read_text())
    data["root"], data["packing"] = str(tmp_path / "root"), {"seq_len": 1}
    (tmp_path / "good.jsonl").write_text('{"input_ids": [1, 2], "topk_ids": [[2, 3]], "topk_logprobs": [[-1, -2]]}\n')
    data["domains"] = {"mine": {"targets": "topk", "train": "bad.jsonl", "validation": "good.jsonl"}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(data))
    done = ddk("import", str(tmp_path / "bad.yaml"))
    assert done.code == 2, done.err
    assert "Traceback" not in done.err
    assert (
        f"ddk: {tmp_path}/bad.jsonl, line 1, position 0: id 2 is there twice; correct or remove the row\n" in done.err
    )
