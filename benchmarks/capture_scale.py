"""How reading, rerunning and growing go: `rows(assets)` for each.

reading   random blocks, decoded, on one core, from a disk and from a moto S3 server of its own process, beside the
          quickstart student's training on the same machine
rerun     `cache_targets` over a complete store of 10,000 shards
growth    capture of 1, 2, 4 and 8 times as many blocks: time a block and memory of both processes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import psutil
import torch
from capture_size import ASSETS, captured, logits_by_domain
from capture_speed import SEQ_LEN, make_model, make_plan
from harness import Row, row

from ddk.data import TrainData
from ddk.student import load_student
from ddk.train_config import LossConfig, StudentConfig, TrainConfig
from ddk.trainer import Trainer
from ddk.values import Mixture, SparseTargets
from storage.stores.codec import CodecConfig, TargetFormat
from storage.stores.manifest import write_manifest
from storage.stores.schema import Manifest, ObjectRecord, ShardRecord, SplitManifest
from storage.targets import TargetWriter, open_targets
from tasks.capture.cache_targets import cache_targets
from tasks.teachers.config import TeacherConfig
from tasks.teachers.engine_teacher import VllmTeacher

FORM = TargetFormat(codec=CodecConfig(), entropy=True, draws=0, temperatures=())
READ_K, READ_SHARD, COPIES = 32, 64, 24


class Repeated:
    """Some blocks, repeated: a train split in memory."""

    def __init__(self, targets: SparseTargets, tokens: np.ndarray, vocab: int) -> None:
        self.k, self.vocab_size, self._targets, self._tokens = targets.ids_BLK.shape[2], vocab, targets, tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, indices: Any) -> Any:
        return self._tokens[np.asarray(indices)]


class RepeatedTargets(Repeated):
    def read(self, indices: Any) -> SparseTargets:
        chosen = np.asarray(indices)
        names = ("ids_BLK", "logprobs_BLK", "tail_mass_BL", "true_logprobs_BL", "entropy_BL")
        return SparseTargets(**{name: getattr(self._targets, name)[chosen] for name in names})


def real_targets() -> tuple[SparseTargets, np.ndarray, int]:
    """The quickstart teacher's on all five domains, with the tokens [N, L + 1] and V."""
    parts, tokens, vocab = [], [], 0
    for _, logprobs, true in logits_by_domain():
        parts.append(captured(logprobs, true, READ_K))
        tokens.append(np.pad(true.numpy().astype(np.int32), ((0, 0), (1, 0))))
        vocab = logprobs.shape[2]
    names = ("ids_BLK", "logprobs_BLK", "tail_mass_BL", "true_logprobs_BL", "entropy_BL")
    return (
        SparseTargets(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}),
        np.concatenate(tokens),
        vocab,
    )


