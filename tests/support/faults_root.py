"""A root with every kind of file that a fault can strike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from foreign_rows import topk_rows
from small_run import Ddk, write_config

from ddk.values import DomainGap, Mixture
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory, make_record
from storage.runs.reports import ComparisonFolder

DOMAINS = ("math", "code")


def make_root(folder: Path) -> tuple[Path, Path]:
    """A whole run on imported targets, without an engine; and a file of its corpus."""
    domains: dict[str, object] = {"zh_books": None}
    for seed, domain in enumerate(DOMAINS):
        for split, rows in (("train", 40), ("validation", 6)):
            columns = topk_rows([97] * rows, k=16, seed=2 * seed + (split == "train"))
            table = pa.table({name: [list(row[name]) for row in columns] for name in columns[0]})
            pq.write_table(table, folder / f"{domain}-{split}.parquet")
        files = {split: f"./{domain}-{split}.parquet" for split in ("train", "validation")}
        domains[domain] = {**files, "targets": "topk", "max_train_blocks": None, "max_validation_blocks": None}
    config = write_config(folder, domains=domains)
    done = Ddk(folder / "prefect").process("distill", config)
    if done.code != 0:
        raise RuntimeError(done.err)
    enrich(folder / "root")
    return folder / "root", folder / "math-train.parquet"


def enrich(root: Path) -> None:
    """What a single run lacks: a second run, an evaluation, a comparison. Two checkpoints can be exchanged already."""
    checkpoints = CheckpointFolder(RunFolder(str(root), "small").url)
    for step in checkpoints.steps()[:-2]:
        shutil.rmtree(checkpoints.url(step))
    other = RunFolder(str(root), "other")
    other.claim({"seed": 1}, {"run": "other", "seed": 1})
    gaps = [DomainGap(domain=domain, student_ppl=30.5, teacher_ppl=12.25) for domain in DOMAINS]
    MixtureHistory(other.url).append(
        make_record(
            version=0,
            step=0,
            tokens_seen=0,
            gaps=gaps,
            mixture=Mixture(probabilities=dict.fromkeys(DOMAINS, 0.5)),
            blocks_drawn=dict.fromkeys(DOMAINS, 0),
        )
    )
    evaluations = EvaluationFolder(str(root), "small")
    for role, value in (("student", 0.25), ("teacher", 0.75)):
        record = {"model": role, "task": "arc_easy", "metrics": {"acc,none": {"value": value, "stderr": 0.125}}}
        evaluations.write(role, "arc_easy-0a1b", record, [{"answer": f"{role} {number}"} for number in range(9)])
    for name, mean in (("first", 2.5), ("second", 2.75)):
        ComparisonFolder(str(root), name).write({"name": name, "mean": mean}, {"runs.csv": f"kd,{mean}\n".encode()})
