"""Where each domain's stores lie: from the configuration to fingerprints, without computing any store.

Each domain has fingerprints of its own, so that a change to one domain's corpus leaves the others' stores as they
are. Every stage plans afresh and meets the stage before it at the same URL; they exchange nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.student import load_tokenizer
from ddk.types import Split
from storage import uri
from storage.corpus import CorpusFile, DomainConfig, resolve_files
from storage.digests import DigestCache
from storage.fingerprint import fingerprint
from storage.layout import BLOCKS_PER_SHARD, FORMAT_VERSION
from tasks.models import local_folder, tokenizer_digests, weight_digests
from tasks.teacher import TeacherConfig, check_fits, engine_version, resolved_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """One domain's two stores: where they lie, and what they are to hold."""

    domain: str
    corpus: DomainConfig
    train_files: tuple[CorpusFile, ...]
    validation_files: tuple[CorpusFile, ...]
    """The train files again where a fraction of them is held out."""
    blocks_url: str
    blocks_inputs: Mapping[str, Any]
    blocks_dims: Mapping[str, int]
    targets_url: str
    targets_inputs: Mapping[str, Any]
    targets_dims: Mapping[str, int]

    def files(self, split: Split) -> tuple[CorpusFile, ...]:
        """The files that hold the split's documents."""
        return self.train_files if split == "train" else self.validation_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All domains' stores, and what they share."""

    domains: Mapping[str, StorePlan]
    teacher_folder: str
    vocab_size: int
    """Tokens of the tokenizer, V."""
    eos_id: int

    def __getitem__(self, domain: str) -> StorePlan:
        return self.domains[domain]


def plan_stores(root: str, domains: Mapping[str, DomainConfig], packing: PackingConfig, teacher: TeacherConfig) -> Plan:
    """Fingerprint every input.

    Files are hashed once and remembered in `<root>/digests.json` by size and modification time.

    Raises:
        UserError: a corpus or a model is not there, or they do not fit together.
    """
    digests = DigestCache(uri.join(root, "digests.json"))
    folder = local_folder(teacher.model, teacher.revision, "teacher.model")
    tokenizer = load_tokenizer(folder, trust_remote_code=teacher.trust_remote_code)
    # Not the number of tokens: a vocabulary may have holes, and every id must lie below V.
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    check_fits(teacher, seq_len=packing.seq_len, vocab_size=vocab_size)
    tokenizer_inputs = {"files": tokenizer_digests(folder, digests), "eos_id": tokenizer.eos_token_id}
    teacher_inputs = {
        "weights": weight_digests(folder, digests, "teacher.model"),
        "k": teacher.k,
        "dtype": resolved_dtype(teacher),
        "quantization": teacher.quantization,
        "engine": f"vllm {engine_version()}",
    }
    plans: dict[str, StorePlan] = {}
    for domain, corpus in domains.items():
        train = resolve_files(corpus.train, domain)
        validation = resolve_files(corpus.validation, domain) if corpus.validation else train
        both = {file.url for file in train} & {file.url for file in validation}
        if corpus.validation and both:
            raise UserError(
                f"domain '{domain}' reads {sorted(both)[0]} for training and for validation; take it out of one"
            )
        blocks_inputs = {
            "kind": "blocks",
            "format": FORMAT_VERSION,
            "domain": domain,
            "corpus": {
                **corpus.model_dump(exclude={"train", "validation"}),
                "train": _files(train, digests),
                "validation": _files(validation, digests),
            },
            "tokenizer": tokenizer_inputs,
            "seq_len": packing.seq_len,
        }
        targets_inputs = {
            "kind": "targets",
            "format": FORMAT_VERSION,
            "blocks": fingerprint(blocks_inputs),
            "teacher": teacher_inputs,
            "shard_blocks": teacher.shard_blocks,
        }
        dims = {"seq_len": packing.seq_len, "vocab_size": vocab_size}
        plans[domain] = StorePlan(
            domain=domain,
            corpus=corpus,
            train_files=tuple(train),
            validation_files=tuple(validation),
            blocks_url=uri.join(root, "blocks", fingerprint(blocks_inputs), f"{domain}.zarr"),
            blocks_inputs=blocks_inputs,
            blocks_dims={**dims, "shard_blocks": BLOCKS_PER_SHARD},
            targets_url=uri.join(root, "targets", fingerprint(targets_inputs), f"{domain}.zarr"),
            targets_inputs=targets_inputs,
            targets_dims={**dims, "k": teacher.k, "shard_blocks": teacher.shard_blocks},
        )
    return Plan(domains=plans, teacher_folder=folder, vocab_size=vocab_size, eos_id=int(tokenizer.eos_token_id))


def _files(files: list[CorpusFile], digests: DigestCache) -> list[list[Any]]:
    found = digests.get_all([file.url for file in files])
    return [[file.name, file.size, found[file.url]] for file in files]
