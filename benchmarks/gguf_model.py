"""A GGUF file as an ordinary Hugging Face folder, and whether the two are the same model.

    python benchmarks/gguf_model.py MODEL.gguf FOLDER [--texts corpus.jsonl.gz …]

transformers reads the weights; the package `gguf`, which it needs for that, is looked for in `PYTHONPATH` and is no
dependency of the project. Two things are put right that transformers leaves wrong:

- the model counts as quantized, although its weights were written out in float32, and refuses to be saved;
- of the file's pre-tokenizer (`tokenizer.ggml.pre`) nothing is taken over: text is split as GPT-2 does it, where this
  tokenizer splits single digits off first. Two spaces before a digit become other tokens than in pre-training.

`check` compares the folder with the file by other code than made it: a forward pass written from the file's tensors as
they lie there (llama.cpp's order of rotary channels, and its names), and llama.cpp's rules of splitting and merging
written out in Python. llama.cpp itself is not run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.nn import functional

from flows.presets.quickstart.remake import read_corpus

TRICKY = (
    "x =  3,  and 12345 apples; 3.14\n\n\n\tdef f(x):\n        return  x  ** 2   # don't\r\n",
    "Ünïcödé ﬁ ½ ٣٤  ７ 你好，世界！  🙂👩‍👩‍👧\u200b\u00a0 end   ",
    "  leading, trailing  ",
    "<|im_start|>user\nHow many? 42<|im_end|>\n<|endoftext|>",
)
CHAT = [{"role": "user", "content": "How many legs have 3 dogs?"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHow many legs have 3 dogs?<|im_end|>\n<|im_start|>assistant\n"
)
MOST_DEVIATION = 1e-3
"""Of a logit between the two forward passes in float32."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class DifferentError(Exception):
    """The folder and the file are not the same model."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was compared, and how far apart it was."""

    parameters: int
    logits_compared: int
    largest_deviation: float
    """Of a logit."""
    texts: int
    tokens: int
    """In these texts; all are the same by llama.cpp's rules, and decode to the texts' own bytes."""
    split_otherwise: int
    """Texts of them that transformers' own conversion of the tokenizer gets wrong."""


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer as an ordinary folder: safetensors in float32, `tokenizer.json`.

    The folder appears whole, or not at all.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_model_name_or_path"):
        delattr(config, name)
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(part)
    tokenizer = as_transformers_reads(gguf)
    tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer(_Fields(gguf).pre)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(part)
    os.replace(part, folder)


def as_transformers_reads(gguf: Path) -> Any:
    """The tokenizer as transformers converts it, with the fault that the module's text names."""
    return transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _pre_tokenizer(name: str) -> Any:
    if name != "smollm":
        raise SystemExit(
            f"how the pre-tokenizer '{name}' splits text is not written down here; add it to _pre_tokenizer"
        )
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def check(gguf: Path, folder: Path, texts: Iterable[str] = ()) -> Checked:
    """Compare the folder with the file.

    Raises:
        DifferentError: they differ; what does is named.
    """
    fields = _Fields(gguf)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _check_special_tokens(fields, tokenizer)
    all_texts = [*TRICKY, *texts]
    tokens, otherwise = _check_texts(fields, tokenizer, all_texts, as_transformers_reads(gguf))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer.encode(RENDERED + "They have 12 legs.", add_special_tokens=False))
    with torch.no_grad():
        ours, theirs = model(ids[None]).logits[0], logits_of_file(gguf, ids)
    deviation = (ours - theirs).abs().max().item()
    if not deviation < MOST_DEVIATION or not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
        raise DifferentError(f"a logit of {folder} differs by {deviation:.3g} from what the tensors of {gguf} give")
    return Checked(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        logits_compared=ours.numel(),
        largest_deviation=deviation,
        texts=len(all_texts),
        tokens=tokens,
        split_otherwise=otherwise,
    )


def _check_special_tokens(fields: _Fields, tokenizer: Any) -> None:
    for name in ("bos", "eos", "pad", "unk"):
        given, expected = getattr(tokenizer, f"{name}_token_id"), fields.special[name]
        if given != expected:
            raise DifferentError(f"the tokenizer's {name} is {given}, and the file's {expected}")
    for index in fields.controls:
        if tokenizer.encode(fields.tokens[index], add_special_tokens=False) != [index]:
            raise DifferentError(f"'{fields.tokens[index]}' does not become the one token {index}")
    if len(tokenizer) != len(fields.tokens):
        raise DifferentError(f"the tokenizer has {len(tokenizer)} tokens, and the file {len(fields.tokens)}")
    if tokenizer.encode("one") != tokenizer.encode("one", add_special_tokens=False):
        raise DifferentError("the tokenizer adds tokens to a text, and the file says that none are added")
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    if rendered != RENDERED:
        raise DifferentError(f"the chat template gives {rendered!r}")


