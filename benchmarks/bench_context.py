"""Does a student that is trained on blocks of 256 read 1,024 and 2,048? With `student.context` and without.

    make bench-context                                                    what is missing; an interrupted run goes on
    .venv/bin/python benchmarks/bench_context.py --corpora DIR --workers 1
    .venv/bin/python benchmarks/bench_context.py --report

On the quickstart's five domains, teacher and student: students trained on equally many tokens, three seeds, as usual
(*plain*), with `student.context: {target: 2048}` (*context*), and with other draws. Beside them the student as it was,
and position interpolation alone: positions divided by length/256, without any training for it.

Perplexity is measured on sequences of 2,048 tokens, cut into windows of 256, 512, 1,024 and 2,048 tokens that are read
apart, so that every length is measured on the same tokens; the geometric mean over domains. *Packed*: the quickstart's
validation documents, which are shorter and follow one another. *Whole*: with `--corpora DIR`, long documents of
`DIR/<domain>/validation.jsonl`, one a sequence. Every run is kept in `benchmarks/out/context/runs.json`; the bars are
of the student as it is saved, scale 8.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from harness import OUT, Row, publish, read_kept, row, write_kept
from in_process import train, with_fields
from mixture_settings import CHECKOUT
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ddk.context import stretched_config
from ddk.values import Int32Array
from flows.config import Config, load_config
from flows.presets.quickstart import remake
from tasks.comparing.spreads import paired_difference
from tasks.evaluation.long_texts import long_sequences
from tasks.packing.encoder import TextEncoder
from tasks.planning.store_plan import vocabulary
from tasks.planning.text_ends import TextEnds

PRESET = CHECKOUT / "flows" / "presets" / "quickstart.yaml"
ROOT = CHECKOUT / "build" / "bench-context"
KEPT = Path(OUT) / "context" / "runs.json"
TRAINED, TARGET, STEPS, BLOCKS = 256, 2048, 300, 1024
LENGTHS = (256, 512, 1024, 2048)
MEASURED: dict[int, tuple[int, ...]] = {1: LENGTHS, 2: (512,), 4: (256, 1024), 8: LENGTHS}
"""Lengths by the scale at which they are read."""
SEEDS = (0, 1, 2)
SEQUENCES, LEAST = 8, 8
LONG_DOMAINS = ("arxiv", "code", "qa")
"""Of `--corpora`, those with enough documents of 2,048 tokens."""
CONTEXT: dict[str, Any] = {"target": TARGET, "trained": TRAINED, "max_scale": 20, "offset_after": 4, "saved_share": 0.5}
CHANGES: dict[str, dict[str, Any]] = {
    "context": {},
    "saved_share 0": {"saved_share": 0.0},
    "saved_share 1": {"saved_share": 1.0},
    "saved_share 1 without offsets": {"saved_share": 1.0, "offset_after": TRAINED},
    "saved_share 0 and max_scale 8": {"saved_share": 0.0, "max_scale": TARGET // TRAINED},
    "saved_share 0 and cross-entropy": {"saved_share": 0.0, "distil": False},
}
"""Variants of the setting. Without `saved_share` the draws are those of the paper."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {"student.context": {**CONTEXT, **change}} for name, change in CHANGES.items()},
}
UNTOUCHED = "untouched"
Figures = dict[str, dict[str, float]]
"""Loss in nats by domain and, below it, `length@scale`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS), help="by default all")
    parser.add_argument("--corpora", type=Path, help="folder with <domain>/validation.jsonl of long documents")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once, with a thread each")
    parser.add_argument("--report", action="store_true", help="run nothing; judge what is there")
    asked = parser.parse_args()
    if not asked.report:
        prepare()
        jobs = [(UNTOUCHED, 0, 0), *((name, asked.steps, seed) for name in asked.variants for seed in asked.seeds)]
        run_missing(jobs, asked.corpora, asked.workers)
    return 0 if publish("context", "make bench-context", list(judged())) else 1


def configuration() -> Config:
    base = load_config(str(PRESET), (), str(ROOT / "root")).model_dump(mode="json")
    for section in base["domains"].values():
        section["max_train_blocks"] = BLOCKS
    return Config.model_validate({**base, "method": "ddk_equal"})


def prepare() -> None:
    """Blocks and targets; what is complete is left."""
    path, done = ROOT / "config.yaml", ROOT / "prepared"
    wanted = yaml.safe_dump(configuration().model_dump(mode="json"))
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(wanted, encoding="utf-8")
    for stage in ("pack", "cache"):
        subprocess.run([sys.executable, "-m", "flows", stage, str(path)], check=True)
    done.write_text(wanted, encoding="utf-8")


def name_of(variant: str, steps: int, seed: int) -> str:
    return variant if variant == UNTOUCHED else f"{variant}-{steps}-{seed}"


def run_missing(jobs: Sequence[tuple[str, int, int]], corpora: Path | None, workers: int) -> None:
    """A run that is there but was not measured on `corpora` is made again."""
    needed = {f"whole/{domain}" for domain in LONG_DOMAINS} if corpora is not None else set()
    done_before = read_kept(KEPT)
    todo = [job for job in jobs if not needed <= done_before.get(name_of(*job), {}).keys()]
    todo += [job for job in jobs if job not in todo and name_of(*job) not in done_before]
    print(f"{len(todo)} runs to do, {workers} at once", flush=True)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(measure, *job, corpora): job for job in todo}
        for number, done in enumerate(as_completed(waiting), start=1):
            name = name_of(*waiting[done])
            write_kept(KEPT, read_kept(KEPT) | {name: done.result()})
            print(f"{number} of {len(todo)}: {name}", flush=True)


def measure(variant: str, steps: int, seed: int, corpora: Path | None) -> Figures:
    """Train, and read every length at every scale."""
    torch.set_num_threads(1)
    config = configuration()
    if variant == UNTOUCHED:
        return losses(config.student.model, sequences(corpora))
    with tempfile.TemporaryDirectory() as folder:
        fields = {"train.steps": steps, "mixture.interval": steps, "seed": seed, **VARIANTS[variant]}
        train(with_fields(config, fields), export=folder)
        return losses(folder, sequences(corpora))


def sequences(corpora: Path | None) -> dict[str, Int32Array]:
    """[N, 2,049] tokens by `packed/<domain>` and `whole/<domain>`."""
    tokenizer = AutoTokenizer.from_pretrained(str(remake.HERE / "teacher"), local_files_only=True)
    encode = TextEncoder(tokenizer, control=False)
    ends = TextEnds(bos_ids=(), eos_id=int(tokenizer.eos_token_id), said="")
    found: dict[str, Int32Array] = {}
    for domain in remake.DOMAINS:
        texts = remake.read_corpus(remake.corpus_path(remake.HERE, domain, "validation"))
        packed = long_sequences(encode(texts), ends, TARGET, SEQUENCES)
        if packed is None:
            raise SystemExit(f"the validation documents of {domain} are too short")
        found[f"packed/{domain}"] = packed.tokens_NL1
    for domain in LONG_DOMAINS if corpora is not None else ():
        with open(corpora / domain / "validation.jsonl", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        long = long_sequences(encode(texts), ends, TARGET, SEQUENCES)
        if long is None or long.whole < LEAST:
            raise SystemExit(f"{corpora}/{domain} has too few documents of {TARGET} tokens")
        found[f"whole/{domain}"] = long.tokens_NL1[: long.whole]
    return found


@torch.no_grad()
def losses(folder: str, sequences: Mapping[str, Int32Array]) -> Figures:
    tokenizer = AutoTokenizer.from_pretrained(str(remake.HERE / "teacher"), local_files_only=True)
    vocab_size = vocabulary(tokenizer)[0]
    described = AutoConfig.from_pretrained(folder)
    described.rope_parameters = {"rope_type": "default", "rope_theta": described.rope_parameters["rope_theta"]}
    found: Figures = {name: {} for name in sequences}
    for scale, lengths in MEASURED.items():
        config = described if scale == 1 else stretched_config(described, scale, TARGET)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
        for name, tokens_NL1 in sequences.items():
            for length in lengths:
                each = []
                for tokens in torch.from_numpy(tokens_NL1.astype(np.int64)):
                    logits = model(tokens[:-1].view(-1, length), use_cache=False).logits[..., :vocab_size]
                    each.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:]).item())
                found[name][f"{length}@{scale}"] = float(np.mean(each))
    return found


def judged() -> Iterator[Row]:
    runs = read_kept(KEPT)
    if UNTOUCHED not in runs:
        return
    other = {int(name.rsplit("-", 2)[1]) for name in runs if name != UNTOUCHED} - {STEPS}
    for group in ("packed", "whole"):
        untouched = mean_losses(runs[UNTOUCHED], group)
        if not untouched:
            continue
        yield from perplexities(group, untouched, by_variant(runs, group, STEPS))
        yield from bars(group, by_variant(runs, group, STEPS))
        for steps in sorted(other):
            yield from bars(f"{group}, {steps} steps", by_variant(runs, group, steps))


def by_variant(runs: Mapping[str, Figures], group: str, steps: int) -> dict[str, dict[int, dict[str, float]]]:
    """Mean losses by seed, of each variant that was trained for so many steps and measured on the group."""
    return {
        variant: {
            seed: mean_losses(runs[name], group)
            for seed in SEEDS
            if (name := name_of(variant, steps, seed)) in runs and mean_losses(runs[name], group)
        }
        for variant in VARIANTS
    }


def perplexities(
    group: str, untouched: Mapping[str, float], by_seed: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> Iterator[Row]:
    for length in LENGTHS:
        at = f"{group}, {length}:"
        matched = f"{length}@{length // TRAINED}"
        yield row(f"{at} untouched", [math.exp(untouched[f"{length}@1"])], "")
        if length > TRAINED:
            yield row(f"{at} untouched, interpolated", [math.exp(untouched[matched])], "")
        for variant, seeds in by_seed.items():
            if not seeds:
                continue
            for said, key in {"": f"{length}@1", ", interpolated": matched, ", scale 8": f"{length}@8"}.items():
                if said == ", interpolated" and length == TRAINED:
                    continue
                yield row(f"{at} {variant}{said}", [math.exp(one[key]) for one in seeds.values()], "")


def bars(group: str, by_seed: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Iterator[Row]:
    """Of the saved students: 4 times the trained length against 1, and 1 against the plain student's."""
    plain = by_seed["plain"]
    for variant, seeds in by_seed.items():
        if not seeds:
            continue
        scale = 1 if variant == "plain" else 8
        far = {seed: one[f"1024@{scale}"] for seed, one in seeds.items()}
        near = {seed: one[f"256@{scale}"] for seed, one in seeds.items()}
        rise = [100 * math.expm1(far[seed] - near[seed]) for seed in seeds]
        yield row(f"{group}: {variant}, rise of the perplexity at 1,024 over 256", rise, "%")
        difference = paired_difference(far, near)
        if variant != "plain" and difference is not None and difference.high is not None:
            high = 100 * math.expm1(difference.high)
            yield row(f"{group}: {variant}, the rise's 95% interval ends at", [high], "%", 0.0)
        if variant == "plain" or not plain:
            continue
        for at in (8, 1):
            here = {seed: one[f"256@{at}"] for seed, one in seeds.items()}
            there = {seed: one["256@1"] for seed, one in plain.items()}
            lost = paired_difference(here, there)
            if lost is not None:
                name = f"{group}: {variant}, scale {at}, perplexity at 256 above plain's"
                yield row(name, [100 * math.expm1(lost.mean)], "%", 2.0 if at == 8 else None)
                if lost.high is not None:
                    yield row(f"{name}, interval ends at", [100 * math.expm1(lost.high)], "%")


def mean_losses(figures: Figures, group: str) -> dict[str, float]:
    """Over the group's domains, by `length@scale`; empty where it was not measured."""
    mine = [one for name, one in figures.items() if name.startswith(f"{group}/")]
    return {key: float(np.mean([one[key] for one in mine])) for key in mine[0]} if mine else {}


if __name__ == "__main__":
    raise SystemExit(main())
