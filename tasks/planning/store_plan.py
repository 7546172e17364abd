"""Derives the URLs of each domain's stores (their fingerprints) from the configuration, without computing any store.

Each domain has its own fingerprints, so that a change to one domain's corpus does not affect the stores of the others.
A domain whose records have paths is split into its leaves here (`tasks.planning.leaves`); from here on, each leaf is a
domain. Every stage makes its own plan and finds the results of the previous stage at the same URL; stages exchange
nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddk.domain_tree import check_leaves
from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.student import load_tokenizer
from ddk.train_config import StudentConfig
from ddk.values import Split
from storage.corpus.conversations import CANONICAL_VERSION
from storage.corpus.domain import DomainConfig
from storage.corpus.files import CorpusFile
from storage.corpus.leaves import LeafIndex
from storage.corpus.record_paths import store_name
from storage.exchange.foreign import IMPORT_VERSION, compression_url
from storage.files import uri
from storage.files.digests import DigestCache
from storage.files.root import make_root
from storage.fingerprint import fingerprint
from storage.stores.codec import TargetFormat
from storage.stores.generations import newest_complete, to_make_again
from storage.stores.layout import BLOCKS_PER_SHARD, FORMAT_VERSION, Kind, is_marked
from tasks.planning.leaves import domain_leaves
from tasks.planning.models import local_folder, tokenizer_digests, weight_digests
from tasks.planning.text_ends import TextEnds, ends_of_rows, text_ends
from tasks.planning.weights import check_weights
from tasks.teachers.config import TeacherConfig, check_fits, engine_version, model_rows, resolved_dtype, target_format
from tasks.teachers.server_teacher import server_identity

CHAT_VERSION = 1
"""Of how `tasks.packing.chat` renders and marks conversations; raised where it would give other tokens or marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlan:
    """One domain's (one leaf's) two stores: where they lie, and what they are to hold."""

    root: str
    """URL of the root below which both lie."""
    domain: str
    corpus: DomainConfig
    path: str | None = None
    """Of a leaf of a domain with a path_field: its records' path, cut; None where all records are meant."""
    train_files: tuple[CorpusFile, ...]
    validation_files: tuple[CorpusFile, ...]
    """The train files again where a fraction of them is held out. Files without a record of the leaf are left out."""
    blocks_url: str
    blocks_inputs: Mapping[str, Any]
    blocks_dims: Mapping[str, int]
    targets_url: str
    targets_inputs: Mapping[str, Any]
    targets_dims: Mapping[str, int]
    targets_form: TargetFormat

    @property
    def marked_blocks_url(self) -> str | None:
        """The store of blocks where some of its positions carry no loss; None where all do."""
        return self.blocks_url if is_marked(self.blocks_dims) else None

    def files(self, split: Split) -> tuple[CorpusFile, ...]:
        """The files that hold the split's documents."""
        return self.train_files if split == "train" else self.validation_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All domains' stores, and what they share."""

    domains: Mapping[str, StorePlan]
    """By leaf, where a domain has leaves."""
    teacher_folder: str
    vocab_size: int
    """Tokens, V: those of the tokenizer, without the added ones at its end that the teacher has no rows for."""
    eos_id: int
    """Behind each document."""
    least_rows: int
    """Of a model that can predict text: up to the last token of the tokenizer that is not one of its added ones."""
    seq_len: int
    bos_ids: tuple[int, ...] = ()
    """Before each document, and before the rest of one in a block that begins within it."""
    ends: TextEnds | None = None
    """The same, with what is to be said of it."""
    trust_remote_code: bool = False
    """Of the teacher."""

    @property
    def urls(self) -> dict[str, tuple[str, str]]:
        """Of the stores of blocks and of targets, by domain."""
        return {domain: (store.blocks_url, store.targets_url) for domain, store in self.domains.items()}

    def tokenizer(self) -> Any:
        """The teacher's, whose ids the blocks hold; a new one with every call."""
        return load_tokenizer(self.teacher_folder, trust_remote_code=self.trust_remote_code)

    def __getitem__(self, domain: str) -> StorePlan:
        return self.domains[domain]


