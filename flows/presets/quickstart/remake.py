"""Remake the quickstart's assets: its corpora, its tokenizer, its teacher and its student.

    python -m flows.presets.quickstart.remake CORPORA_DIR [--steps-teacher N] [--steps-student N]
        [--device auto|cpu|cuda] [--seed N] [--out DIR] [--stages corpora tokenizer teacher student measure]

CORPORA_DIR holds `<domain>/train.jsonl` and `<domain>/validation.jsonl`, `LICENSES/` and `SOURCES.md`. Without it the
corpora already in DIR are used as they are. DIR is this folder unless `--out` names another one. The stages, in order:

- `corpora`: the first records of each domain, up to a budget of bytes, compressed, with sources and licence texts
- `tokenizer`: a byte-level BPE of 4,090 tokens, trained on equally many bytes of each domain
- `teacher`: a Qwen2 model of 4.2 M parameters, its vocabulary padded to 4,160, trained on all domains alike
- `student`: one of 0.9 M, padded to 4,096, trained for a shorter time on a mixture that leaves it weak in some domains
- `measure`: both models' validation perplexities, in float32 from the stored bf16 weights, into `assets.json`

The same seed makes the same assets on the same machine. Padded rows of a vocabulary take no part in the loss, nor in
the perplexities: a model is trained as if its vocabulary were the tokenizer's.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
import zstandard
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
STAGES = ("corpora", "tokenizer", "teacher", "student", "measure")

SUFFIXES = {"math": "gz", "code": "zst", "books": "gz", "web": "gz", "zh_books": "gz"}
DOMAINS = tuple(SUFFIXES)
TRAIN_BYTES = 2_000_000
VALIDATION_BYTES = 90_000

EOS = "<|endoftext|>"
VOCAB_SIZE = 4_090
SEQ_LEN = 256
MAX_SHARD_SIZE = "4500KB"

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one model is and how it is trained."""

    name: str
    padded_vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    mixture: Mapping[str, float]
    steps: int
    learning_rate: float
    batch_size: int
    """Sequences of SEQ_LEN predictions in one step."""
    positions: int = SEQ_LEN
    """Longest input that its config declares."""
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    clip: float = 1.0

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.padded_vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )


TEACHER = Recipe(
    name="teacher",
    padded_vocab_size=4_160,
    hidden_size=256,
    intermediate_size=768,
    layers=4,
    heads=4,
    kv_heads=2,
    mixture=dict.fromkeys(DOMAINS, 0.2),
    steps=3_000,
    learning_rate=2e-3,
    batch_size=8,
    positions=1_024,  # so that other lengths can be tried: more than it was trained on
)
STUDENT = Recipe(
    name="student",
    padded_vocab_size=4_096,
    hidden_size=128,
    intermediate_size=384,
    layers=2,
    heads=2,
    kv_heads=1,
    mixture={"math": 0.04, "code": 0.15, "books": 0.40, "web": 0.40, "zh_books": 0.01},
    steps=700,
    learning_rate=5e-3,
    batch_size=16,
)


# Corpora


def make_corpora(source: Path, out: Path) -> None:
    """Copy the head of every domain, with the licences that it is under."""
    for domain in DOMAINS:
        for split, budget in (("train", TRAIN_BYTES), ("validation", VALIDATION_BYTES)):
            lines, text_bytes = head_of(source / domain / f"{split}.jsonl", budget)
            target = corpus_path(out, domain, split)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(compress("".join(lines).encode(), target.suffix))
            print(f"{target.relative_to(out)}: {len(lines)} documents, {text_bytes} bytes of text")
    write_sources(source, out)


def corpus_path(out: Path, domain: str, split: str) -> Path:
    return out / "corpora" / domain / f"{split}.jsonl.{SUFFIXES[domain]}"


def head_of(path: Path, budget: int) -> tuple[list[str], int]:
    """The first lines of a file whose texts fit in `budget` bytes, and how many bytes those texts are."""
    lines: list[str] = []
    total = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            size = len(json.loads(line)["text"].encode())
            if total + size > budget:
                break
            lines.append(line)
            total += size
    return lines, total


def compress(data: bytes, suffix: str) -> bytes:
    """Compress to bytes that depend on nothing but the data (and the library's version)."""
    if suffix == ".zst":
        return zstandard.ZstdCompressor(level=19).compress(data)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()


