"""Rows that others wrote, as predictions: every pair of columns, both alignments, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk.errors import UserError
from storage.corpus.files import CorpusFile, resolve_files
from storage.exchange.distillkit import CompressionConfig, documented, encode
from storage.exchange.foreign import RowFormat, compression_url, iter_predictions, iter_tokens, read_compression
from storage.exchange.predictions import Predictions
from storage.files import uri

V = 500


def corpus_file(path: Path) -> CorpusFile:
    return CorpusFile(url=str(path), name=path.name, size=path.stat().st_size)


def parquet(
    folder: Path, rows: list[dict[str, Any]], types: dict[str, Any] | None = None, **options: Any
) -> CorpusFile:
    names = list(rows[0])
    arrays = [pa.array([row[name] for row in rows], type=(types or {}).get(name)) for name in names]
    pq.write_table(pa.table(dict(zip(names, arrays, strict=True))), folder / "rows.parquet", **options)
    return corpus_file(folder / "rows.parquet")


def jsonl(folder: Path, rows: list[dict[str, Any]]) -> CorpusFile:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return corpus_file(folder / "rows.jsonl")


def sequence(length: int = 6, k: int = 4, seed: int = 0) -> tuple[list[int], list[list[int]], list[list[float]]]:
    """Tokens, and for every one but the last the ids and log-probabilities of what may come next."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, length).tolist()
    ids, values = [], []
    for j in range(length - 1):
        others = rng.choice(np.setdiff1d(np.arange(V), tokens), k - 1, replace=False).tolist()
        ids.append([tokens[j + 1], *others])
        masses = np.sort(rng.dirichlet(np.ones(k)) * 0.9)[::-1]
        values.append(np.log(masses).tolist())
    return tokens, ids, values


def read(file: CorpusFile, **changes: Any) -> Predictions:
    (found,) = list(iter_predictions(file, RowFormat(**({"vocab_size": V, "k": 4} | changes))))
    assert found[0] == 0
    return found[1]


PAIRS = [
    ("topk_ids", "topk_logprobs"),
    ("topk_indices", "topk_logprobs"),
    ("topk_ids", "topk_logits"),
    ("topk_indices", "topk_logits"),
    ("token_ids", "top_values"),
    ("target_token_ids", "target_logprobs"),
]


@pytest.mark.parametrize("write", [parquet, jsonl])
@pytest.mark.parametrize("names", PAIRS)
def test_every_pair_of_columns(tmp_path: Path, write: Any, names: tuple[str, str]) -> None:
    tokens, ids, values = sequence()
    found = read(write(tmp_path, [{"input_ids": tokens, names[0]: ids, names[1]: values}]))
    assert found.tokens_N.tolist() == tokens
    assert found.ids_PK.tolist() == ids
    np.testing.assert_allclose(found.logprobs_PK, values, rtol=1e-6)
    np.testing.assert_allclose(found.tail_mass_P, 0.1, atol=1e-6)
    np.testing.assert_allclose(found.true_logprobs_P, [row[0] for row in values], rtol=1e-6)
    assert found.hit_P.all()
    assert not found.hit_elsewhere_P.any()
    assert not found.renormalised_P.any()


@pytest.mark.parametrize(
    ("number", "index", "outer"),
    [
        (pa.float16(), pa.uint64(), pa.list_),
        (pa.float32(), pa.int32(), pa.large_list),
        (pa.float64(), pa.int64(), None),
    ],
)
def test_other_types_of_arrow(tmp_path: Path, number: Any, index: Any, outer: Any) -> None:
    tokens, ids, values = sequence()
    around = outer or (lambda kind: pa.list_(kind, -1))
    inner = outer or (lambda kind: pa.list_(kind, 4))
    values = np.array(values).astype(number.to_pandas_dtype())
    types = {"input_ids": around(index), "topk_ids": around(inner(index)), "topk_logprobs": around(inner(number))}
    row = {"input_ids": tokens, "topk_ids": ids, "topk_logprobs": [list(v) for v in values]}
    found = read(parquet(tmp_path, [row], types))
    assert found.ids_PK.tolist() == ids
    np.testing.assert_allclose(found.logprobs_PK, values, rtol=1e-3)