def plan_stores(
    root: str,
    domains: Mapping[str, DomainConfig],
    packing: PackingConfig,
    teacher: TeacherConfig,
    make_again: Collection[Kind] = (),
    student: StudentConfig | None = None,
) -> Plan:
    """Fingerprint every input.

    Files are hashed once and remembered in `<root>/digests.json` by size and modification time; those of a domain with
    a `path_field` are read once as well, and their paths remembered in `<root>/paths.json`.

    Args:
        make_again: stores to be made beside those that are there; see `storage.stores.generations`.
        student: whose end of text ends the documents, unless `packing.eos` names one; None: the teacher's does.

    Raises:
        UserError: a corpus or a model is not there, or they do not fit together.
    """
    make_root(root)
    digests = DigestCache(uri.join(root, "digests.json"))
    captures = not all(corpus.imported for corpus in domains.values())
    folder = local_folder(
        teacher.model, teacher.revision, "teacher.model", weights=captures and teacher.source != "server"
    )
    tokenizer = load_tokenizer(folder, trust_remote_code=teacher.trust_remote_code)
    vocab_size, least_rows = vocabulary(tokenizer)
    if (rows := _teacher_rows(teacher, captures)) is not None and least_rows <= rows < vocab_size:
        vocab_size = rows
        rows_inputs = {"rows": rows}
    else:
        rows_inputs = {}
    if captures:
        check_fits(teacher, seq_len=packing.seq_len, vocab_size=vocab_size)
        if teacher.source != "server":
            check_weights(folder, "teacher.model")
    ends = text_ends(packing, tokenizer, student) if captures else ends_of_rows(tokenizer)
    tokenizer_files = tokenizer_digests(folder, digests)
    tokenizer_inputs = {
        "files": tokenizer_files,
        "eos_id": ends.eos_id,
        **({"bos_ids": list(ends.bos_ids)} if ends.bos_ids else {}),
        **rows_inputs,
    }
    # Rows of tokens that others have cached hold what they hold, whoever trains on them.
    imported_inputs = {"files": tokenizer_files, "eos_id": tokenizer.eos_token_id, **rows_inputs}
    teacher_inputs = _teacher_inputs(teacher, folder, digests, root) if captures else {}
    index = LeafIndex(uri.join(root, "paths.json"))
    leaves = [leaf for name, corpus in domains.items() for leaf in domain_leaves(name, corpus, digests, index)]
    _check_names([leaf.domain for leaf in leaves])
    plans: dict[str, StorePlan] = {}
    for leaf in leaves:
        domain, corpus, files = leaf.domain, leaf.corpus, [*leaf.train, *leaf.validation]
        marked = not corpus.imported and (corpus.prompt_field is not None or corpus.messages or bool(ends.bos_ids))
        blocks_inputs = {
            "kind": "blocks",
            "format": FORMAT_VERSION,
            **({"marked": True} if marked else {}),
            "domain": domain,
            "corpus": leaf.inputs,
            "tokenizer": imported_inputs if corpus.imported else tokenizer_inputs,
            "seq_len": packing.seq_len,
            **({"chat": _chat_inputs(domain, corpus, tokenizer)} if corpus.messages else {}),
        }
        form = target_format(teacher, imported=corpus.imported)
        targets_inputs = {
            "kind": "targets",
            "format": FORMAT_VERSION,
            "keeps": form.model_dump(mode="json") | ({"seed": teacher.draws_seed} if form.draws else {}),
            "blocks": fingerprint(blocks_inputs),
            "teacher": _imported_inputs(domain, corpus, teacher, vocab_size, files, digests)
            if corpus.imported
            else teacher_inputs,
            "shard_blocks": teacher.shard_blocks,
        }
        dims = {"seq_len": packing.seq_len, "vocab_size": vocab_size}
        inputs: dict[Kind, dict[str, Any]] = {"blocks": blocks_inputs, "targets": targets_inputs}
        urls = {kind: _store_url(root, domain, kind, of, make_again) for kind, of in inputs.items()}
        plans[domain] = StorePlan(
            root=root,
            domain=domain,
            corpus=corpus,
            path=leaf.path,
            train_files=tuple(leaf.train),
            validation_files=tuple(leaf.validation),
            blocks_url=urls["blocks"],
            blocks_inputs=blocks_inputs,
            blocks_dims={**dims, "shard_blocks": BLOCKS_PER_SHARD, **({"marked": 1} if marked else {})},
            targets_url=urls["targets"],
            targets_inputs=targets_inputs,
            targets_dims={**dims, "k": teacher.k, "shard_blocks": teacher.shard_blocks},
            targets_form=form,
        )
    return Plan(
        domains=plans,
        teacher_folder=folder,
        vocab_size=vocab_size,
        eos_id=ends.eos_id,
        least_rows=least_rows,
        seq_len=packing.seq_len,
        bos_ids=ends.bos_ids,
        ends=ends,
        trust_remote_code=teacher.trust_remote_code,
    )


