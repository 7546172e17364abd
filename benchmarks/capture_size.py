"""Bytes a position and distortion of the compact codec, beside DistillKit's two documented configurations.

On the quickstart teacher's real distributions over the validation texts of its five domains, in float32 by a plain
transformers forward. DistillKit's byte format is `storage.exchange.distillkit`, which the tests hold against an
independent reader. Both are judged alike: KL(true ‖ stored) over the k captured tokens and one bucket for all others.
DistillKit stores no tail, so that its tail is what its k leave of 1; where they sum to more than 1, they are taken as
they are used, normalised, with a tail of 1e-4 (a smaller one would make its divergence larger still).
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterator

import numpy as np
import torch
import transformers
from harness import Row, row
from zstandard import ZstdDecompressor

from ddk.values import SampledTokens, SparseTargets
from storage.exchange import distillkit
from storage.stores.codec import CodecConfig, Distortion, TargetFormat, divergences, encode
from storage.stores.layout import array_specs, encode_shard
from tasks.teachers.engine_teacher import counted
from tasks.teachers.reduction import reduce_logits

ASSETS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "flows", "presets", "quickstart")
SEQ_LEN, BLOCKS = 512, 8
LEVELS = {"k50": 46, "k128": 390}
"""Grids at which both bars, of bytes and of distortion, can be held against; the default (254) lies between."""


def logits_by_domain() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, log-probabilities [BLOCKS, L, V] and true tokens [BLOCKS, L] of each domain."""
    folder = os.path.join(ASSETS, "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocab = max(tokenizer.get_vocab().values()) + 1
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for path in sorted(glob.glob(os.path.join(ASSETS, "corpora", "*", "validation.jsonl.*"))):
        ids: list[int] = []
        for text in texts(path):
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) > (SEQ_LEN + 1) * BLOCKS:
                break
        tokens = torch.tensor(ids[: (SEQ_LEN + 1) * BLOCKS]).view(BLOCKS, SEQ_LEN + 1)
        with torch.inference_mode():
            logprobs = model(tokens[:, :-1]).logits[..., :vocab].log_softmax(-1)
        yield os.path.basename(os.path.dirname(path)), logprobs, tokens[:, 1:]


