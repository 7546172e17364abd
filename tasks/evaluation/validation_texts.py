"""Domains' validation documents as text, in the order of their files: the same ones that the gap is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from storage.corpus.conversations import Conversation
from storage.corpus.documents import Text, iter_documents
from storage.corpus.domain import DomainConfig, domain_seed, in_validation
from storage.corpus.files import CorpusFile, resolve_files
from storage.corpus.leaves import LeafIndex, in_leaf_validation, iter_leaf_documents
from storage.files import uri
from storage.files.digests import DigestCache
from tasks.planning.leaves import domain_leaves


@dataclass(frozen=True, slots=True)
class _Source:
    corpus: DomainConfig
    path: str | None
    """Of the leaf; None where all documents of the files belong to the domain."""


class ValidationTexts:
    """Of a run's domains that have texts; one whose records have paths stands for its leaves.

    Args:
        root: where the leaves of files are remembered.
        domains: of the configuration.
    """

    def __init__(self, root: str, domains: Mapping[str, DomainConfig]) -> None:
        self._root = root
        self._domains = {name: corpus for name, corpus in domains.items() if not corpus.imported}

    @property
    def names(self) -> list[str]:
        """The domains, in the configuration's order.

        Raises:
            UserError: files whose records have paths are not there, or not as they should be.
        """
        return list(self._sources)

    def read(self, domain: str, most: int) -> list[str]:
        """The first so many documents; a prompt stands in front of its text. Of a conversation, what was said.

        Raises:
            UserError: a file of the corpus is not there, or not as it should be.
        """
        source = self._sources[domain]
        documents = _documents(domain, source) if source.path is None else _leaf_documents(domain, source)
        found = islice(documents, most)
        if source.corpus.messages:
            return [Conversation.of(document.text).plain for document in found]
        return [document.prompt + document.text for document in found]

    @cached_property
    def _sources(self) -> dict[str, _Source]:
        digests = DigestCache(uri.join(self._root, "digests.json"))
        index = LeafIndex(uri.join(self._root, "paths.json"))
        found = {}
        for name, corpus in self._domains.items():
            if corpus.path_field is None:
                found[name] = _Source(corpus, None)
            else:
                leaves = domain_leaves(name, corpus, digests, index)
                found |= {leaf.domain: _Source(corpus, leaf.path) for leaf in leaves}
        return found


def _files(domain: str, corpus: DomainConfig) -> list[CorpusFile]:
    return resolve_files(corpus.validation or corpus.train, domain, corpus.validation_fields)


def _documents(domain: str, source: _Source) -> Iterator[Text]:
    corpus, seed = source.corpus, domain_seed(domain)
    for file in _files(domain, corpus):
        for document in iter_documents(file, corpus.validation_fields):
            fraction = corpus.validation_fraction
            if not fraction or in_validation(seed, file.name, document.record, fraction):
                yield document


def _leaf_documents(leaf: str, source: _Source) -> Iterator[Text]:
    corpus, seed = source.corpus, domain_seed(leaf)
    for file in _files(leaf, corpus):
        for path, document in iter_leaf_documents(file, corpus, held_out=bool(corpus.validation)):
            fraction = corpus.validation_fraction
            if path == source.path and (not fraction or in_leaf_validation(seed, document, fraction)):
                yield document
