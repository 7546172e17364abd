"""Does difference sampling find noise, and does a student gain by it? Half of the blocks against all of them.

    make bench-selection                 what is missing; a run that was interrupted goes on
    .venv/bin/python benchmarks/bench_selection.py --seeds 0,1 --report

On the quickstart's five domains and models, twice: as they are (*clean*), and with three documents of ten replaced
(*noisy*): a third of these with their words shuffled, a third by boilerplate, a third by another language. Which blocks
are noise is known from the documents' tokens, so that what the selection leaves out can be judged: precision (how much
of it is noise) and recall (how much of the noise it is). Then equal steps on the kept half and on all blocks, with five
seeds, and the difference of the mean loss over the *clean* validation blocks, paired by seed, with its 95% interval.

Every run is kept in `benchmarks/out/selection/runs.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from harness import OUT, Row, publish, read_kept, row, write_kept
from in_process import train, with_fields
from mixture_settings import CHECKOUT
from transformers import AutoTokenizer

from flows.config import Config, load_config
from flows.presets.quickstart import remake
from flows.stages import plan_of
from storage.blocks import open_blocks
from storage.selections import open_selection
from tasks.comparing.spreads import paired_difference
from tasks.planning.selection_plan import plan_selections

PRESET = CHECKOUT / "flows" / "presets" / "quickstart.yaml"
ROOT = CHECKOUT / "build" / "bench-selection"
KEPT = Path(OUT) / "selection" / "runs.json"
NOISE, KEEP, STEPS, BLOCKS = 0.3, 0.5, 150, 768
SEEDS = (0, 1, 2, 3, 4)
CORPORA = ("clean", "noisy")
SHUFFLED, REPEATED, FOREIGN = "shuffled words", "boilerplate", "another language"
KINDS = (SHUFFLED, REPEATED, FOREIGN)
BOILERPLATE = (
    "All rights reserved. Click here to subscribe to our newsletter. Accept all cookies. Terms of service. Privacy. "
    "Share this page. Back to top. "
)


@dataclass(frozen=True, slots=True)
class Job:
    corpora: str
    kept: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.corpora}-{'half' if self.kept else 'all'}-{self.seed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, with a thread each")
    parser.add_argument("--report", action="store_true", help="run nothing; judge what is there")
    asked = parser.parse_args()
    if not asked.report:
        for corpora in CORPORA:
            prepare(corpora)
        write_kept(KEPT, read_kept(KEPT) | {"noise": noise_found()})
        run_missing([Job(c, k, s) for s in asked.seeds for c in CORPORA[::-1] for k in (True, False)], asked.workers)
    return 0 if publish("selection", "make bench-selection", list(judged())) else 1


def prepare(corpora: str) -> None:
    """Corpora, blocks, targets and selections; what is complete is left."""
    if corpora == "noisy":
        make_noisy()
    path = ROOT / f"{corpora}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = config_of(corpora, kept=True).model_dump(mode="json")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    for stage in ("pack", "cache", "select"):
        subprocess.run([sys.executable, "-m", "flows", stage, str(path)], check=True)


def config_of(corpora: str, *, kept: bool) -> Config:
    base = load_config(str(PRESET), (), str(ROOT / "root")).model_dump(mode="json")
    for domain, section in base["domains"].items():
        section["max_train_blocks"] = BLOCKS
        if corpora == "noisy":
            section["train"] = [str(noisy_path(domain))]
        if kept:
            section["select"] = {"by": "difference", "keep": KEEP}
    return Config.model_validate({**base, "method": "ddk_equal"})


def noisy_path(domain: str) -> Path:
    return ROOT / "noisy" / f"{domain}.jsonl"


def documents(domain: str) -> list[str]:
    return remake.read_corpus(remake.corpus_path(remake.HERE, domain, "train"))


def noisy_documents(domain: str) -> Iterator[tuple[str, str | None]]:
    """Each document, and what kind of noise it is; None where it is none. Noise has the length of what it replaces."""
    generator = np.random.default_rng(len(domain))
    foreign = "".join(documents("web" if domain == "zh_books" else "zh_books"))
    place = 0
    for text in documents(domain):
        if generator.random() >= NOISE:
            yield text, None
            continue
        kind = int(generator.integers(3))
        if kind == 0:
            words = list(text) if domain == "zh_books" else text.split(" ")
            generator.shuffle(words)
            yield ("" if domain == "zh_books" else " ").join(words), SHUFFLED
        elif kind == 1:
            yield (BOILERPLATE * (len(text) // len(BOILERPLATE) + 1))[: len(text)], REPEATED
        else:
            place = place if place + len(text) < len(foreign) else 0
            yield foreign[place : place + len(text)], FOREIGN
            place += len(text)


def make_noisy() -> None:
    for domain in remake.DOMAINS:
        path = noisy_path(domain)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            lines = (json.dumps({"text": text}, ensure_ascii=False) for text, _ in noisy_documents(domain))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def noise_found() -> dict[str, dict[str, float]]:
    """Precision and recall of what each selection of the noisy corpora leaves out, and the recall by kind of noise; a
    block is noise, or of a kind, by its majority."""
    config = config_of("noisy", kept=True)
    plan = plan_of(config)
    selections = plan_selections(config.root, plan, config.student)
    tokenizer = AutoTokenizer.from_pretrained(str(remake.HERE / "teacher"), local_files_only=True)
    found: dict[str, dict[str, float]] = {}
    for domain, selection in selections.items():
        blocks = open_blocks(plan[domain].blocks_url)
        kinds = _kinds_of_blocks(domain, tokenizer, blocks.read(np.arange(len(blocks))))
        noise = kinds != ""
        left_out = np.ones(len(blocks), dtype=bool)
        left_out[open_selection(selection.selection_url).read()[0]] = False
        found[domain] = {
            "share": float(noise.mean()),
            "precision": float(noise[left_out].mean()),
            "recall": float(left_out[noise].mean()),
            **{f"recall of {kind}": float(left_out[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()},
        }
    return found


def _kinds_of_blocks(domain: str, tokenizer: Any, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.str_]:
    """The kind of noise that more than half of a block's noisy tokens are; '' where no more than half of all are."""
    stream: list[int] = []
    marks: list[str] = []
    wanted = tokens.shape[0] * tokens.shape[1] + 1
    for text, kind in noisy_documents(domain):
        ids = [*tokenizer.backend_tokenizer.encode(text).ids, tokenizer.eos_token_id]
        stream += ids
        marks += [kind or ""] * len(ids)
        if len(stream) >= wanted:
            break
    length = tokens.shape[1] - 1
    for overlap in (0, 1):  # whether a block begins with the last token of the one before
        starts = np.arange(len(tokens)) * (length + 1 - overlap)
        if all(stream[start : start + length + 1] == list(block) for start, block in zip(starts, tokens, strict=True)):
            return np.array([_kind_of(marks[start : start + length + 1]) for start in starts])
    raise SystemExit(f"the blocks of {domain} are not those of its documents")