def test_files_and_their_configuration_may_lie_anywhere(tmp_path: Path, place: str) -> None:
    config = documented("k50", V)
    parquet(tmp_path, [compressed_row(config)[0]] * 3, BYTES)
    uri.put_file(str(tmp_path / "rows.parquet"), uri.join(place, "rows.parquet"))
    uri.write_bytes(uri.join(place, "compression_config.yaml"), yaml.safe_dump(config.model_dump(mode="json")).encode())
    (file,) = resolve_files([uri.join(place, "*.parquet")], "mine")
    found = read_compression(compression_url(file, None))
    assert found == config
    rows = list(iter_predictions(file, RowFormat(vocab_size=V, k=50, compression=found), start=1))
    assert [record for record, _ in rows] == [1, 2]


def test_many_rows_come_in_order_from_any_record_on(tmp_path: Path) -> None:
    rows = []
    for seed in range(50):
        tokens, ids, values = sequence(length=3 + seed % 5, seed=seed)
        rows.append({"input_ids": tokens, "topk_ids": ids, "topk_logprobs": values})
    for file in (parquet(tmp_path, rows, row_group_size=7), jsonl(tmp_path, rows)):
        for start in (0, 6, 7, 20, 49, 50):
            found = list(iter_predictions(file, RowFormat(vocab_size=V, k=4), start, min_tokens=5))
            wanted = [i for i in range(start, 50) if len(rows[i]["input_ids"]) >= 5]
            assert [record for record, _ in found] == wanted
            for record, row in found:
                assert row.ids_PK.tolist() == rows[record]["topk_ids"]
            assert [(i, t.tolist()) for i, t in iter_tokens(file, V, start)] == [
                (i, rows[i]["input_ids"]) for i in range(start, 50)
            ]


def test_compressed_json_and_blank_lines(tmp_path: Path) -> None:
    tokens, ids, values = sequence()
    line = json.dumps({"input_ids": tokens, "topk_ids": ids, "topk_logprobs": values})
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(f"\n{line}\n\n{line}\n".encode()))
    found = list(iter_predictions(corpus_file(tmp_path / "rows.jsonl.gz"), RowFormat(vocab_size=V, k=4)))
    assert [record for record, _ in found] == [1, 3]


def test_ragged_lists_are_filled_up_with_no_entry(tmp_path: Path) -> None:
    row = {
        "input_ids": [1, 2, 3, 4],
        "topk_ids": [[2], [], [4, 9, 8]],
        "topk_logprobs": [[-0.5], [], [-1.0, -2.0, -3.0]],
    }
    found = read(parquet(tmp_path, [row]), k=5)
    assert found.ids_PK.tolist() == [[2, 0, 0, 0, 0], [0] * 5, [4, 9, 8, 0, 0]]
    assert np.isneginf(found.logprobs_PK).sum(axis=1).tolist() == [4, 5, 2]
    np.testing.assert_allclose(found.tail_mass_P, [1 - np.exp(-0.5), 1, 1 - np.exp([-1, -2, -3]).sum()], rtol=1e-6)
    np.testing.assert_array_equal(found.true_logprobs_P, np.float32([-0.5, np.nan, -1.0]))


def test_fewer_entries_are_kept_and_the_rest_goes_to_the_tail(tmp_path: Path) -> None:
    tokens, ids, values = sequence(k=4)
    found = read(parquet(tmp_path, [{"input_ids": tokens, "topk_ids": ids, "topk_logprobs": values}]), k=2)
    assert found.ids_PK.tolist() == [row[:2] for row in ids]
    np.testing.assert_allclose(found.tail_mass_P, 1 - np.exp(np.array(values)[:, :2]).sum(axis=1), rtol=1e-6)


def test_entries_out_of_order_are_sorted_and_a_true_token_behind_k_is_known(tmp_path: Path) -> None:
    row = {"input_ids": [1, 7], "token_ids": [[7, 5, 6]], "top_values": [[-3.0, -0.7, -1.2]]}
    found = read(parquet(tmp_path, [row]), k=2)
    assert found.ids_PK.tolist() == [[5, 6]]
    np.testing.assert_allclose(found.true_logprobs_P, [-3.0])
    assert found.hit_P.all()


