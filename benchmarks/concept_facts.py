"""What bench_concepts.py is made of: facts about numbers by concept, and two small models, of which one lacks some.

    arithmetic/addition        7 + 8 = 15        order/larger     7 max 8 = 8
    arithmetic/subtraction     8 - 7 = 1         order/smaller    7 min 8 = 7
    arithmetic/multiplication  7 * 8 = 56
    arithmetic/remainder       8 mod 7 = 1

Numbers run from 0 to 12. Every fifth fact of a concept is asked and never trained on. A question has up to four
choices, the others being numbers near the answer or in the question. A number is one token. A document is one fact,
whose question is a prompt: only the answer carries loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen2Config, Qwen2ForCausalLM

LARGEST = 12
HELD_OUT = 5
DOCUMENTS = 12_000
"""Of a concept, for training: each fact many times."""
SEQ_LEN = 64
EOS = "<end>"
SIGNS = {
    "addition": "+",
    "subtraction": "-",
    "multiplication": "*",
    "remainder": "mod",
    "larger": "max",
    "smaller": "min",
}
CONCEPTS = (
    *(f"arithmetic/{name}" for name in ("addition", "subtraction", "multiplication", "remainder")),
    *(f"order/{name}" for name in ("larger", "smaller")),
)
VOCABULARY = {
    word: number
    for number, word in enumerate([EOS, "=", *SIGNS.values(), *map(str, range(LARGEST * LARGEST + LARGEST + 2))])
}


@dataclass(frozen=True, slots=True)
class Fact:
    question: str
    answer: int
    others: tuple[int, ...]


def facts(concept: str) -> list[Fact]:
    """All of a concept, in the order of their numbers."""
    name = concept.rpartition("/")[2]
    found = []
    for a, b in product(range(LARGEST + 1), repeat=2):
        known = {
            "addition": (a + b, (a + b + 1, abs(a + b - 1), a + b + 2)),
            "subtraction": (a - b, (a - b + 1, a - b + 2, b)),
            "multiplication": (a * b, (a * b + a + 1, abs(a * b - b - 1), a * b + 1)),
            "remainder": (a % b if b else -1, ((a % b if b else 0) + 1, (a % b if b else 0) + 2, b)),
            "larger": (max(a, b) if a != b else -1, (min(a, b), max(a, b) + 1, a + b)),
            "smaller": (min(a, b) if a != b else -1, (max(a, b), min(a, b) + 1, a + b)),
        }
        answer, near = known[name]
        if answer >= 0:
            others = tuple(dict.fromkeys(other for other in near if other != answer))
            found.append(Fact(f"{a} {SIGNS[name]} {b} =", answer, others))
    return found


def divided(concept: str) -> tuple[list[Fact], list[Fact]]:
    """The facts that are trained on, and those that are asked."""
    every = facts(concept)
    order = np.random.default_rng(CONCEPTS.index(concept)).permutation(len(every))
    return [every[i] for n, i in enumerate(order) if n % HELD_OUT], [every[i] for i in order[::HELD_OUT]]


def write_texts(folder: Path) -> None:
    """`<concept>/train.jsonl` and `validation.jsonl`, and `questions/own_questions.jsonl`."""
    questions = []
    for concept in CONCEPTS:
        trained, asked = divided(concept)
        rng = np.random.default_rng([1, CONCEPTS.index(concept)])
        for split, count in (("train", DOCUMENTS), ("validation", DOCUMENTS // 10)):
            drawn = [trained[i] for i in rng.integers(len(trained), size=count)]
            rows = [{"question": fact.question, "answer": f" {fact.answer}"} for fact in drawn]
            _write(folder / concept / f"{split}.jsonl", rows)
        for fact in asked:
            choices = [fact.answer, *fact.others]
            rng.shuffle(choices)
            gold = choices.index(fact.answer)
            questions.append(
                {"query": fact.question, "choices": list(map(str, choices)), "gold": gold, "concept": concept}
            )
    _write(folder / "questions" / "own_questions.jsonl", questions)


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_model(
    folder: Path, mixture: Mapping[str, float], *, hidden: int, layers: int, steps: int, rate: float, batch: int = 32
) -> None:
    """Train one from nothing on answers alone, each row of a batch of one concept, and keep it with its tokenizer."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,  # of 32 each: vLLM's CPU attention takes no smaller ones
            num_key_value_heads=hidden // 32,
            max_position_embeddings=4 * SEQ_LEN,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    streams = {concept: _tokens(concept, rng) for concept in mixture}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.05, 1 - step / steps)
        drawn = rng.choice(list(mixture), size=batch, p=list(mixture.values()))
        tokens = torch.tensor([[next(streams[str(concept)]) for _ in range(SEQ_LEN + 1)] for concept in drawn])
        inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[(inputs != VOCABULARY["="]) & (labels != VOCABULARY[EOS])] = -100
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"{folder.name}: loss {loss.item():.3f} after {steps} steps", flush=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def _tokens(concept: str, rng: np.random.Generator) -> Iterator[int]:
    trained, _ = divided(concept)
    while True:
        fact = trained[int(rng.integers(len(trained)))]
        yield from (VOCABULARY[word] for word in f"{fact.question} {fact.answer} {EOS}".split())


def save_tokenizer(folder: Path) -> None:
    """A token for every number and sign."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token=EOS))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([EOS])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": EOS, "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
