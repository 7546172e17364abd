"""Whole training steps of the quickstart's student, from stores: what targets cost, what is waited for, what it holds.

The stores hold the quickstart teacher's real targets (k = 32) for its five domains' validation texts, copied until
there are enough blocks; training is the quickstart's (batches of 16 blocks of 256, micro-batches of 4).

As a script it is one training in a process of its own, of which the peak memory is asked:
`training_step.py FOLDER DOMAINS INTERVALS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
from capture_scale import FORM, READ_K, real_targets
from capture_size import ASSETS
from harness import Row, row
from training_loss import memory_kib

from ddk.data import TrainData
from ddk.mixture import equal_mixture
from ddk.student import load_student
from ddk.train_config import LossConfig, StudentConfig, TrainConfig
from ddk.trainer import StepReport, Trainer
from ddk.values import SparseTargets
from storage.blocks import open_blocks
from storage.stores.manifest import StoreWriter
from storage.targets import TargetWriter, open_targets

SEQ_LEN, BATCH, MICRO, SHARD, STEPS = 256, 16, 4, 64, 30  # the last: of an interval, as the quickstart has
PAPER = {"domains": 10, "samples": 500, "interval": 1000, "tokens": 15e9, "steps": 30_000, "seq_len": 2048}


def write_stores(root: str, domains: int, blocks: int) -> int:
    """`<root>/<domain>.{blocks,targets}.zarr`, so many blocks each; returns V."""
    targets, tokens, vocab = real_targets()
    names = ("ids_BLK", "logprobs_BLK", "tail_mass_BL", "true_logprobs_BL", "entropy_BL")
    cut = {name: getattr(targets, name)[:, :SEQ_LEN] for name in names}
    tokens = tokens[:, : SEQ_LEN + 1]
    dims = {"seq_len": SEQ_LEN, "vocab_size": vocab, "shard_blocks": SHARD}
    for domain in range(domains):
        order = np.resize(np.random.default_rng(domain).permutation(len(tokens)), blocks)
        of_blocks = StoreWriter(f"{root}/{domain}.blocks.zarr", "blocks", {}, dims)
        of_targets = TargetWriter(f"{root}/{domain}.targets.zarr", {}, {**dims, "k": READ_K}, FORM)
        for split, rows in (("train", order), ("validation", order[:SHARD])):
            for shard, start in enumerate(range(0, len(rows), SHARD)):
                chosen = rows[start : start + SHARD]
                of_blocks.write_shard(split, shard, {"tokens": tokens[chosen]})
                of_targets.write_shard(
                    split, shard, SparseTargets(**{name: array[chosen] for name, array in cut.items()})
                )
        of_blocks.finish()
        of_targets.finish()
    return vocab


def make_trainer(root: str, domains: int, gamma: float) -> Trainer:
    names = [str(domain) for domain in range(domains)]
    blocks = {name: open_blocks(f"{root}/{name}.blocks.zarr") for name in names}
    vocab = blocks["0"].vocab_size
    return Trainer(
        load_student(StudentConfig(model=os.path.join(ASSETS, "student")), vocab),
        TrainData(
            blocks=blocks,
            targets={name: open_targets(f"{root}/{name}.targets.zarr") for name in names} if gamma else None,
        ),
        config=TrainConfig(
            steps=10**6,
            batch_size=BATCH,
            micro_batch_size=MICRO,
            learning_rate=1e-4,
            min_learning_rate=1e-5,
            warmup_steps=10,
        ),
        loss=LossConfig(gamma=gamma),
        vocab_size=vocab,
        seed=0,
    )


def interval(trainer: Trainer, steps: int) -> list[StepReport]:
    reports: list[StepReport] = []
    trainer.train_interval(equal_mixture(sorted(trainer.data.sizes)), 0, steps, reports.append)
    return reports


def waiting(reports: Sequence[StepReport]) -> float:
    return sum(one.waited_seconds for one in reports) / sum(one.seconds for one in reports)


def rows(rounds: int, s3_url: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as folder:
        write_stores(folder, 5, 512)
        write_stores(s3_url, 5, 512)
        distilled, plain = make_trainer(folder, 5, 0.2), make_trainer(folder, 5, 0.0)
        remote = make_trainer(s3_url, 5, 0.2)
        with_targets, without, waited, waited_s3, forward = [], [], [], [], []
        for turn in range(rounds + 1):
            reports = interval(distilled, STEPS)
            bare = interval(plain, STEPS)
            afar = interval(remote, STEPS)
            started = time.perf_counter()
            distilled.perplexity(open_blocks(f"{folder}/0.blocks.zarr", "validation"))
            if turn:
                with_targets.append(median(one.seconds for one in reports))
                without.append(median(one.seconds for one in bare))
                waited.append(waiting(reports))
                waited_s3.append(waiting(afar))
                forward.append((time.perf_counter() - started) / SHARD)
    base = median(without)
    step_of_a_block = median(with_targets) / BATCH
    blocks_a_step = PAPER["tokens"] / PAPER["steps"] / PAPER["seq_len"]
    evaluated = PAPER["domains"] * PAPER["samples"]
    trained = PAPER["interval"] * blocks_a_step
    return [
        row("training step without a teacher (γ = 0)", without, "s"),
        row("training step with targets / without", [one / base for one in with_targets], "x", 1.08),
        row("share of time waiting for data, disk", [100 * one for one in waited], "%", 2),
        row("share of time waiting for data, S3", [100 * one for one in waited_s3], "%", 2),
        row("gap evaluation: forward / training step, a block", [one / step_of_a_block for one in forward], "x"),
        row(
            "gap evaluation's share at the paper's K and sizes",
            [100 * evaluated * one / (trained * step_of_a_block) for one in forward],
            "%",
            1,
        ),
    ]


def memory_rows() -> list[Row]:
    """Peak memory of a training in a process of its own, of eight times as much of each, beside once."""
    found = {}
    cases = {"once": (1, 512, 2), "8 x blocks": (1, 4096, 2), "8 domains": (8, 512, 2), "8 x intervals": (1, 512, 16)}
    for name, (domains, blocks, intervals) in cases.items():
        with tempfile.TemporaryDirectory(prefix="ddk-bench-") as folder:
            write_stores(folder, domains, blocks)
            command = [sys.executable, __file__, folder, str(domains), str(intervals)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            found[name] = float(done.stdout) / 1024
    once = found.pop("once")
    return [
        row("peak memory of a training", [once], "MiB"),
        *(row(f"peak memory: {name} / once", [peak / once], "x", 1.03) for name, peak in found.items()),
    ]


if __name__ == "__main__":
    training = make_trainer(sys.argv[1], int(sys.argv[2]), 0.2)
    for _ in range(int(sys.argv[3])):
        interval(training, 10)
    print(memory_kib("VmHWM"))
