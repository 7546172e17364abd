"""From a domain's files to token ids, document by document, in order.

Texts are read here and handed, a batch at a time, to a thread that tokenises them; the tokenizer's own threads share
a batch among the cores and let go of Python meanwhile. So while one batch is tokenised, the consumer packs the one
before and this module reads the one after.

What begins and ends a document is put there by `ddk.packing`. Text that spells a control token (`<|endoftext|>`) is
text, unless the domain says otherwise (`tasks.packing.encoder`).

Where a domain has a `prompt_field`, prompt and text are tokenised each by itself and laid end to end, so that the
boundary falls between two tokens whatever the tokenizer would have merged across it. Nothing is put between them and no
chat template is applied: who wants one renders it into the two fields, the header of the answer at the prompt's end
and the end of the turn at the text's, and sets `special_tokens: control`.

    prompt "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"    text "4<|im_end|>\n"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ddk.packing import Document
from ddk.values import Split
from storage.corpus.documents import Text, iter_documents
from storage.corpus.domain import CorpusFile, DomainConfig, domain_seed, in_validation
from storage.corpus.leaves import in_leaf_validation, iter_leaf_documents
from tasks.packing.encoder import TextEncoder

DocumentKey = tuple[int, int]
"""File index and record number: where a document lies, and in which order it comes. Of a leaf 0 and the document's
number within the leaf: what lies between may change while the leaf stays as it is."""

Tokenized = list[Document[DocumentKey]]

_NO_TOKENS = np.empty(0, dtype=np.int32)
MAX_BATCH_CHARACTERS = 1 << 22
"""A batch of long documents is closed early, so that memory stays bounded."""


def tokenize_documents(
    files: Sequence[CorpusFile],
    config: DomainConfig,
    split: Split,
    tokenizer: Any,
    *,
    domain: str,
    path: str | None = None,
    start: DocumentKey = (0, 0),
    on_progress: Callable[[int], None] | None = None,
    on_spelled: Callable[[str], None] | None = None,
    batch_documents: int = 256,
) -> Iterator[Document[DocumentKey]]:
    """The split's documents from `start` on, each with at least one token behind its prompt.

    `files` are the ones that hold the split: the validation files where the config names some, else the train files, of
    which `validation_fraction` is held out. `path` is the leaf's, where its documents alone are meant. `tokenizer` is
    `tasks.packing.encoder.TextEncoder`'s. `on_progress` hears the stored bytes that were passed since its last call;
    over all files these sum to the files' sizes. `on_spelled` hears at the end of a control token that stayed text.
    Both are called on the consumer's thread.

    Raises:
        UserError: a file cannot be read (see `storage.corpus.documents.iter_documents`), or a text not be encoded.
    """
    encode = TextEncoder(tokenizer, control=config.special_tokens == "control")
    seed = domain_seed(domain)
    passed = on_progress or (lambda _: None)
    documents = (
        _documents(files, config, split, seed, start, passed)
        if path is None
        else _leaf_documents(files, config, split, seed, path, start, passed)
    )
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize") as executor:
        ahead: Future[Tokenized] | None = None
        for batch in _batches(documents, batch_documents):
            ready, ahead = ahead, executor.submit(_tokenize, encode, batch)
            if ready is not None:
                yield from ready.result()
        if ahead is not None:
            yield from ahead.result()
    if on_spelled is not None and encode.spelled is not None:
        on_spelled(encode.spelled)


def _documents(
    files: Sequence[CorpusFile],
    config: DomainConfig,
    split: Split,
    seed: int,
    start: DocumentKey,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[DocumentKey, Text]]:
    fraction, value = config.validation_fraction, config.value_field if split == "train" else None
    for index, file in enumerate(files):
        progress = _FileProgress(file.size, on_progress)
        if index >= start[0]:
            first = start[1] if index == start[0] else 0
            for document in iter_documents(file, config.text_field, first, progress.read, config.prompt_field, value):
                record = document.record
                if split == "train" and not config.keeps(document.value):
                    continue
                if not fraction or in_validation(seed, file.name, record, fraction) == (split == "validation"):
                    yield (index, record), document
        progress.finish()


def _leaf_documents(
    files: Sequence[CorpusFile],
    config: DomainConfig,
    split: Split,
    seed: int,
    path: str,
    start: DocumentKey,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[DocumentKey, Text]]:
    """All files from their beginning: only their records say which of them are the leaf's."""
    fraction, number = config.validation_fraction, 0
    for file in files:
        progress = _FileProgress(file.size, on_progress)
        for found, document in iter_leaf_documents(file, config, progress.read):
            if found != path:
                continue
            kept = split != "train" or config.keeps(document.value)
            if (
                number >= start[1]
                and kept
                and (not fraction or in_leaf_validation(seed, document, fraction) == (split == "validation"))
            ):
                yield (0, number), document
            number += 1
        progress.finish()


class _FileProgress:
    """Passes on the bytes read of one file, so that they sum to its size whatever its reader leaves out or rereads."""

    def __init__(self, size: int, on_progress: Callable[[int], None]) -> None:
        self._left, self._on_progress = size, on_progress

    def read(self, size: int) -> None:
        size = min(size, self._left)
        if size:
            self._left -= size
            self._on_progress(size)

    def finish(self) -> None:
        self.read(self._left)


def _batches(
    documents: Iterator[tuple[DocumentKey, Text]], batch_documents: int
) -> Iterator[list[tuple[DocumentKey, Text]]]:
    batch: list[tuple[DocumentKey, Text]] = []
    characters = 0
    for key, document in documents:
        batch.append((key, document))
        characters += len(document.text) + len(document.prompt)
        if len(batch) >= batch_documents or characters >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(encode: TextEncoder, batch: list[tuple[DocumentKey, Text]]) -> Tokenized:
    prompted = [number for number, (_, document) in enumerate(batch) if document.prompt]
    # One call, so that the tokenizer's threads share one batch: all texts, then such prompts as there are.
    encoded = encode([document.text for _, document in batch] + [batch[number][1].prompt for number in prompted])
    prompts = dict(zip(prompted, encoded[len(batch) :], strict=True))
    tokenized: Tokenized = []
    for number, (key, _) in enumerate(batch):
        ids, prompt = encoded[number], prompts.get(number, _NO_TOKENS)
        if len(ids):
            tokenized.append(Document(key, np.concatenate([prompt, ids]), len(prompt)))
    return tokenized
