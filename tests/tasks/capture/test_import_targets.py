"""Stores made from files that hold a teacher's predictions: no engine, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_rows import V, tokenizer_folder, topk_rows, write_distillkit, write_topk
from pydantic import ValidationError

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.values import SparseTargets, Split
from storage.blocks import open_blocks
from storage.checking.verify_store import uncommit, verify
from storage.corpus.domain import DomainConfig
from storage.exchange.distillkit import CompressionConfig, decode, encode
from storage.stores.manifest import read_manifest
from storage.targets import open_targets, teacher_perplexity
from tasks.capture.import_targets import import_targets
from tasks.packing.pack_rows import pack_rows
from tasks.planning.store_plan import Plan, StorePlan, plan_stores
from tasks.teachers.config import TeacherConfig

L, K = 10, 8
TRAIN = [35, 5, 11, 10, 64, 22, 100, 31, 12]
"""Tokens of the rows; blocks of 11 that overlap by one."""
BLOCKS = [(length - 1) // L for length in TRAIN]


@dataclass
class Importer:
    folder: Path
    tokenizer: str

    def plan(self, domain: dict[str, Any], **teacher: Any) -> Plan:
        settings = {"model": self.tokenizer, "k": K, "shard_blocks": 4, "codec": {"name": "exact"}} | teacher
        config = DomainConfig.model_validate({"targets": "topk", **domain})
        return plan_stores(
            str(self.folder / "root"),
            {"mine": config},
            PackingConfig(seq_len=L),
            TeacherConfig.model_validate(settings),
        )

    def __call__(self, domain: dict[str, Any], **teacher: Any) -> tuple[StorePlan, dict[str, Any], dict[str, Any]]:
        plan = self.plan(domain, **teacher)
        packed = pack_rows.fn(plan, "mine")
        return plan["mine"], packed, import_targets.fn(plan, "mine")


@pytest.fixture
def importer(tmp_path: Path, teacher_folder: str) -> Importer:
    return Importer(tmp_path, tokenizer_folder(teacher_folder, tmp_path / "tokenizer"))


@pytest.fixture
def domain(tmp_path: Path) -> dict[str, Any]:
    """Two train files and one for validation."""
    rows = topk_rows(TRAIN)
    write_topk(tmp_path / "train-0.parquet", rows[:4])
    write_topk(tmp_path / "train-1.parquet", rows[4:])
    write_topk(tmp_path / "validation.parquet", topk_rows([41, 25], seed=1))
    return {"train": str(tmp_path / "train-*.parquet"), "validation": str(tmp_path / "validation.parquet")}


def all_targets(store: StorePlan, split: Split = "train") -> SparseTargets:
    view = open_targets(store.targets_url, split)
    return view.read(np.arange(len(view)))


def cut(rows: list[dict[str, Any]], name: str, width: int = L) -> np.ndarray:
    """What belongs to each block, of one column."""
    return np.stack([row[name][b * L : b * L + width] for row in rows for b in range((len(row["input_ids"]) - 1) // L)])


def test_blocks_overlap_by_one_token_and_cross_no_rows(importer: Importer, domain: dict[str, Any]) -> None:
    store, packed, _ = importer(domain)
    rows = topk_rows(TRAIN)
    assert (packed["train_blocks"], packed["validation_blocks"]) == (sum(BLOCKS), 4 + 2)
    tokens = open_blocks(store.blocks_url).read(np.arange(sum(BLOCKS)))
    np.testing.assert_array_equal(tokens, cut(rows, "input_ids", L + 1))
    facts = read_manifest(store.blocks_url).facts
    assert facts["train_rows"] == len(TRAIN)
    assert facts["train_dropped_predictions"] == sum(length - 1 for length in TRAIN) - L * sum(BLOCKS)
    assert facts["validation_dropped_predictions"] == 4


def test_targets_are_those_of_the_files(importer: Importer, domain: dict[str, Any]) -> None:
    store, _, done = importer(domain)
    rows = topk_rows(TRAIN)
    targets = all_targets(store)
    np.testing.assert_array_equal(targets.ids_BLK, cut(rows, "topk_ids"))
    np.testing.assert_array_equal(targets.logprobs_BLK, cut(rows, "topk_logprobs"))
    np.testing.assert_array_equal(targets.true_logprobs_BL, cut(rows, "true_logprobs"))
    kept = np.exp(cut(rows, "topk_logprobs").astype(np.float64)).sum(axis=-1)
    np.testing.assert_allclose(targets.tail_mass_BL, 1 - kept, atol=1e-6)
    held_out = cut(topk_rows([41, 25], seed=1), "true_logprobs").astype(np.float64)
    assert done["teacher_ppl"] == pytest.approx(np.exp(-held_out.mean()), rel=1e-6)
    assert done["teacher_ppl"] == teacher_perplexity(store.targets_url)
    assert done["shards_written"] == -(-sum(BLOCKS) // 4) + 2
    assert not done["done_before"]


def test_a_second_time_nothing_is_done(importer: Importer, domain: dict[str, Any]) -> None:
    _, _, first = importer(domain)
    _, packed, second = importer(domain)
    assert packed["done_before"]
    assert second == {**first, "shards_written": 0, "done_before": True}


def test_the_plan_reads_no_weights_and_no_config_of_the_teacher(importer: Importer, domain: dict[str, Any]) -> None:
    assert not list(Path(importer.tokenizer).glob("config.json"))
    plan = importer.plan(domain)
    assert plan.vocab_size == V
    inputs = plan["mine"].targets_inputs["teacher"]
    assert inputs == {"imported": "topk", "version": 1, "k": K, "shift": 1, "compression": {}}


def test_the_fingerprint_follows_the_files_and_the_options(importer: Importer, domain: dict[str, Any]) -> None:
    before = importer.plan(domain)["mine"]
    shifted = importer.plan({**domain, "shift": 0})["mine"]
    assert shifted.blocks_url == before.blocks_url
    assert shifted.targets_url != before.targets_url
    captured = {**domain, "targets": "teacher", "text_field": "input_ids"}
    assert importer.plan({**captured, "targets": "distillkit"})["mine"].targets_url != before.targets_url
    write_topk(importer.folder / "validation.parquet", topk_rows([41, 26], seed=1))
    after = importer.plan(domain)["mine"]
    assert after.blocks_url != before.blocks_url
    assert after.targets_url != before.targets_url


def test_rows_are_held_out_by_their_place(importer: Importer, domain: dict[str, Any]) -> None:
    store, packed, _ = importer({"train": domain["train"], "validation_fraction": 0.3})
    assert 0 < packed["validation_blocks"] < sum(BLOCKS)
    assert packed["train_blocks"] + packed["validation_blocks"] == sum(BLOCKS)
    known = {tuple(tokens) for tokens in cut(topk_rows(TRAIN), "input_ids", L + 1).tolist()}
    for split in ("train", "validation"):
        view = open_blocks(store.blocks_url, split)
        tokens = view.read(np.arange(len(view)))
        assert {tuple(row) for row in tokens.tolist()} <= known
        known -= {tuple(row) for row in tokens.tolist()}
        for row, target in zip(tokens, all_targets(store, split).ids_BLK, strict=True):
            assert (target[:, 1] == row[1:]).all(), "each block has its own targets"


def test_a_limit_of_blocks(importer: Importer, domain: dict[str, Any]) -> None:
    store, packed, _ = importer({**domain, "max_train_blocks": 7, "max_validation_blocks": 1})
    assert (packed["train_blocks"], packed["validation_blocks"]) == (7, 1)
    np.testing.assert_array_equal(all_targets(store).ids_BLK, cut(topk_rows(TRAIN), "topk_ids")[:7])


@pytest.mark.parametrize("lost", [[0], [3], [5], [0, 1, 4], [2, 3, 4, 5, 6]])
def test_damaged_shards_alone_are_made_again(importer: Importer, domain: dict[str, Any], lost: list[int]) -> None:
    store, _, _ = importer(domain)
    before = {p: p.read_bytes() for p in Path(store.targets_url).rglob("c/**/*") if p.is_file()}
    manifest = read_manifest(store.targets_url)
    for shard in lost:
        victim = next(iter(sorted(Path(store.targets_url, "train").glob(f"*/c/{shard}/0*/0"))))
        victim.write_bytes(b"?" + victim.read_bytes()[1:])
    damages = verify(store.targets_url, manifest, full=True)
    assert uncommit(store.targets_url, manifest, damages) == {"train": lost}
    _, _, again = importer(domain)
    assert again["shards_written"] == len(lost)
    assert {p: p.read_bytes() for p in before} == before
    assert verify(store.targets_url, read_manifest(store.targets_url), full=True) == []


def test_large_stores_of_blocks_are_found_from_their_shards(
    importer: Importer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.planning.store_plan.BLOCKS_PER_SHARD", 6)
    lengths = [23, 12, 48, 7, 81, 33, 11, 120]
    rows = topk_rows(lengths)
    write_topk(tmp_path / "train.parquet", rows)
    write_topk(tmp_path / "validation.parquet", topk_rows([41], seed=1))
    domain = {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}
    store, _, _ = importer(domain)
    manifest = read_manifest(store.blocks_url)
    assert len(manifest.splits["train"].shards) > 4
    for number in range(1, 8):
        victim = Path(store.targets_url, "train/ids/c", str(number), "0/0")
        if victim.exists():
            victim.unlink()
            complete = read_manifest(store.targets_url)
            uncommit(store.targets_url, complete, verify(store.targets_url, complete, full=False))
            _, _, again = importer(domain)
            assert again["shards_written"] == 1
    np.testing.assert_array_equal(all_targets(store).ids_BLK, cut(rows, "topk_ids"))
    # The blocks as well, from the first damaged shard on, and the counts with them.
    facts = {name: count for name, count in manifest.facts.items() if name != "seconds"}
    Path(store.blocks_url, "train/tokens/c/2/0").unlink()
    uncommit(store.blocks_url, manifest, verify(store.blocks_url, manifest, full=False))
    importer(domain)
    assert {n: c for n, c in read_manifest(store.blocks_url).facts.items() if n != "seconds"} == facts
    assert (
        open_blocks(store.blocks_url).read(np.arange(sum((n - 1) // L for n in lengths))).tolist()
        == cut(rows, "input_ids", L + 1).tolist()
    )


# DistillKit

SMALL = CompressionConfig(d=V, k=K, exact_k=0, polynomial_terms=(0, 1), delta_encoding=False)
"""So poor a fit that some sums exceed 1."""


def test_distillkit(importer: Importer, tmp_path: Path) -> None:
    rows = topk_rows(TRAIN)
    write_distillkit(tmp_path / "train.parquet", rows, SMALL)
    write_topk(tmp_path / "validation.parquet", topk_rows([41], seed=1))
    domain = {
        "targets": "distillkit",
        "train": str(tmp_path / "train.parquet"),
        "validation": str(tmp_path / "validation.parquet"),
    }
    store, _, done = importer(domain)
    targets = all_targets(store)
    np.testing.assert_array_equal(np.sort(targets.ids_BLK), np.sort(cut(rows, "topk_ids")))
    read = [decode(*encode(row["topk_logprobs"], row["topk_ids"], SMALL), SMALL)[0].astype(np.float64) for row in rows]
    decoded_BLK = cut([{**row, "decoded": values} for row, values in zip(rows, read, strict=True)], "decoded")
    sums_BL1 = np.maximum(np.exp(decoded_BLK).sum(axis=-1, keepdims=True), 1.0)
    wanted_BLK = np.sort(decoded_BLK - np.log(sums_BL1))[..., ::-1]
    np.testing.assert_allclose(targets.logprobs_BLK, wanted_BLK, atol=1e-5)
    np.testing.assert_array_equal(targets.true_logprobs_BL, cut(rows, "true_logprobs"))
    mass = np.exp(targets.logprobs_BLK.astype(np.float64)).sum(axis=-1) + targets.tail_mass_BL
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    assert read_manifest(store.targets_url).total("renormalised") == (sums_BL1 > 1).sum() > 0
    assert list(store.targets_inputs["teacher"]["compression"]) == ["train.parquet", "validation.parquet"]
    # The description of the bytes is an input as much as the bytes.
    (tmp_path / "compression_config.yaml").write_text(
        (tmp_path / "compression_config.yaml").read_text() + "# changed\n"
    )
    assert importer.plan(domain)["mine"].targets_url != store.targets_url
    assert done["retained_mass"] > 0.9


def test_a_configuration_elsewhere(importer: Importer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_distillkit(tmp_path / "train.parquet", topk_rows(TRAIN), SMALL)
    (tmp_path / "compression_config.yaml").rename(tmp_path / "other" / "mine.yaml")
    write_topk(tmp_path / "validation.parquet", topk_rows([41], seed=1))
    files = {"train": str(tmp_path / "train.parquet"), "validation": str(tmp_path / "validation.parquet")}
    with pytest.raises(
        UserError, match=r"train\.parquet, row 1: compressed columns, and there is no compression_config"
    ):
        importer({**files, "targets": "distillkit"})
    with pytest.raises(UserError, match=r"there is no .*nowhere\.yaml; correct compression_config"):
        importer({**files, "targets": "distillkit", "compression_config": str(tmp_path / "nowhere.yaml")})
    named = {**files, "targets": "distillkit", "compression_config": str(tmp_path / "other" / "mine.yaml")}
    assert importer(named)[2]["shards_written"] == 8


# What is refused


def test_validation_needs_every_true_token(importer: Importer, tmp_path: Path, domain: dict[str, Any]) -> None:
    write_topk(tmp_path / "validation.parquet", topk_rows([5, 41], seed=1, true_known=False))
    with pytest.raises(
        UserError,
        match=r"validation\.parquet, row 2, position 0: the true token is not among the entries, .* name validation "
        r"files with a column 'true_logprobs' for domain 'mine', or capture the domain \(targets: teacher\)",
    ):
        importer(domain)


def test_train_rows_may_leave_it_open(importer: Importer, tmp_path: Path, domain: dict[str, Any]) -> None:
    rows = topk_rows(TRAIN)
    for row in rows[4:]:
        row["true_logprobs"] = np.where(np.arange(len(row["true_logprobs"])) % 3 == 0, np.nan, row["true_logprobs"])
        row["topk_ids"] = (row["topk_ids"] + 1) % V  # the true token is no longer among them
    write_topk(tmp_path / "train-1.parquet", rows[4:])
    store, _, _ = importer(domain)
    np.testing.assert_array_equal(all_targets(store).true_logprobs_BL, cut(rows, "true_logprobs").astype(np.float32))


def test_the_compact_codec_keeps_what_is_open(importer: Importer, tmp_path: Path, domain: dict[str, Any]) -> None:
    rows = topk_rows(TRAIN, true_known=False)
    write_topk(tmp_path / "train-0.parquet", rows)
    (tmp_path / "train-1.parquet").unlink()
    store, _, done = importer(domain, codec={"name": "compact"})
    targets = all_targets(store)
    assert np.isnan(targets.true_logprobs_BL).mean() > 0.9
    assert np.isfinite(all_targets(store, "validation").true_logprobs_BL).all()
    assert np.isfinite(done["teacher_ppl"])
    mass = np.exp(targets.logprobs_BLK.astype(np.float64)).sum(axis=-1) + targets.tail_mass_BL
    np.testing.assert_allclose(mass, 1.0, atol=5e-3)
    assert (targets.ids_BLK[..., 0] == cut(rows, "topk_ids")[..., 0]).mean() > 0.9


def test_lists_that_are_aligned_otherwise_are_noticed(
    importer: Importer, tmp_path: Path, domain: dict[str, Any]
) -> None:
    rows = topk_rows([221, 221])
    for row in rows:
        for name in ("topk_ids", "topk_logprobs"):
            row[name] = np.concatenate([row[name][:1], row[name]])  # list i is for token i
        del row["true_logprobs"]
    write_topk(tmp_path / "train-1.parquet", rows)
    (tmp_path / "train-0.parquet").unlink()
    wanted = (
        r"domain 'mine', train shard 0: the true token is among the entries at 0% of the positions with shift 1, and "
        r"would be at 100% with shift 0; set domains\.mine\.shift: 0"
    )
    with pytest.raises(UserError, match=wanted):
        importer(domain, shard_blocks=64)
    # A file in which lists and labels agree in place; validation rows have to be of the same kind.
    write_topk(tmp_path / "validation.parquet", rows[:1])
    store, _, _ = importer({**domain, "shift": 0}, shard_blocks=64)
    np.testing.assert_array_equal(all_targets(store).ids_BLK, cut(topk_rows([221, 221]), "topk_ids"))


def test_a_bad_row_leaves_what_was_good(importer: Importer, tmp_path: Path, domain: dict[str, Any]) -> None:
    rows = topk_rows(TRAIN)
    rows[6]["topk_ids"][70, 3] = V
    write_topk(tmp_path / "train-1.parquet", rows[4:])
    with pytest.raises(
        UserError, match=r"train-1\.parquet, row 3, position 70: id 4090 is none of the tokenizer's 4090"
    ):
        importer(domain)
    manifest = next((tmp_path / "root" / "targets").glob("*/mine.zarr/manifest.json"))
    assert '"complete": false' in manifest.read_text()
    assert len(list(manifest.parent.glob("commits/train-*.json"))) == sum(BLOCKS[:6]) // 4


def test_rows_that_are_all_too_short(importer: Importer, tmp_path: Path, domain: dict[str, Any]) -> None:
    (tmp_path / "train-0.parquet").unlink()
    write_topk(tmp_path / "train-1.parquet", topk_rows([5, 10]))
    with pytest.raises(UserError, match=r"none of the 2 train rows has the 10 \+ 1 tokens of a block; lower packing"):
        importer(domain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"draws": 4}, "hold no draws; leave teacher.draws out"), ({"k": V + 1}, "teacher.k is 4091")],
)
def test_what_files_cannot_give(
    importer: Importer, domain: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        importer(domain, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shift": 0}, "shift applies only to files that hold predictions"),
        (
            {"compression_config": "a.yaml"},
            "compression_config needs targets: distillkit, but targets is 'teacher'",
        ),
        ({"targets": "parquet"}, "Input should be 'teacher', 'topk' or 'distillkit'"),
        ({"targets": "topk", "shift": 2}, "Input should be 0 or 1"),
    ],
)
def test_settings_without_their_use(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DomainConfig.model_validate({"train": "a.parquet", "validation": "b.parquet", **changes})
