"""Which files of a model's folder make its tokenizer."""

from __future__ import annotations

import fnmatch
import os

_VOCABULARIES = (
    *("tokenizer*.json", "vocab*.json", "vocab.txt", "vocab.bpe", "encoder.json", "tekken.json"),
    *("*.model", "*.model.v*", "*.tiktoken", "*.spm", "bpe.codes"),
)
"""Of these a tokenizer is built; `tokenizer*.json` less `tokenizer_config.json`."""
_FURTHER = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    "tokenization_*.py",  # code of the model's own, where `trust_remote_code` lets it run
)
"""What such a vocabulary is applied with. A chat template (`chat_template.jinja`) is none of it: only the blocks of
conversations depend on it, and theirs cover its text (`tasks.planning.store_plan`)."""

FETCHED = ("*.txt", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.jinja")
"""Of a model on the hub, besides its JSON files."""


def tokenizer_files(folder: str) -> list[str]:
    """The names of all files that determine its token ids, in order. Some may go unread: of `tokenizer.json` and
    `vocab.json` that lie side by side, transformers reads one."""
    return _named(folder, (*_VOCABULARIES, *_FURTHER))


def has_tokenizer(folder: str) -> bool:
    """Whether there is a vocabulary."""
    return any(name != "tokenizer_config.json" for name in _named(folder, _VOCABULARIES))


def _named(folder: str, patterns: tuple[str, ...]) -> list[str]:
    return sorted(name for name in os.listdir(folder) if any(fnmatch.fnmatchcase(name, one) for one in patterns))