@pytest.mark.parametrize("last", [False, True])
def test_the_list_of_the_last_token_is_ignored(tmp_path: Path, last: bool) -> None:
    tokens, ids, values = sequence()
    extra = ([[V + 5]], [[3.0]]) if last else ([], [])
    row = {"input_ids": tokens, "token_ids": ids + extra[0], "top_values": values + extra[1]}
    assert read(parquet(tmp_path, [row])).ids_PK.tolist() == ids


def test_shift_0_is_the_same_cache_aligned_with_the_labels(tmp_path: Path) -> None:
    tokens, ids, values = sequence()
    row = {"input_ids": tokens, "target_token_ids": [[0], *ids], "target_logprobs": [[-9.0], *values]}
    found = read(parquet(tmp_path, [row]), shift=0)
    assert found.ids_PK.tolist() == ids
    assert found.hit_P.all()
    wrong = read(parquet(tmp_path, [row]), shift=1)
    assert not wrong.hit_P.any()
    assert wrong.hit_elsewhere_P[1:].all()


def test_axolotls_mask_takes_entries_and_positions_away(tmp_path: Path) -> None:
    tokens, ids, values = sequence(length=4, k=3)
    mask = [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    values[0][2], values[1][0] = float("nan"), 5.0  # what is masked may be anything
    row = {"input_ids": tokens, "target_token_ids": ids, "target_logprobs": values, "target_mask": mask}
    found = read(parquet(tmp_path, [row]), k=3)
    assert np.isneginf(found.logprobs_PK).tolist() == [[False, False, True], [True] * 3, [False] * 3]
    assert found.tail_mass_P[1] == 1.0
    flat = read(jsonl(tmp_path, [{**row, "target_mask": [0, 0, 1]}]), k=3)
    assert np.isneginf(flat.logprobs_PK).all(axis=1).tolist() == [True, True, False]


def test_our_own_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    row = {
        "input_ids": [1, 2, 3],
        "topk_ids": [[5, 6], [3, 9]],
        "topk_logprobs": [[-0.5, -1.5], [-0.25, -2.5]],
        "tail_mass": [1 - np.exp([-0.5, -1.5]).sum() + 4e-4, 1 - np.exp([-0.25, -2.5]).sum()],
        "true_logprobs": [-7.25, float("nan")],
    }
    found = read(parquet(tmp_path, [row]), k=2)
    np.testing.assert_array_equal(found.true_logprobs_P, np.float32([-7.25, -0.25]))
    np.testing.assert_array_equal(found.tail_mass_P, np.float32(row["tail_mass"]))
    np.testing.assert_array_equal(found.logprobs_PK, np.float32(row["topk_logprobs"]))


def test_little_too_much_mass_is_divided_out_and_counted(tmp_path: Path) -> None:
    values = np.log([[0.5, 0.505], [0.5, 0.5 + 2e-7]]).tolist()
    row = {"input_ids": [1, 2, 3], "topk_ids": [[5, 6], [3, 9]], "topk_logprobs": values}
    found = read(parquet(tmp_path, [row]), k=2)
    assert found.renormalised_P.tolist() == [True, False], "rounding is no excess"
    np.testing.assert_allclose(np.exp(found.logprobs_PK.astype(np.float64)).sum(axis=1), 1.0, rtol=1e-6)
    assert found.tail_mass_P.tolist() == [0.0, 0.0]
    assert found.ids_PK[0].tolist() == [6, 5]


# DistillKit's bytes.


def compressed_row(config: CompressionConfig, positions: int = 40, extra: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(0)
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(config.k) * 0.3, positions + extra) * 0.98 + 1e-9))[:, ::-1]
    ids = np.stack([rng.choice(config.d, config.k, replace=False) for _ in range(positions + extra)])
    parts = encode(logprobs.astype(np.float32), ids.astype(np.int32), config)
    tokens = [0, *ids[:positions, 3].tolist()]
    row = {"input_ids": tokens, "compressed_logprobs": parts[0].tolist(), "bytepacked_indices": parts[1].tolist()}
    return row, ids[:positions]


BYTES = {
    "input_ids": pa.list_(pa.uint64()),
    "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
    "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
}