def _check_texts(fields: _Fields, tokenizer: Any, texts: Iterable[str], converted: Any) -> tuple[int, int]:
    count = otherwise = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != list(fields.encode(text)):
            raise DifferentError(f"the tokenizer splits {text[:60]!r} other than the file says")
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode() != text.encode():
            raise DifferentError(f"{text[:60]!r} does not come back from its tokens")
        count += len(ids)
        otherwise += converted.encode(text, add_special_tokens=False) != ids
    return count, otherwise


class _Fields:
    """A tokenizer as the file has it, and llama.cpp's rules for it."""

    def __init__(self, gguf: Path) -> None:
        reader = _reader(gguf)

        def field(name: str) -> Any:
            return reader.fields[f"tokenizer.ggml.{name}"].contents()

        self.pre: str = field("pre")
        self.tokens: list[str] = field("tokens")
        self.controls = [index for index, kind in enumerate(field("token_type")) if kind == 3]
        self.special = {
            name: field(f"{long}_token_id")
            for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        }
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(field("merges"))}
        self._letters = _byte_letters()
        controls = "|".join(regex.escape(self.tokens[index]) for index in self.controls)
        self._controls = regex.compile(f"({controls})")

    def encode(self, text: str) -> Iterator[int]:
        """Control tokens, then single digits, then GPT-2's pieces, each merged from its bytes."""
        for part in self._controls.split(text):
            if part in self._ids and self._controls.fullmatch(part):
                yield self._ids[part]
                continue
            for stretch in regex.split(r"(\p{N})", part):
                for piece in regex.findall(_GPT2, stretch):
                    yield from self._merged(piece)

    def _merged(self, piece: str) -> Iterator[int]:
        parts = [self._letters[byte] for byte in piece.encode()]
        while len(parts) > 1:
            rank, at = min((self._ranks.get(pair, math.inf), at) for at, pair in enumerate(pairwise(parts)))
            if rank == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return (self._ids[part] for part in parts)


def _byte_letters() -> list[str]:
    """The printable character by which GPT-2's vocabulary writes each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in plain else next(others)) for byte in range(0x100)]


def logits_of_file(gguf: Path, ids: Tensor) -> Tensor:
    """A forward pass of a llama from the file's tensors, as llama.cpp computes it, in float32.

    Args:
        ids: [T].

    Returns:
        [T, V].
    """
    import gguf as reading  # in PYTHONPATH

    reader = _reader(gguf)
    stored = {one.name: one for one in reader.tensors}

    def tensor(name: str) -> Tensor:
        one = stored[name]
        return torch.from_numpy(reading.quants.dequantize(one.data, one.tensor_type).copy()).float()

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, groups, epsilon = (
        field("attention.head_count"),
        field("attention.head_count_kv"),
        field("attention.layer_norm_rms_epsilon"),
    )
    embedding = tensor("token_embd.weight")
    hidden = embedding[ids]
    turn = _rotation(len(ids), field("rope.dimension_count"), field("rope.freq_base"))
    for layer in range(field("block_count")):
        of = f"blk.{layer}"
        normed = _norm(hidden, tensor(f"{of}.attn_norm.weight"), epsilon)
        q, k, v = (
            functional.linear(normed, tensor(f"{of}.attn_{name}.weight")).unflatten(-1, (count, -1)).transpose(0, 1)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = (
            torch.view_as_real(torch.view_as_complex(one.unflatten(-1, (-1, 2))) * turn).flatten(-2) for one in (q, k)
        )
        k, v = (one.repeat_interleave(heads // groups, 0) for one in (k, v))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        hidden = hidden + functional.linear(seen, tensor(f"{of}.attn_output.weight"))
        normed = _norm(hidden, tensor(f"{of}.ffn_norm.weight"), epsilon)
        gate, up = (functional.linear(normed, tensor(f"{of}.ffn_{name}.weight")) for name in ("gate", "up"))
        hidden = hidden + functional.linear(functional.silu(gate) * up, tensor(f"{of}.ffn_down.weight"))
    return functional.linear(_norm(hidden, tensor("output_norm.weight"), epsilon), embedding)


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotation(length: int, dimension: int, base: float) -> Tensor:
    """Complex [T, dimension / 2]; in the file's order two neighbouring channels are a pair."""
    frequencies = base ** (-torch.arange(0, dimension, 2, dtype=torch.float64) / dimension)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def _reader(gguf: Path) -> Any:
    import gguf as reading  # in PYTHONPATH

    return reading.GGUFReader(gguf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", nargs="*", default=[], help="corpora whose first texts are compared as well")
    parser.add_argument("--of-each", type=int, default=20, help="texts of each corpus")
    asked = parser.parse_args()
    if not asked.folder.exists():
        convert(asked.gguf, asked.folder)
    texts = [text for corpus in asked.texts for text in read_corpus(Path(corpus))[: asked.of_each]]
    found = {**asdict(check(asked.gguf, asked.folder, texts)), "tokenizers": tokenizers.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