def _kind_of(marks: Sequence[str]) -> str:
    counts = {kind: marks.count(kind) for kind in KINDS}
    return max(counts, key=lambda kind: counts[kind]) if sum(counts.values()) > len(marks) / 2 else ""


def run_missing(jobs: Sequence[Job], workers: int) -> None:
    todo = [job for job in jobs if job.name not in kept_runs()]
    print(f"{len(todo)} runs to do, {workers} at once", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(measure, job): job for job in todo}
        for number, done in enumerate(as_completed(waiting), start=1):
            write_kept(KEPT, read_kept(KEPT) | {"runs": kept_runs() | {waiting[done].name: done.result()}})
            print(f"{number} of {len(todo)}: {waiting[done].name}", flush=True)


def measure(job: Job) -> dict[str, float]:
    """Losses at the end, by domain."""
    fields = {"train.steps": STEPS, "train.warmup_steps": 15, "mixture.interval": STEPS, "seed": job.seed}
    last = train(with_fields(config_of(job.corpora, kept=job.kept), fields))[-1]
    return {gap.domain: math.log(gap.student_ppl) for gap in last.gaps}


def judged() -> Iterator[Row]:
    kept = read_kept(KEPT)
    noise: Mapping[str, Mapping[str, float]] = kept.get("noise", {})
    for figure, said, bar in (
        ("share", "share of noise among blocks", None),
        ("precision", "share of noise in what the selection leaves out", None),
        ("recall", "share of the noise that it leaves out", 90.0),
        *((f"recall of {kind}", f"share of {kind} that it leaves out", None) for kind in KINDS),
    ):
        values = [100 * one[figure] for one in noise.values() if figure in one]
        if values:
            yield row(f"noisy: {said}, median of domains", values, "%", bar, ">")
    runs = kept_runs()
    for corpora in CORPORA:
        seeds = [s for s in SEEDS if all(Job(corpora, k, s).name in runs for k in (True, False))]
        if not seeds:
            continue
        half, whole = (
            {seed: float(np.mean(list(runs[Job(corpora, k, seed).name].values()))) for seed in seeds}
            for k in (True, False)
        )
        difference = paired_difference(half, whole)
        yield row(f"{corpora}: mean loss on the half less on all", [half[s] - whole[s] for s in seeds], "nats")
        if difference is not None and difference.high is not None:
            bar = 0.0 if corpora == "noisy" else None
            yield row(f"{corpora}: upper end of the difference's 95% interval", [difference.high], "nats", bar)


def kept_runs() -> dict[str, dict[str, float]]:
    return dict(read_kept(KEPT).get("runs", {}))


if __name__ == "__main__":
    raise SystemExit(main())