@pytest.mark.parametrize("extra", [0, 1])
def test_distillkits_bytes(tmp_path: Path, extra: int) -> None:
    config = CompressionConfig(d=151_936, k=128, exact_k=32, polynomial_terms=(0, 1, 2), delta_encoding=True)
    row, ids = compressed_row(config, extra=extra)
    (tmp_path / "compression_config.yaml").write_text(
        "d: 151936\nk: 128\nexact_k: 32\nexact_dtype: float32\npolynomial_terms: [0, 1, 2]\nterm_dtype: float32\n"
        "residual_bins: []\ndelta_encoding: true\nerror_diffusion: false\nnormalize_t: false\n"
    )
    file = parquet(tmp_path, [row], BYTES)
    found_config = read_compression(compression_url(file, None))
    assert found_config == config
    found = read(file, vocab_size=151_936, k=128, compression=found_config)
    assert found.ids_PK[:, :4].tolist() == ids[:, :4].tolist()
    assert (np.sort(found.ids_PK) == np.sort(ids)).all()
    assert (np.diff(found.logprobs_PK, axis=1) <= 0).all(), "what the fit turns round is sorted again"
    mass = np.exp(found.logprobs_PK.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass + found.tail_mass_P, 1.0, atol=1e-5)
    assert found.hit_P.all()


def test_a_bad_fit_is_renormalised_however_bad(tmp_path: Path) -> None:
    config = documented("k50", V)
    row, _ = compressed_row(config)
    bytes_0 = np.array(row["compressed_logprobs"][0], dtype=np.uint8)
    bytes_0[2:6] = np.frombuffer(np.float32(300.0).tobytes(), np.uint8)  # the fit's constant
    row["compressed_logprobs"][0] = bytes_0.tolist()
    found = read(parquet(tmp_path, [row], BYTES), k=50, compression=config)
    assert found.renormalised_P[0]
    assert found.tail_mass_P[0] == 0.0
    assert np.exp(found.logprobs_PK[0].astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_compressed_columns_need_their_configuration(tmp_path: Path) -> None:
    row, _ = compressed_row(documented("k50", V))
    file = parquet(tmp_path, [row], BYTES)
    assert read_compression(compression_url(file, None)) is None
    with pytest.raises(UserError, match=r"rows.parquet, row 1: compressed columns, and there is no compression_config"):
        read(file)
    with pytest.raises(
        UserError, match=r"row 1, position 0: 'bytepacked_indices' has 57 bytes, .* gives 113; it is not"
    ):
        read(file, compression=documented("k50", 152_064))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("k: 5\n", "d: Field required"),
        ("d: 10\nk: 5\nexact_k: 9\n", "exact_k is 9, more than k"),
        ("d: [\n", "not valid YAML"),
        ("d: 10\nk: 5\nexact_k: 5\nwhat: 1\n", "what: Extra inputs are not permitted"),
        ("[]", "valid dictionary"),
        ("[" * 5000, "is nested too deeply"),
        ("k: " + "1" * 5000, "a number has 5,000 digits"),
        ("d: 2147483647\nk: 2147483647\nexact_k: 1\npolynomial_terms: [0]\n", "k: Input should be less than or equal"),
        ("d: 10\nk: 5\nexact_k: 1\npolynomial_terms: [1000000000]\n", "polynomial_terms.0"),
        ("d: 10\nk: 5\nexact_k: 5\n" + "#" * 70_000, "has more bytes than any"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "compression_config.yaml").write_text(content)
    with pytest.raises(UserError, match=f"compression_config.yaml.*{message}.*correct that file"):
        read_compression(str(tmp_path / "compression_config.yaml"))


# What is refused.

GOOD = {"input_ids": [1, 2, 3], "topk_ids": [[2, 5], [3, 9]], "topk_logprobs": [[-0.5, -1.5], [-0.25, -2.5]]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": [1, V, 3]}, "token 1: id 500 is none of the tokenizer's 500"),
        ({"input_ids": [1, -2, 3]}, "token 1: id -2 is none"),
        ({"input_ids": [1, 2.5, 3]}, "'input_ids' is not a list of whole numbers"),
        ({"input_ids": None}, "no 'input_ids'"),
        ({"topk_ids": [[2, 5], [3, V]]}, "position 1: id 500 is none of the tokenizer's 500; teacher.model must be"),
        ({"topk_ids": [[2, 5], [3, -1]]}, "position 1: id -1 is none"),
        ({"topk_ids": [[2, 5], [9, 9]]}, "position 1: id 9 is there twice"),
        ({"topk_ids": [[2], [3, 9]]}, "position 0: 1 ids and 2 log-probabilities"),
        ({"topk_ids": [[2.5, 5], [3, 9]]}, "'topk_ids' does not hold whole numbers"),
        ({"topk_ids": [[2, 5]]}, "'topk_ids' has 1 positions, and 'input_ids' 3 tokens; with shift 1 .* 2 or 3"),
        ({"topk_ids": [2, 5]}, "'topk_ids' is a list of numbers; it must hold one list for each position"),
        ({"topk_ids": [[2, 5], 3]}, "'topk_ids' holds lists and other things"),
        ({"topk_ids": "2, 5"}, "'topk_ids' is not a list of numbers"),
        ({"topk_ids": [[2, "5"], [3, 9]]}, "'topk_ids' holds \"5\", not a number"),
        ({"topk_ids": [[2, None], [3, 9]]}, "'topk_ids' holds null, not a number"),
        ({"topk_ids": [[2, 2**70], [3, 9]]}, "'topk_ids' holds a number beyond 64 bits"),
        ({"topk_logprobs": [[-0.5, float("nan")], [-1, -2]]}, "position 0: a log-probability is NaN or infinite"),
        ({"topk_logprobs": [[-0.5, -1], [float("inf"), -2]]}, "position 1: a log-probability is NaN or infinite"),
        ({"topk_logprobs": [[-0.5, -1.5], [12.25, 8]]}, "position 1: 12.25 is above 0, so no log-probability; logits"),
        (
            {"topk_logprobs": [[-0.1, -0.2], [-1, -2]]},
            "position 0: the entries' probabilities sum to 1.7236; they must",
        ),
        ({"tail_mass": [0.5, 0.1]}, "position 0: 'tail_mass' is 0.5 and .* sum to 0.8297; together they must be 1"),
        ({"tail_mass": [[0.5], [0.1]]}, "'tail_mass' holds lists; it must hold one number for each position"),
        ({"true_logprobs": [-0.5, 0.5]}, "position 1: 'true_logprobs' is 0.5, above 0"),
        (
            {"true_logprobs": [-6.0, -0.25]},
            "position 0: 'true_logprobs' is -6 .* entry -0.5; the columns are not aligned",
        ),
        ({"true_logprobs": [-6.0]}, "'true_logprobs' has 1 positions"),
        ({"topk_logprobs": None}, "no predictions; there must be one of these pairs of columns: bytepacked_indices, "),
    ],
)
def test_what_is_refused_is_named_with_its_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    row = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    file = jsonl(tmp_path, [GOOD, row])
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2[,:].*{message}"):
        list(iter_predictions(file, RowFormat(vocab_size=V, k=2)))