def texts(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        raw = file.read()
    text = ZstdDecompressor().stream_reader(raw).read() if path.endswith("zst") else gzip.decompress(raw)
    for line in text.decode().splitlines():
        yield json.loads(line)["text"]


def captured(logprobs: torch.Tensor, true: torch.Tensor, k: int, draws: int = 0) -> SparseTargets:
    """What capture gives of these distributions."""
    rows, vocab = logprobs.shape[0] * logprobs.shape[1], logprobs.shape[2]
    uniforms = np.sort(np.random.default_rng(0).random((rows, draws)), axis=-1)
    out = reduce_logits(logprobs.reshape(rows, vocab).clone(), true.reshape(rows), k, (), torch.from_numpy(uniforms))
    shape = tuple(logprobs.shape[:2])
    arrays = {name: value.numpy().reshape(*shape, *value.shape[1:]) for name, value in out.items()}
    sampled: SampledTokens | None = counted(arrays["drawn"].astype(np.int32)) if draws else None
    return SparseTargets(
        ids_BLK=arrays["ids"].astype(np.int32),
        logprobs_BLK=arrays["logprobs"],
        tail_mass_BL=arrays["tail_mass"],
        true_logprobs_BL=arrays["true_logprobs"],
        entropy_BL=arrays["entropy"],
        sampled=sampled,
    )


def stored(targets: SparseTargets, levels: int, vocab: int) -> tuple[dict[str, int], Distortion]:
    """Bytes of each array's shard object, checksums and indices included, and the distortion."""
    draws = targets.sampled.ids_BLN.shape[2] if targets.sampled is not None else 0
    form = TargetFormat(codec=CodecConfig(levels=levels), entropy=True, draws=draws, temperatures=())
    arrays, lost = encode(targets, form, vocab)
    dims = {"seq_len": SEQ_LEN, "k": targets.ids_BLK.shape[2]}
    specs = array_specs("targets", dims, form)
    sizes = {spec.name: len(encode_shard(spec, arrays[spec.name], BLOCKS)) for spec in specs}
    return sizes, lost or Distortion.of(np.zeros(0))


def by_distillkit(targets: SparseTargets, name: str, vocab: int) -> tuple[int, Distortion]:
    k = targets.ids_BLK.shape[2]
    config = distillkit.documented(name, vocab)  # type: ignore[arg-type]
    compressed, packed = distillkit.encode(targets.logprobs_BLK.reshape(-1, k), targets.ids_BLK.reshape(-1, k), config)
    logprobs, ids = distillkit.decode(compressed, packed, config)
    mass = np.exp(logprobs.astype(np.float64)).sum(-1)
    tail = np.maximum(1 - mass, 1e-4)
    scale = np.log(mass + tail)
    shape = targets.ids_BLK.shape
    read = SparseTargets(
        ids_BLK=ids.reshape(shape),
        logprobs_BLK=(logprobs - scale[:, None]).astype(np.float32).reshape(shape),
        tail_mass_BL=(tail / np.exp(scale)).astype(np.float32).reshape(shape[:2]),
        true_logprobs_BL=targets.true_logprobs_BL,
    )
    return compressed.nbytes + packed.nbytes, Distortion.of(divergences(targets, read, vocab))


def rows() -> list[Row]:
    found: list[Row] = []
    positions = 0
    ours: dict[str, list[tuple[int, Distortion]]] = {"k50": [], "k128": [], "k64": [], "k32": []}
    theirs: dict[str, list[tuple[int, Distortion]]] = {"k50": [], "k128": []}
    draws = 0
    for _, logprobs, true in logits_by_domain():
        vocab = logprobs.shape[2]
        positions += true.numel()
        for name, parts in ours.items():
            targets = captured(logprobs, true, int(name[1:]))
            sizes, lost = stored(targets, LEVELS.get(name, 254), vocab)
            parts.append((sum(sizes.values()), lost))
            if name in theirs:
                theirs[name].append(by_distillkit(targets, name, vocab))
        sizes, _ = stored(captured(logprobs, true, 1, draws=50), 254, vocab)
        draws += sizes["drawn_id_deltas"] + sizes["drawn_counts"]
    for name, parts in ours.items():
        label = f"{name.replace('k', 'k = ')}, {LEVELS.get(name, 254)} levels"
        size, lost = sum(size for size, _ in parts) / positions, sum((d for _, d in parts[1:]), start=parts[0][1])
        found += [
            row(f"{label}: everything that is stored", [size], "bytes/position"),
            row(f"{label}: mean KL(true ‖ stored)", [lost.mean * 1e3], "millinat"),
            row(f"{label}: 99th percentile", [lost.percentile(99) * 1e3], "millinat"),
        ]
        if name in theirs:
            others, there = theirs[name], f"DistillKit, {name.replace('k', 'k = ')}"
            size_there = sum(size for size, _ in others) / positions
            lost_there = sum((d for _, d in others[1:]), start=others[0][1])
            found += [
                row(
                    f"{there}: ids and log-probabilities",
                    [size_there],
                    "bytes/position",
                ),
                row(
                    f"{there}: mean KL(true ‖ stored)",
                    [lost_there.mean * 1e3],
                    "millinat",
                ),
                row(f"{label}: bytes / DistillKit's", [size / size_there], "", 0.7),
                row(f"{label}: mean KL / DistillKit's", [lost.mean / lost_there.mean], "", 0.1),
            ]
    found.append(row("50 random draws", [draws / positions], "bytes/position", 36))
    return found


if __name__ == "__main__":
    for one in rows():
        print(f"{one.what:<60} {one.value:10.4f} {one.unit:<15} {one.bar or '':<8} {one.holds}")