def read_corpus(path: Path) -> list[str]:
    data = path.read_bytes()
    raw = zstandard.ZstdDecompressor().decompress(data) if path.suffix == ".zst" else gzip.decompress(data)
    return [json.loads(line)["text"] for line in raw.decode().split("\n") if line]


def write_sources(source: Path, out: Path) -> None:
    """Write SOURCES.md from the rows that CORPORA_DIR's own SOURCES.md has on our domains; copy their licences."""
    text = (source / "SOURCES.md").read_text(encoding="utf-8")
    rows = [cells for cells in map(table_row, text.splitlines()) if len(cells) >= 5 and is_source(cells)]
    missing = set(DOMAINS) - {cells[0] for cells in rows}
    if missing:
        raise SystemExit(f"{source / 'SOURCES.md'} names no source for: {', '.join(sorted(missing))}")
    licences = out / "corpora" / "LICENSES"
    licences.mkdir(parents=True, exist_ok=True)
    lines = [SOURCES_HEAD]
    for domain, repository, commit, path, licence, *_ in rows:
        licence_name = f"{repository.replace('/', '+')}.txt"
        shipped = (source / "LICENSES" / licence_name).exists()
        if shipped:
            shutil.copyfile(source / "LICENSES" / licence_name, licences / licence_name)
        link = f"[text](LICENSES/{licence_name})" if shipped else "none needed"
        lines.append(f"| {domain} | {repository} | `{commit}` | {path} | {licence} | {link} |\n")
    novels = next(line for line in text.splitlines() if line.startswith("Novels used in `books`"))
    (out / "corpora" / "SOURCES.md").write_text("".join([*lines, SOURCES_TAIL, novels, "\n"]), encoding="utf-8")


def table_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


def is_source(cells: Sequence[str]) -> bool:
    return cells[0] in DOMAINS and "/" in cells[1]


SOURCES_HEAD = f"""# Where the quickstart's corpora come from

Made by `flows/presets/quickstart/remake.py` from a larger set: of every domain the first records, up to
{TRAIN_BYTES:,} bytes of text for training and {VALIDATION_BYTES:,} for validation. One `{{"text": ...}}` object a
line, UTF-8. That set decoded the files as UTF-8, dropped duplicates and near-duplicates, cut long files at function,
section or paragraph boundaries, and split train from validation at random by document.

| domain | repository | commit | path | licence of the text | licence text |
|---|---|---|---|---|---|
"""
SOURCES_TAIL = """
`books`: the novels appeared from 1838 to 1920 and are in the public domain in the US; as far as known all their authors
died before 1940. The repository that carries them states no licence.

`zh_books`: only the classical originals, which are in the public domain, were used.

"""


# Tokenizer


def make_tokenizer(out: Path) -> None:
    """Train the tokenizer on equally many bytes of each domain, and save it beside both models."""
    texts = {domain: read_corpus(corpus_path(out, domain, "train")) for domain in DOMAINS}
    budget = min(sum(len(text.encode()) for text in domain_texts) for domain_texts in texts.values())
    tokenizer = trained_tokenizer([text for domain_texts in texts.values() for text in take(domain_texts, budget)])
    for recipe in (TEACHER, STUDENT):
        save_tokenizer(tokenizer, out / recipe.name)
    check_tokenizer(tokenizer, out)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, from {budget} bytes of each domain")


def take(texts: Sequence[str], budget: int) -> list[str]:
    """The first texts, up to the one that fills `budget` bytes."""
    taken: list[str] = []
    for text in texts:
        if budget <= 0:
            break
        taken.append(text)
        budget -= len(text.encode())
    return taken