def write_store(url: str, targets: SparseTargets, vocab: int) -> None:
    dims = {"seq_len": targets.ids_BLK.shape[1], "vocab_size": vocab, "shard_blocks": READ_SHARD, "k": READ_K}
    source = RepeatedTargets(targets, np.zeros(len(targets)), vocab)
    writer = TargetWriter(url, {}, dims, FORM)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(targets)), COPIES))
    for shard in range(len(order) // READ_SHARD):
        writer.write_shard("train", shard, source.read(order[shard * READ_SHARD : (shard + 1) * READ_SHARD]))
    writer.write_shard("validation", 0, source.read(order[:READ_SHARD]))
    writer.finish()


def training_speed(targets: SparseTargets, tokens: np.ndarray, vocab: int, rounds: int) -> list[float]:
    """Tokens a second of the quickstart's student with the quickstart's batch, data in memory."""
    data = TrainData(
        blocks={"all": Repeated(targets, tokens, vocab)}, targets={"all": RepeatedTargets(targets, tokens, vocab)}
    )
    trainer = Trainer(
        load_student(StudentConfig(model=os.path.join(ASSETS, "student")), vocab),
        data,
        config=TrainConfig(steps=1000, batch_size=16, micro_batch_size=16, learning_rate=1e-4, min_learning_rate=1e-5),
        loss=LossConfig(),
        vocab_size=vocab,
        seed=0,
    )
    found = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        trainer.train_interval(Mixture(probabilities={"all": 1.0}), 0, 5)
        found.append(5 * 16 * tokens.shape[1] / (time.perf_counter() - started))
    return found[1:]


def read_speed(url: str, rounds: int) -> list[float]:
    """Tokens a second of random batches of 16 blocks, in a process of its own on one core."""
    code = f"""
import json, os, sys, time
os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])
import numpy as np
from storage.targets import open_targets
view = open_targets({url!r})
rng = np.random.default_rng(0)
found = []
for _ in range({rounds} + 1):
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < 1.0:
        tokens += view.read(rng.choice(len(view), 16)).true_logprobs.size
    found.append(tokens / (time.perf_counter() - started))
print(json.dumps(found[1:]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    return json.loads(done.stdout)


def reading_rows(rounds: int, s3_url: str) -> list[Row]:
    targets, tokens, vocab = real_targets()
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as folder:
        write_store(f"{folder}/a.zarr", targets, vocab)
        write_store(f"{s3_url}/a.zarr", targets, vocab)
        trained = training_speed(targets, tokens, vocab, rounds)
        local, remote = read_speed(f"{folder}/a.zarr", rounds), read_speed(f"{s3_url}/a.zarr", rounds)
    speed = float(np.median(trained))
    return [
        row("quickstart student's training", trained, "tokens/s"),
        row("random blocks, disk", local, "tokens/s"),
        row("random blocks, disk / training", [one / speed for one in local], "x", 20, ">"),
        row("random blocks, S3 / training", [one / speed for one in remote], "x", 20, ">"),
    ]


def rerun_rows(rounds: int) -> list[Row]:
    """The manifest is real in every field, ten thousand records long; no shard is read, so none is written."""
    config = TeacherConfig(model="none", k=64, shard_blocks=64)
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as folder:
        plan = make_plan(folder, config, np.zeros((1, SEQ_LEN + 1), np.int32), 4096)
        store = plan["bench"]
        record = ObjectRecord(bytes=4_123_456, sha256="0" * 64)
        lost = {"count": 2048, "total": 0.25, "largest": 0.01, "histogram": {str(-i): 40 for i in range(50)}}
        facts = {"tail_mass_sum": 3.2, "true_logprob_sum": -81234.5, "distortion": lost}
        shard = ShardRecord(blocks=64, objects=dict.fromkeys(("scalars", "id_deltas", "codes"), record), facts=facts)
        writer = TargetWriter(store.targets_url, store.targets_inputs, store.targets_dims, store.targets_form)
        splits = {
            "train": SplitManifest(blocks=64 * 9_900, shards=(shard,) * 9_900),
            "validation": SplitManifest(blocks=6400, shards=(shard,) * 100),
        }
        whole: Manifest = writer.manifest.model_copy(update={"complete": True, "splits": splits})
        write_manifest(store.targets_url, whole)
        seconds, opened = [], []
        for _ in range(rounds):
            started = time.perf_counter()
            done = cache_targets.fn(plan, "bench", None)  # type: ignore[arg-type]
            seconds.append(time.perf_counter() - started)
            if not done["done_before"]:
                raise SystemExit("the store was not taken for complete")
            started = time.perf_counter()
            open_targets(store.targets_url)
            opened.append(time.perf_counter() - started)
    return [
        row("rerun over a complete store of 10,000 shards", seconds, "s", 3),
        row("opening it", opened, "s"),
    ]


def growth_rows() -> list[Row]:
    """Blocks in shards of 16, on the 4M shape; the engine is warm."""
    times: dict[int, list[float]] = {}
    memory: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="ddk-bench-") as folder:
        make_model(f"{folder}/model", "4M")
        config = TeacherConfig(model=f"{folder}/model", k=64, dtype="float32", shard_blocks=16)
        tokens = np.random.default_rng(0).integers(0, 4096, (1024, SEQ_LEN + 1)).astype(np.int32)
        with VllmTeacher(config, seq_len=SEQ_LEN, vocab_size=4096) as teacher:
            teacher.capture(tokens[:16])
            for _ in range(3):
                for blocks in (128, 256, 512, 1024):
                    place = tempfile.mkdtemp(dir=folder)
                    plan = make_plan(place, config, tokens[:blocks], 4096)
                    started = time.perf_counter()
                    cache_targets.fn(plan, "bench", teacher)
                    times.setdefault(blocks, []).append((time.perf_counter() - started) / blocks)
                    memory[blocks] = tree_memory()
    base = float(np.median(times[128]))
    return [
        *(
            row(f"time a block, {blocks} blocks / 128", [one / base for one in times[blocks]], "", 1.05)
            for blocks in (256, 512, 1024)
        ),
        row("memory of all processes, 1024 blocks / 128", [memory[1024] / memory[128]], "", 1.05),
    ]


def tree_memory() -> float:
    """Of this process and all below it, in bytes."""
    here = psutil.Process()
    return float(sum(one.memory_full_info().pss for one in [here, *here.children(recursive=True)]))


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for one in [*rerun_rows(3), *growth_rows()]:
        print(f"{one.what:<60} {one.value:10.4f} {one.unit:<15} {one.bar or '':<8} {one.holds}")