def vocabulary(tokenizer: Any) -> tuple[int, int]:
    """One more than the largest id, and the fewest rows with which a model can predict whatever a text becomes.

    Not the number of tokens: a vocabulary may have holes. Added tokens at its end (one for pictures, say) may be beyond
    a model's rows: no text becomes them, and where one does, packing refuses it.
    """
    tokens = tokenizer.get_vocab()
    added = set(tokenizer.get_added_vocab())
    own = max((index for token, index in tokens.items() if token not in added), default=-1)
    return max(tokens.values()) + 1, max(own, int(tokenizer.eos_token_id)) + 1


def _teacher_rows(teacher: TeacherConfig, captures: bool) -> int | None:
    """Tokens that the teacher predicts; None where its config is not there, as for targets from files it need not."""
    try:
        return model_rows(teacher)
    except UserError:
        if captures:
            raise
        return None


def _check_names(leaves: Sequence[str]) -> None:
    if twice := [leaf for leaf, times in Counter(leaves).items() if times > 1]:
        raise UserError(f"two domains of the configuration have records of '{twice[0]}'; rename one")
    try:
        check_leaves(leaves)
    except ValueError as error:
        raise UserError(str(error)) from None


def _store_url(root: str, domain: str, kind: Kind, inputs: Mapping[str, Any], make_again: Collection[Kind]) -> str:
    first = uri.join(root, kind, fingerprint(inputs), store_name(domain))
    return to_make_again(first) if kind in make_again else newest_complete(first)


def _teacher_inputs(teacher: TeacherConfig, folder: str, digests: DigestCache, root: str) -> dict[str, Any]:
    """What determines a teacher's targets, besides the blocks and what is kept."""
    if teacher.source == "server":
        # Its weights are out of sight; `teacher.revision` is the user's word for them.
        server = server_identity(teacher, uri.join(root, "servers.json"))
        return {"source": "server", **server, "revision": teacher.revision, "k": teacher.k}
    source = {} if teacher.source == "engine" else {"source": teacher.source}
    return {
        **source,
        "weights": weight_digests(folder, digests, "teacher.model"),
        "k": teacher.k,
        "dtype": resolved_dtype(teacher),
        "quantization": teacher.quantization,
        "engine": f"vllm {engine_version()}",
    }


def chat_template(domain: str, tokenizer: Any) -> Any:
    """A tokenizer's chat template, or its several ones by name.

    Args:
        domain: whose conversations are to be rendered.

    Raises:
        UserError: there is none.
    """
    found = getattr(tokenizer, "chat_template", None)
    if not found:
        raise UserError(
            f"domain '{domain}' has format: messages, and the tokenizer of teacher.model has no chat template; add its "
            f"chat_template.jinja to that folder, or render the conversations beforehand (text_field, prompt_field)"
        )
    return found


def _chat_inputs(domain: str, corpus: DomainConfig, tokenizer: Any) -> dict[str, Any]:
    """What determines how conversations are written, besides the tokenizer's other files."""
    return {
        "version": CHAT_VERSION,
        "canonical": CANONICAL_VERSION,
        "template": fingerprint({"template": chat_template(domain, tokenizer)}),
        "args": dict(corpus.template_args),
    }


def _imported_inputs(
    domain: str,
    corpus: DomainConfig,
    teacher: TeacherConfig,
    vocab_size: int,
    files: list[CorpusFile],
    digests: DigestCache,
) -> dict[str, Any]:
    """What determines the targets of a domain whose files hold predictions already, besides its blocks."""
    place = f"domain '{domain}' takes its targets from files"
    if teacher.k > vocab_size:
        raise UserError(f"teacher.k is {teacher.k} and the tokenizer has {vocab_size} tokens; lower teacher.k")
    for field, default in (("draws", 0), ("tail_temperatures", ())):
        if getattr(teacher, field) != default:
            raise UserError(f"{place}, which hold no {field}; leave teacher.{field} out, or capture the domain")
    urls = {file.url: compression_url(file, corpus.compression_config) for file in files}
    there = [url for url in sorted(set(urls.values())) if corpus.targets == "distillkit" and uri.exists(url)]
    if corpus.compression_config and corpus.compression_config not in there:
        raise UserError(f"{place}, and there is no {corpus.compression_config}; correct compression_config")
    found = digests.get_all(there)
    return {
        "imported": corpus.targets,
        "version": IMPORT_VERSION,
        "k": teacher.k,
        "shift": corpus.shift,
        "compression": {file.name: found[urls[file.url]] for file in files if urls[file.url] in found},
    }