def trained_tokenizer(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """A BPE that splits text as Qwen2's: beside a Qwen2 model, transformers would split so whatever the file says."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the texts give {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: too little text")
    return tokenizer


def check_tokenizer(tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """The validation texts survive a round trip, and transformers reads the tokenizer as it was written."""
    loaded = AutoTokenizer.from_pretrained(str(out / TEACHER.name), local_files_only=True).backend_tokenizer
    for domain in DOMAINS:
        for text in read_corpus(corpus_path(out, domain, "validation")):
            ids = tokenizer.encode(text).ids
            if tokenizer.decode(ids) != text:
                raise SystemExit(f"the tokenizer changes a text of domain '{domain}': {text[:80]!r}")
            if loaded.encode(text).ids != ids:
                raise SystemExit(f"transformers splits a text of domain '{domain}' in another way: {text[:80]!r}")


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def tokens_of(out: Path, split: str) -> dict[str, Tokens]:
    """Every domain's documents as one row of tokens, an EOS after each document."""
    tokenizer = AutoTokenizer.from_pretrained(str(out / TEACHER.name), local_files_only=True)
    eos = tokenizer.eos_token_id
    result: dict[str, Tokens] = {}
    for domain in DOMAINS:
        encoded = tokenizer.backend_tokenizer.encode_batch(read_corpus(corpus_path(out, domain, split)))
        result[domain] = np.concatenate([np.asarray([*one.ids, eos], dtype=np.int64) for one in encoded])
    return result


# Training


def make_model(recipe: Recipe, out: Path, device: torch.device, seed: int, command: str) -> None:
    """Train one model and store it in bf16; keep the weights of the best of its evaluations."""
    started = time.monotonic()
    transformers.set_seed(seed)
    train, validation = tokens_of(out, "train"), tokens_of(out, "validation")
    model = Qwen2ForCausalLM(recipe.config()).to(device)
    best_step = fit(model, recipe, train, validation, rng=np.random.default_rng(seed), device=device)
    save_model(model, out / recipe.name)
    facts = {
        "command": command,
        "seed": seed,
        "recipe": asdict(recipe) | {"mixture": dict(recipe.mixture)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": recipe.steps,
        "best_step": best_step,
        "tokens_trained_on": recipe.steps * recipe.batch_size * SEQ_LEN,
        "train_tokens": {domain: len(tokens) for domain, tokens in train.items()},
        "seconds": round(time.monotonic() - started),
        "machine": machine(device),
    }
    update_assets(out, {recipe.name: facts})


def fit(
    model: Qwen2ForCausalLM,
    recipe: Recipe,
    train: Mapping[str, Tokens],
    validation: Mapping[str, Tokens],
    *,
    rng: np.random.Generator,
    device: torch.device,
    exact: bool = False,
) -> int:
    """Train; leave in `model` the weights with the lowest mean validation loss, and return their step.

    Args:
        exact: keep to float32, which is also ten times faster on a CPU that does not compute in bfloat16.
    """
    optimizer = make_optimizer(model, recipe)
    batches = batches_of(train, recipe, rng)
    best_loss, best_step, best_weights = math.inf, 0, weights_of(model)
    every = max(1, recipe.steps // 5)
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        loss = train_step(model, optimizer, next(batches).to(device), recipe.clip, exact=exact)
        if step % every == 0 or step == recipe.steps:
            losses = losses_of(model, validation, device, exact=exact)
            mean = sum(losses.values()) / len(losses)
            report_step(recipe.name, step, loss, losses)
            if mean < best_loss:
                best_loss, best_step, best_weights = mean, step, weights_of(model)
    model.load_state_dict(best_weights)
    return best_step


def make_optimizer(model: Qwen2ForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warmup = max(1, round(recipe.steps * recipe.warmup_fraction))
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def batches_of(train: Mapping[str, Tokens], recipe: Recipe, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Endless batches [batch_size, SEQ_LEN + 1], each row from a domain drawn by the mixture."""
    streams = {domain: windows(tokens, rng) for domain, tokens in train.items()}
    names = list(recipe.mixture)
    while True:
        drawn = rng.choice(len(names), size=recipe.batch_size, p=list(recipe.mixture.values()))
        yield torch.from_numpy(np.stack([next(streams[names[index]]) for index in drawn]))


def windows(tokens: Tokens, rng: np.random.Generator) -> Iterator[Tokens]:
    """Pass after pass over one domain: shuffled windows, cut at another offset in each pass."""
    while True:
        first = int(rng.integers(SEQ_LEN))
        for start in rng.permutation(np.arange(first, len(tokens) - SEQ_LEN, SEQ_LEN)):
            yield tokens[start : start + SEQ_LEN + 1]


def train_step(
    model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, blocks: torch.Tensor, clip: float, *, exact: bool
) -> torch.Tensor:
    model.train()
    with torch.autocast(blocks.device.type, torch.bfloat16, enabled=not exact):
        logits = real_logits(model, blocks[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def real_logits(model: Qwen2ForCausalLM, inputs: torch.Tensor) -> torch.Tensor:
    """Logits over the tokenizer's tokens: the padded rows of the vocabulary stay out of every normaliser."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return functional.linear(hidden, model.lm_head.weight[:VOCAB_SIZE])


def weights_of(model: Qwen2ForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def losses_of(
    model: Qwen2ForCausalLM, validation: Mapping[str, Tokens], device: torch.device, *, exact: bool = False
) -> dict[str, float]:
    """Mean cross-entropy per token of each domain, over blocks that do not overlap; `exact` keeps to float32."""
    model.eval()
    losses: dict[str, float] = {}
    for domain, tokens in validation.items():
        total = 0.0
        blocks = blocks_of(tokens)
        for rows in torch.split(blocks, 16):
            chunk = rows.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=not exact):
                logits = real_logits(model, chunk[:, :-1])
            flat = logits.flatten(0, 1).float()
            total += functional.cross_entropy(flat, chunk[:, 1:].flatten(), reduction="sum").item()
        losses[domain] = total / (len(blocks) * SEQ_LEN)
    return losses


def blocks_of(tokens: Tokens) -> torch.Tensor:
    count = len(tokens) // (SEQ_LEN + 1)
    return torch.from_numpy(tokens[: count * (SEQ_LEN + 1)].reshape(count, SEQ_LEN + 1))


def report_step(name: str, step: int, loss: torch.Tensor, losses: Mapping[str, float]) -> None:
    shown = "  ".join(f"{domain} {math.exp(value):.2f}" for domain, value in losses.items())
    print(f"{name} step {step}: train loss {loss.item():.3f}; validation perplexity {shown}", flush=True)


def save_model(model: Qwen2ForCausalLM, folder: Path) -> None:
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        old.unlink()
    model.to(torch.bfloat16).cpu().save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    for new in folder.glob("*.safetensors"):
        new.chmod(0o644)


# Measuring


def measure(out: Path, device: torch.device) -> None:
    """Perplexities of the two stored models, and their ratio, in every domain."""
    validation = tokens_of(out, "validation")
    teacher, student = (perplexities(out / recipe.name, validation, device) for recipe in (TEACHER, STUDENT))
    domains = {
        domain: {
            "validation_tokens": len(tokens),
            "teacher_ppl": round(teacher[domain], 4),
            "student_ppl": round(student[domain], 4),
            "ratio": round(student[domain] / teacher[domain], 4),
        }
        for domain, tokens in validation.items()
    }
    update_assets(out, {"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE, "domains": domains})
    print(json.dumps(domains, indent=2))


def perplexities(folder: Path, validation: Mapping[str, Tokens], device: torch.device) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).to(device)
    return {domain: math.exp(loss) for domain, loss in losses_of(model, validation, device, exact=True).items()}


def update_assets(out: Path, new: Mapping[str, Any]) -> None:
    path = out / "assets.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, old | dict(new))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{name}, {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"


# The command


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.presets.quickstart.remake", description="See the module.")
    parser.add_argument("corpora", nargs="?", type=Path, metavar="CORPORA_DIR", help="leave out to keep the corpora")
    parser.add_argument("--steps-teacher", type=int, default=TEACHER.steps)
    parser.add_argument("--steps-student", type=int, default=STUDENT.steps)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    args = arguments(argv)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    command = shlex.join(["python", "-m", "flows.presets.quickstart.remake", *argv])
    if "corpora" in args.stages and args.corpora is not None:
        make_corpora(args.corpora, args.out)
    if "tokenizer" in args.stages:
        make_tokenizer(args.out)
    for recipe, steps in ((TEACHER, args.steps_teacher), (STUDENT, args.steps_student)):
        if recipe.name in args.stages:
            chosen = Recipe(**(asdict(recipe) | {"steps": steps}))
            make_model(chosen, args.out, device, args.seed, command)
    if "measure" in args.stages:
        measure(args.out, device)


if __name__ == "__main__":
    main(sys.argv[1:])
