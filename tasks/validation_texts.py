"""A domain's validation documents as text, in the order of its files: the same ones that the gap is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from storage.corpus import DomainConfig, domain_seed, in_validation, resolve_files
from storage.documents import iter_documents


def validation_texts(domain: str, corpus: DomainConfig, most: int) -> list[str]:
    """The first so many documents; a prompt stands in front of its text.

    Raises:
        UserError: a file of the corpus is not there, or not as it should be.
    """
    return list(islice(_texts(domain, corpus), most))


def _texts(domain: str, corpus: DomainConfig) -> Iterator[str]:
    fraction, seed = corpus.validation_fraction, domain_seed(domain)
    for file in resolve_files(corpus.validation or corpus.train, domain, corpus.prompt_field):
        for document in iter_documents(file, corpus.text_field, prompt_field=corpus.prompt_field):
            if not fraction or in_validation(seed, file.name, document.record, fraction):
                yield document.prompt + document.text