def test_logits_that_sum_to_a_little_more_are_no_log_probabilities(tmp_path: Path) -> None:
    values = np.log([[0.5, 0.505], [0.5, 0.5]]).tolist()
    row = {"input_ids": [1, 2, 3], "topk_ids": GOOD["topk_ids"], "topk_logits": values}
    with pytest.raises(UserError, match=r"position 0: the entries' probabilities sum to 1\.0050"):
        read(jsonl(tmp_path, [row]), k=2)


def test_positions_of_an_error_are_those_of_the_file(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2, 3], "topk_ids": [[1], [2], [3, 3]], "topk_logprobs": [[-1], [-1], [-1, -2]]}
    with pytest.raises(UserError, match="line 1, position 2: id 3 is there twice"):
        read(jsonl(tmp_path, [row]), shift=0)
    with pytest.raises(UserError, match=r"has 2 positions, and 'input_ids' 3 tokens; with shift 0 there must be 3"):
        read(jsonl(tmp_path, [{**row, "topk_ids": [[1], [2]]}]), shift=0)


def test_nulls_and_texts_of_parquet_are_refused(tmp_path: Path) -> None:
    for column, kind, message in (
        ([[2, 5], None], None, "'topk_ids' is null at index 1; fill or remove such rows"),
        ([[2, None], [3, 9]], None, "'topk_ids' is null at index 1"),
        ([["a", "b"], ["c", "d"]], None, "'topk_ids' holds string, not numbers"),
        (None, pa.list_(pa.list_(pa.int32())), r"'topk_ids' holds list<.*> \(null\), not a list of numbers"),
    ):
        file = parquet(tmp_path, [{**GOOD, "topk_ids": column}], {"topk_ids": kind})
        with pytest.raises(UserError, match=f"rows.parquet, row 1: {message}"):
            read(file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.txt", "text", "holds text; rows of a teacher's predictions are .parquet or .jsonl files"),
        ("a.parquet", "text", "is not a readable Parquet file"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("b.jsonl", "{\n", "line 1: broken JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            list(iter_tokens(corpus_file(tmp_path / name), V))
    gone = CorpusFile(url=str(tmp_path / "gone.jsonl"), name="gone.jsonl", size=1)
    with pytest.raises(UserError, match=r"gone\.jsonl is no longer there"):
        list(iter_tokens(gone, V))


def test_the_old_format_of_distillkit_is_named(tmp_path: Path) -> None:
    row = {"input_ids": [1, 2], "packed_indices": [[1]], "exact_values": [[1.0]], "coeffs": [[1.0]]}
    with pytest.raises(UserError, match=r"an older format of DistillKit \(packed_indices, .*\) is not read"):
        read(jsonl(tmp_path, [row]))


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_whatever_is_read_is_a_distribution(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    length, k = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens = rng.integers(0, 12, length).tolist()
    ids = [rng.permutation(12)[: rng.integers(0, 8)].tolist() for _ in tokens[1:]]
    values = [np.log(rng.dirichlet(np.ones(8))[: len(row)] * rng.uniform(0.2, 1.0)).tolist() for row in ids]
    file = jsonl(tmp_path_factory.mktemp("rows"), [{"input_ids": tokens, "topk_ids": ids, "topk_logprobs": values}])
    found = read(file, vocab_size=12, k=k)
    entry_PK = found.logprobs_PK > -np.inf
    assert (entry_PK[:, 1:] <= entry_PK[:, :-1]).all(), "no entry comes last"
    assert (found.logprobs_PK[:, 1:] <= found.logprobs_PK[:, :-1]).all()
    assert (found.ids_PK[~entry_PK] == 0).all()
    mass = np.exp(found.logprobs_PK.astype(np.float64)).sum(axis=1) + found.tail_mass_P
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)
    for j, (row, numbers) in enumerate(zip(ids, values, strict=True)):
        kept = sorted(zip(numbers, row, strict=True), reverse=True)[:k]
        assert found.ids_PK[j, : len(kept)].tolist() == [i for _, i in kept]
        true = dict(zip(row, numbers, strict=True)).get(tokens[j + 1])
        assert (
            found.true_logprobs_P[j] == pytest.approx(true, abs=1e-5)
            if true is not None
            else np.isnan(found.true_logprobs_P[j])
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input_ids": [1, 2], "input_ids": [3, 4]}', "line 2: field 'input_ids' comes twice, and one of them would"),
        (b'{"input_ids": [1, %s]}' % (b"9" * 5000), "line 2: 'input_ids' holds a number beyond 64 bits"),
        (b"[" * 100_000, "line 2: broken JSON (nested too deeply)"),
    ],
)
def test_a_line_that_json_reads_otherwise_than_it_was_meant(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"input_ids": [1, 2], "x": %s}\n%s\n' % (b"9" * 5000, line))
    rows = iter_tokens(CorpusFile(url=str(path), name=path.name, size=1), V)
    assert next(rows)[1].tolist() == [1, 2]
    with pytest.raises(UserError, match=re.escape(message)):
        next(rows)


def test_columns_of_predictions_that_come_twice_are_named(tmp_path: Path) -> None:
    ids = pa.array([[1, 2]])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([ids, ids], names=["input_ids", "input_ids"]), path)
    with pytest.raises(
        UserError, match=r"a\.parquet: several columns are called 'input_ids'; rename or remove all but"
    ):
        list(iter_tokens(CorpusFile(url=str(path), name=path.name, size=1), V))
