"""From a domain's files to token ids, document by document, in order.

Texts are read here and handed, a batch at a time, to a thread that tokenises them; the tokenizer's own threads share
a batch among the cores and let go of Python meanwhile. So while one batch is tokenised, the consumer packs the one
before and this module reads the one after.

What begins and ends a document is put there by `ddk.packing`. Text that spells a control token (`<|endoftext|>`) is
text, unless the domain says otherwise (`tasks.packing.encoder`).

Conversations are rendered and marked by `tasks.packing.chat`; one in which the assistant says nothing is left out.

Where a domain has a `prompt_field`, prompt and text are tokenised each by itself and laid end to end, so that the
boundary falls between two tokens whatever the tokenizer would have merged across it. Nothing is put between them and no
chat template is applied: who has rendered one into the two fields has the header of the answer at the prompt's end
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
from storage.corpus.conversations import Conversation
from storage.corpus.documents import Text, iter_documents, place_of
from storage.corpus.domain import DomainConfig, domain_seed, in_validation
from storage.corpus.files import CorpusFile
from storage.corpus.leaves import in_leaf_validation, iter_leaf_documents
from tasks.packing.chat import ChatTemplate, has_answer
from tasks.packing.encoder import TextEncoder

DocumentKey = tuple[int, int]
"""File index and record number: where a document lies, and in which order it comes. Of a leaf 0 and the document's
number within the leaf: what lies between may change while the leaf stays as it is."""

Tokenized = list[Document[DocumentKey]]
Batch = list[tuple[DocumentKey, Text]]

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
    on_unanswered: Callable[[int], None] | None = None,
    batch_documents: int = 256,
) -> Iterator[Document[DocumentKey]]:
    """The split's documents from `start` on, each with at least one token behind its prompt.

    `files` are the ones that hold the split: the validation files where the config names some, else the train files, of
    which `validation_fraction` is held out. `path` is the leaf's, where its documents alone are meant. `tokenizer` is
    `tasks.packing.encoder.TextEncoder`'s. `on_progress` hears the stored bytes that were passed since its last call;
    over all files these sum to the files' sizes. `on_spelled` hears at the end of a control token that stayed text, and
    `on_unanswered` of the number of conversations that were left out. All are called on the consumer's thread.

    Raises:
        UserError: a file cannot be read (see `storage.corpus.documents.iter_documents`), or a text not be encoded.
    """
    tokenize = (
        _Conversations(tokenizer, config, domain, files if path is None else [])
        if config.messages
        else _Texts(TextEncoder(tokenizer, control=config.special_tokens == "control"))
    )
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
            ready, ahead = ahead, executor.submit(tokenize, batch)
            if ready is not None:
                yield from ready.result()
        if ahead is not None:
            yield from ahead.result()
    if on_spelled is not None and tokenize.spelled is not None:
        on_spelled(tokenize.spelled)
    if on_unanswered is not None and tokenize.unanswered:
        on_unanswered(tokenize.unanswered)


def _documents(
    files: Sequence[CorpusFile],
    config: DomainConfig,
    split: Split,
    seed: int,
    start: DocumentKey,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[DocumentKey, Text]]:
    fraction, fields = config.validation_fraction, config.fields if split == "train" else config.validation_fields
    for index, file in enumerate(files):
        progress = _FileProgress(file.size, on_progress)
        if index >= start[0]:
            first = start[1] if index == start[0] else 0
            for document in iter_documents(file, fields, first, progress.read):
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
    held_out = split == "validation" and bool(config.validation)
    for file in files:
        progress = _FileProgress(file.size, on_progress)
        for found, document in iter_leaf_documents(file, config, progress.read, held_out=held_out):
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


def _batches(documents: Iterator[tuple[DocumentKey, Text]], batch_documents: int) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for key, document in documents:
        batch.append((key, document))
        characters += len(document.text) + len(document.prompt)
        if len(batch) >= batch_documents or characters >= MAX_BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Texts:
    """Tokenises a batch of texts, and their prompts."""

    unanswered = 0

    def __init__(self, encode: TextEncoder) -> None:
        self._encode = encode

    @property
    def spelled(self) -> str | None:
        return self._encode.spelled

    def __call__(self, batch: Batch) -> Tokenized:
        prompted = [number for number, (_, document) in enumerate(batch) if document.prompt]
        # One call, so that the tokenizer's threads share one batch: all texts, then such prompts as there are.
        encoded = self._encode(
            [document.text for _, document in batch] + [batch[number][1].prompt for number in prompted]
        )
        prompts = dict(zip(prompted, encoded[len(batch) :], strict=True))
        tokenized: Tokenized = []
        for number, (key, _) in enumerate(batch):
            ids = encoded[number]
            if not len(ids):
                continue
            prompt = prompts.get(number)
            if prompt is None:
                tokenized.append(Document(key, ids))
            else:
                loss = np.arange(len(prompt) + len(ids)) >= len(prompt)
                tokenized.append(Document(key, np.concatenate([prompt, ids]), loss))
        return tokenized


class _Conversations:
    """Renders and tokenises a batch of conversations.

    Args:
        files: the documents' first key counts them; none where it does not.
    """

    spelled: str | None = None

    def __init__(self, tokenizer: Any, config: DomainConfig, domain: str, files: Sequence[CorpusFile]) -> None:
        self._template = ChatTemplate(tokenizer, config.template_args, domain)
        self._encode = TextEncoder(tokenizer, control=True, spelled_is_token=config.special_tokens == "control")
        self._domain, self._files = domain, files
        self.unanswered = 0

    def __call__(self, batch: Batch) -> Tokenized:
        tokenized: Tokenized = []
        for key, document in batch:
            found = Conversation.of(document.text)
            if not has_answer(found):
                self.unanswered += 1
                continue
            encoded = self._template.encode(found, self._encode, self._place(key))
            tokenized.append(Document(key, encoded.ids, encoded.loss, whole=True))
        return tokenized

    def _place(self, key: DocumentKey) -> str:
        index, record = key
        if index < len(self._files):
            return place_of(self._files[index], record)
        return f"domain '{self._domain}', record {record + 1}"
