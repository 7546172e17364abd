"""The main path, end to end: packing, the real vLLM engine, training, gap, mixture, report, student."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from small_run import ASSETS, DOMAINS, Ddk, SmallRun, files_below, write_config

from ddk.methods.retain import retaining_mixture
from ddk.mixture import MixtureConfig, initial_mixture, update_mixture
from flows.config import load_config
from flows.stores.stage_states import plan_stages
from storage.blocks import open_blocks
from storage.checking.verify_runs import run_findings
from storage.corpus.documents import iter_documents
from storage.corpus.files import CorpusFile, Fields
from storage.files import uri
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from storage.targets import open_targets, teacher_perplexity
from tasks.planning.store_plan import plan_stores

SEQ_LEN, K, VOCAB = 96, 16, 4090
LEAVES = ("C & C++", "school/maths")


def test_the_output_says_what_came_out(small_run: SmallRun) -> None:
    assert "Traceback" not in small_run.output.err
    for words in (*DOMAINS, "report", "student", "next", str(small_run.run)):
        assert words in small_run.output.out
    assert list(small_run.root.rglob("claims")) == [], "nobody is at work any more"


def test_stores_hold_every_block_and_its_targets(small_run: SmallRun, teacher_folder: str) -> None:
    plan = plan_stores(*_sections(small_run.config))
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    for domain in DOMAINS:
        store = plan[domain]
        for split, count in (("train", 40), ("validation", 6)):
            blocks, targets = open_blocks(store.blocks_url, split), open_targets(store.targets_url, split)
            assert len(blocks) == len(targets) == count
            assert (targets.k, targets.vocab_size) == (K, VOCAB)
            tokens, stored = blocks.read(range(count)), targets.read(range(count))
            assert tokens.shape == (count, SEQ_LEN + 1)
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits[..., :VOCAB]
            truth = logits.double().log_softmax(-1)
            # What the grid allows: tokens of equal code may change places, and √p is off by half a step or so.
            kept = stored.logprobs > -np.inf
            ids = torch.from_numpy(stored.ids.astype(np.int64))
            least = truth.topk(K).values[..., -1:].numpy()
            at_ids = truth.gather(-1, ids).numpy()
            assert kept.mean() > 0.99
            assert (at_ids[kept] >= np.broadcast_to(least - 1e-4, at_ids.shape)[kept]).all(), "of the K most probable"
            root_q, root_p = np.exp(stored.logprobs / 2), np.where(kept, np.exp(at_ids / 2), 0.0)
            np.testing.assert_allclose(root_q, root_p, atol=1.5 / 254)
            np.testing.assert_allclose(stored.tail_mass, 1 - (root_p**2).sum(-1), atol=2e-3)
            entropy = -(truth.exp() * truth).sum(-1).numpy()
            np.testing.assert_allclose(stored.entropy, entropy, atol=5e-3)
            labels = torch.from_numpy(tokens[:, 1:].astype(np.int64))
            true = truth.gather(-1, labels[..., None])[..., 0].numpy()
            np.testing.assert_allclose(stored.true_logprobs, true, atol=1.2e-3)
        assert teacher_perplexity(store.targets_url) == pytest.approx(np.exp(-true.mean()), rel=1e-5)


def test_the_history_follows_equations_1_and_2(small_run: SmallRun) -> None:
    records = MixtureHistory(str(small_run.run)).records()
    assert [(record.version, record.step) for record in records] == [(0, 0), (1, 2), (2, 4), (3, 6)]
    ppl = [
        ({g.domain: g.student_ppl for g in record.gaps}, {g.domain: g.teacher_ppl for g in record.gaps})
        for record in records
    ]
    assert records[0].probabilities == pytest.approx(dict(initial_mixture(*ppl[0]).probabilities), abs=1e-12)
    for before, after, (student, teacher) in zip(records, records[1:], ppl[1:], strict=False):
        expected = update_mixture(before.mixture, student, teacher, 0.5).probabilities
        assert after.probabilities == pytest.approx(dict(expected), abs=1e-12)
        assert after.tokens_seen == after.step * 8 * SEQ_LEN == sum(after.blocks_drawn.values()) * SEQ_LEN


def test_the_student_learns(small_run: SmallRun) -> None:
    records = MixtureHistory(str(small_run.run)).records()
    losses = [row["ce"] for row in RunFolder(str(small_run.root), "small").metrics()]
    assert len(losses) == 6
    before, after = ({g.domain: g.ratio for g in record.gaps} for record in (records[0], records[-1]))
    worst = max(before, key=before.__getitem__)
    assert after[worst] < before[worst]


def test_the_report_is_there_and_agrees_with_the_history(small_run: SmallRun) -> None:
    report = small_run.run / "report"
    page = (report / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 2
    assert (report / "ratio.png").read_bytes().startswith(b"\x89PNG")
    with open(report / "gap.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = MixtureHistory(str(small_run.run)).records()
    assert len(rows) == len(records) * len(DOMAINS)
    stored = {(r.version, g.domain): g.student_ppl for r in records for g in r.gaps}
    for row in rows:
        assert float(row["student_ppl"]) == pytest.approx(stored[int(row["t"]), row["domain"]])
    assert json.loads((report / "report.json").read_text())["summary"]["steps"] == 6


def test_the_student_is_an_ordinary_folder_for_transformers(small_run: SmallRun) -> None:
    folder = str(small_run.run / "student")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def main():", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(inputs).logits.isfinite().all()
    card = (small_run.run / "student" / "README.md").read_text(encoding="utf-8")
    assert all(domain in card for domain in DOMAINS)
    # What is saved is what was measured: perplexity on a validation set, to bf16's rounding.
    record = MixtureHistory(str(small_run.run)).records()[-1]
    plan = plan_stores(*_sections(small_run.config))
    tokens = torch.from_numpy(open_blocks(plan["math"].blocks_url, "validation").read(range(6)).astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[..., :VOCAB]
    ppl = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp().item()
    measured = {gap.domain: gap.student_ppl for gap in record.gaps}
    assert ppl == pytest.approx(measured["math"], rel=0.01)


def test_a_second_call_does_nothing_but_save_a_damaged_student_again(
    small_run: SmallRun, ddk: Ddk, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(small_run.root, root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.zarr/**/*") if path.is_file()}
    student = files_below(small_run.run / "student")
    weights = root / "runs" / "small" / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    output = ddk("distill", small_run.config, "--root", str(root))
    assert output.code == 0, output.err
    assert "captured" not in output.err
    assert "cache math: complete already" in output.err
    assert "model.safetensors: its bytes are not those that were written" in output.err
    assert "the student is saved again from the last checkpoint" in output.err
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.zarr/**/*") if path.is_file()} == before
    assert files_below(root / "runs" / "small" / "student") == student


@pytest.mark.parametrize(("method", "reads"), [("cpt", False), ("ted", True)])
def test_other_methods_run_on_the_same_cache(small_run: SmallRun, ddk: Ddk, method: str, reads: bool) -> None:
    stores = files_below(small_run.root / "targets")
    few = ("--set", "ted.filter_steps=3", "--set", "ted.filter_batch_size=4")
    output = ddk("distill", small_run.config, "--set", f"method={method}", "--run", method, *few)
    assert output.code == 0, output.err
    assert files_below(small_run.root / "targets") == stores
    run = RunFolder(str(small_run.root), method)
    records = MixtureHistory(run.url).records()
    assert all(p == pytest.approx(1 / 3) for record in records for p in record.probabilities.values())
    assert all((row["kl"] > 0) == reads for row in run.metrics())
    # Equal sampling to within one block of each step's batch.
    drawn = records[-1].blocks_drawn
    assert max(drawn.values()) - min(drawn.values()) <= 6


def test_ddk_retain_knows_the_start_of_the_run_and_how_far_it_is(small_run: SmallRun, ddk: Ddk) -> None:
    levers = ("--set", "loss.gamma_of={math: 1.0}", "--set", "loss.gamma_until=4")
    output = ddk("distill", small_run.config, "--set", "method=ddk_retain", "--run", "retain", *levers)
    assert output.code == 0, output.err
    run = RunFolder(str(small_run.root), "retain")
    records = MixtureHistory(run.url).records()
    assert len(records) == 4
    for record in records:
        student, teacher = (
            {domain: getattr(both, who) for domain, both in record.perplexities.items()}
            for who in ("student", "teacher")
        )
        first = {domain: both.student for domain, both in records[0].perplexities.items()}
        config = MixtureConfig()
        expected = retaining_mixture(
            student,
            teacher,
            first,
            alpha=config.retain_alpha,
            temperature=config.retain_temperature,
            retention=config.retain_weight,
            tolerance=config.retain_tolerance,
            progress=record.step / 6,
        )
        assert record.probabilities == pytest.approx(dict(expected.probabilities), abs=1e-12)
    whole, other = (folder.identity() or {} for folder in (run, RunFolder(str(small_run.root), "small")))
    assert whole["mixture"]["retain_tolerance"] == MixtureConfig().retain_tolerance
    assert not [name for name in other["mixture"] if name.startswith("retain_")], "no other method has them"
    rows = run.metrics()
    assert [row["kl"] > 0 for row in rows] == [True] * 4 + [False] * 2
    usual = sum(row["ce"] + 0.2 * row["kl"] for row in rows[:4])
    assert sum(row["loss"] for row in rows[:4]) > usual, "the divergence counts five times as much in mathematics"
    assert [row["loss"] for row in rows[4:]] == pytest.approx([row["ce"] for row in rows[4:]])


def test_the_same_run_name_with_other_settings_is_refused(small_run: SmallRun, ddk: Ddk) -> None:
    output = ddk("train", small_run.config, "--set", "loss.gamma=0.5")
    assert output.code == 2
    assert "loss.gamma: 0.2 → 0.5" in output.err
    assert "Traceback" not in output.err


def test_single_stages_on_a_complete_run(small_run: SmallRun, ddk: Ddk, tmp_path: Path) -> None:
    history = files_below(small_run.run / "mixtures")
    gap = ddk("gap", small_run.config)
    assert gap.code == 0, gap.err
    assert "version 3 at step 6" in gap.out
    assert files_below(small_run.run / "mixtures") == history, "measured already: nothing may be appended"
    (small_run.run / "report" / "index.html").unlink()
    report = ddk("report", small_run.config)
    assert report.code == 0, report.err
    assert (small_run.run / "report" / "index.html").exists()
    plan = plan_stores(*_sections(small_run.config))
    store = ddk("inspect", plan["math"].targets_url)
    assert store.code == 0
    assert "train: 40 blocks, 3,840 positions, 5 shards" in store.out
    assert "small, method ddk, complete" in ddk("inspect", str(small_run.run)).out


def test_changing_one_domains_data_recomputes_that_domain_alone(small_run: SmallRun, tmp_path: Path) -> None:
    before = plan_stores(*_sections(small_run.config))
    changed = write_config(tmp_path, root=str(small_run.root))
    root, domains, packing, teacher = _sections(changed)
    domains = {**domains, "math": domains["math"].model_copy(update={"max_train_blocks": 39})}
    after = plan_stores(root, domains, packing, teacher)
    assert after["math"].targets_url != before["math"].targets_url
    assert [after[d].targets_url for d in ("code", "zh_books")] == [before[d].targets_url for d in ("code", "zh_books")]


def _sections(path: str) -> tuple:
    config = load_config(path)
    return config.root, config.domains, config.packing, config.teacher


def _filed_together(folder: Path, split: str) -> str:
    """One file with the records of two domains by turns, each with its path."""
    math_and_code = zip(_texts(f"math/{split}.jsonl.gz"), _texts(f"code/{split}.jsonl.zst"), strict=False)
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for pair in math_and_code:
            for text, topic in zip(pair, ("school/maths", "C & C++"), strict=True):
                file.write(json.dumps({"text": text, "topic": topic}) + "\n")
    return str(folder / f"{split}.jsonl")


def _texts(name: str) -> list[str]:
    place = ASSETS / "corpora" / name
    file = CorpusFile(url=str(place), name=place.name, size=place.stat().st_size)
    return [document.text for document in iter_documents(file, Fields())]


def test_everything_on_s3(ddk: Ddk, s3_server: str, small_run: SmallRun, tmp_path: Path) -> None:
    """The same stores as on a local disk, byte for byte; the run and its student beside them.

    Besides, two of the small run's domains lie in one file here, told apart by a field: their leaves hold what the
    domains of their own do. The mixture is kept above the leaves.
    """
    root = f"{s3_server}/distill"
    filed = {split: _filed_together(tmp_path, split) for split in ("train", "validation")}
    both = {**filed, "path_field": "topic", "max_train_blocks": 40, "max_validation_blocks": 6}
    config = write_config(
        tmp_path,
        root=root,
        domains={"code": None, "zh_books": None, "both": both},
        train={"steps": 2},
        mixture={"level": 1},
    )
    output = ddk("distill", config)
    assert output.code == 0, output.err
    plan = plan_stores(*_sections(config))
    same = {"math": "math", "both/school/maths": "math", "both/C & C++": "code"}
    assert set(plan.domains) == set(same)
    local_plan = plan_stores(*_sections(small_run.config))
    for domain, name in same.items():
        ours, theirs = plan[domain], local_plan[name]
        for remote, local in ((ours.blocks_url, theirs.blocks_url), (ours.targets_url, theirs.targets_url)):
            for path, content in files_below(Path(local)).items():
                if not path.endswith("manifest.json"):
                    assert uri.read_bytes(f"{remote}/{path}") == content, f"{domain} {path}"
    assert uri.read_bytes(f"{root}/runs/small/student/model.safetensors") is not None
    assert b"data:image/png" in (uri.read_bytes(f"{root}/runs/small/report/index.html") or b"")
    _follows_the_gap_of_the_whole(MixtureHistory(f"{root}/runs/small").records(), f"{root}/runs/small/report", config)
    again = ddk("distill", config)
    assert again.code == 0, again.err
    assert "train small: complete already" in again.err
    assert {one.of for one in plan_stages(load_config(config)) if one.state == "complete"} == {*same, "small"}


def _follows_the_gap_of_the_whole(records: list[MixtureRecord], report: str, config: str) -> None:
    """Eq. 1 over `math` and `both`, whose leaves have 6 validation blocks each and 40 to be drawn from."""
    first, last = records
    positions = dict.fromkeys(("both/C & C++", "both/school/maths", "math"), 6 * SEQ_LEN)
    assert first.positions == last.positions == positions
    ppl = {
        who: {
            "both": math.sqrt(math.prod(getattr(first.perplexities[f"both/{leaf}"], who) for leaf in LEAVES)),
            "math": getattr(first.perplexities["math"], who),
        }
        for who in ("student", "teacher")
    }
    expected = initial_mixture(ppl["student"], ppl["teacher"]).probabilities
    found = first.probabilities
    assert found["math"] == pytest.approx(expected["math"], rel=1e-9)
    assert [found[f"both/{leaf}"] for leaf in LEAVES] == pytest.approx([expected["both"] / 2] * 2, rel=1e-9)
    rows = list(csv.DictReader(io.StringIO((uri.read_bytes(f"{report}/rollup.csv") or b"").decode())))
    assert [(row["t"], row["domain"]) for row in rows] == [(t, d) for d in ("both", "both/school") for t in "01"]
    assert float(rows[0]["student_ppl"]) == pytest.approx(ppl["student"]["both"], rel=1e-9)
    summary = uri.read_json(f"{report}/report.json")["summary"]
    assert summary["domains"] == ["both/C & C++", "both/school/maths", "math"]


def test_it_stops_early_where_the_student_has_caught_up(small_run: SmallRun, ddk: Ddk) -> None:
    output = ddk("train", small_run.config, "--set", "mixture.stop_ratio=99", "--run", "early")
    assert output.code == 0, output.err
    summary = RunFolder(str(small_run.root), "early").summary()
    assert summary is not None
    assert summary["steps"] == 0
    assert summary["stopped_early"] == "every domain's ratio is at or below mixture.stop_ratio 99.0 at step 0"
    assert run_findings(str(small_run.root), "early", full=True) == []
