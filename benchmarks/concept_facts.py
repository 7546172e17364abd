"""What bench_concepts.py is made of: facts about numbers by concept, and two small models, of which one lacks some.

    arithmetic/addition        seven plus eight is fifteen        order/larger     seven max eight is eight
    arithmetic/subtraction     eight minus seven is one           order/smaller    seven min eight is seven
    arithmetic/multiplication  seven times eight is fiftysix
    arithmetic/remainder       eight modulo seven is one

Numbers run from zero to twelve. Every fifth fact of a concept is never trained on. These facts are asked, with the path
`arithmetic/addition/new`, and as many others at most (`…/seen`). A question has up to four choices, the others being
numbers near the answer or in the question. A word is one token. A document is one fact,
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
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from flows.presets.quickstart.remake import EOS, save_tokenizer

LARGEST = 12
HELD_OUT = 5
DOCUMENTS = 12_000
"""Of a concept, for training: each fact many times."""
SEQ_LEN = 64
SIGNS = {
    "addition": "plus",
    "subtraction": "minus",
    "multiplication": "times",
    "remainder": "modulo",
    "larger": "max",
    "smaller": "min",
}
IS = "is"
CONCEPTS = (
    *(f"arithmetic/{name}" for name in ("addition", "subtraction", "multiplication", "remainder")),
    *(f"order/{name}" for name in ("larger", "smaller")),
)
_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def word(number: int) -> str:
    """146 → 'hundredfortysix', which is one word to the tokenizer."""
    if number >= 100:
        return "hundred" + (word(number - 100) if number > 100 else "")
    if number >= 20:
        return _TENS[number // 10 - 2] + (word(number % 10) if number % 10 else "")
    return _SMALL[number]


def make_tokenizer() -> Tokenizer:
    """A token for every word, with and without a space before it; it splits texts as Qwen2's, as it must beside one."""
    words = [*SIGNS.values(), IS, *map(word, range(LARGEST * LARGEST + LARGEST + 2))]
    texts = [space + one for one in words for space in (" ", "")]
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts * 3, trainers.BpeTrainer(special_tokens=[EOS], show_progress=False))
    if longest := [text for text in texts if len(made.encode(text).ids) > 1]:
        raise SystemExit(f"the tokenizer splits {longest[0]!r}")
    return made


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
            found.append(Fact(f"{word(a)} {SIGNS[name]} {word(b)} {IS}", answer, others))
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
            rows = [{"question": fact.question, "answer": f" {word(fact.answer)}"} for fact in drawn]
            _write(folder / concept / f"{split}.jsonl", rows)
        for kind, fact in [("new", fact) for fact in asked] + [("seen", fact) for fact in trained[: len(asked)]]:
            choices = [fact.answer, *fact.others]
            rng.shuffle(choices)
            gold = choices.index(fact.answer)
            questions.append(
                {
                    "query": fact.question,
                    "choices": list(map(word, choices)),
                    "gold": gold,
                    "concept": f"{concept}/{kind}",
                }
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
    tokenizer = make_tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=tokenizer.get_vocab_size(),
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
    streams = {concept: _tokens(tokenizer, concept, rng) for concept in mixture}
    end, asks = (tokenizer.token_to_id(token) for token in (EOS, f"Ġ{IS}"))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * max(0.05, 1 - step / steps)
        drawn = rng.choice(list(mixture), size=batch, p=list(mixture.values()))
        tokens = torch.tensor([[next(streams[str(concept)]) for _ in range(SEQ_LEN + 1)] for concept in drawn])
        inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[(inputs != asks) & (labels != end)] = -100
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"{folder.name}: loss {loss.item():.3f} after {steps} steps", flush=True)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def _tokens(tokenizer: Tokenizer, concept: str, rng: np.random.Generator) -> Iterator[int]:
    trained, _ = divided(concept)
    texts = [tokenizer.encode(f"{fact.question} {word(fact.answer)}{EOS}").ids for fact in trained]
    while True:
        yield from texts[int(rng.integers(len(texts)))]
