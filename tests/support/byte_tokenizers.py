"""Tokenizers of every convention, made here: byte by byte, with what others put around a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

END = "<|endoftext|>"


def byte_tokenizer(
    folder: Path,
    *,
    added: Sequence[str | AddedToken] = (),
    before: Sequence[str] = (),
    after: Sequence[str] = (),
    shift: int = 0,
    as_json: bool = True,
    **config: Any,
) -> str:
    """Id 0 is the end of text, the bytes follow (turned round by `shift`), then what is added.

    Args:
        before, after: tokens that it puts around every text.
        as_json: tokenizer.json; else vocab.json and merges.txt.
        config: for tokenizer_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {byte: 1 + (at + shift) % 256 for at, byte in enumerate(alphabet)}
    kind = "PreTrainedTokenizerFast" if as_json else "Qwen2Tokenizer"
    settings = {"tokenizer_class": kind, "eos_token": END, "pad_token": END, "unk_token": None, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if not as_json:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return str(folder)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokens = [AddedToken(one, special=True, normalized=False) if isinstance(one, str) else one for one in (END, *added)]
    made.add_tokens(tokens)
    made.add_special_tokens([one for one in tokens if one.special])
    if before or after:
        made.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            special_tokens=[(one, made.token_to_id(one)) for one in (*before, *after)],
        )
    made.save(str(folder / "tokenizer.json"))
    return str(folder)
