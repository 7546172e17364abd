"""A domain's corpus: which files it is made of, and which of their documents are held out for validation.

`resolve_files` turns the patterns of a `DomainConfig` into a sorted list of files; `in_validation` splits the documents
where a domain has no validation files of its own. What lies in the files is read by `storage.corpus.documents`;
`storage.files.digests` gives the content hashes that a store's fingerprint covers.

A file's suffix says what is in it:

- `.jsonl`, `.json`: one JSON object a line; the document is one field of it. Blank lines hold no document.
- `.txt`: a document ends at a blank line (or at the file's end). Its lines are joined by a line feed.
- `.parquet`: a document is one row of a string column.

The first two may end in `.gz` or `.zst` as well; whether they are compressed, and with which of the two, is seen by
their first bytes (`storage.corpus.magic`). Of the kinds that have fields, further ones may hold a document's
prompt, and where below its domain it belongs (`storage.corpus.leaves`).
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ddk.errors import UserError
from ddk.section import Section
from storage.corpus.selecting import BlockSelect, ByField, Select
from storage.errors import StoreError, explained
from storage.files import uri

_SUFFIXES = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")
_ACCEPTED = ".jsonl, .json (one object a line) or .txt, each plain or with .gz or .zst behind it, or .parquet"

Url = Annotated[str, Field(min_length=1)]
Urls = Annotated[list[Url], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class DomainConfig(Section):
    """One domain of the corpus: where its documents lie and how they are split."""

    train: Urls = Field(min_length=1)
    """Files to train on: paths, URLs (s3://bucket/key) or globs of .jsonl, .json, .txt (each also .gz or .zst) or
    .parquet files."""
    validation: Urls = Field(default=[])
    """Files of the same kinds on which the gap is measured. Leave empty to hold out a fraction of the train files."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the train files' documents that is held out for validation (0.01 is one in a hundred), chosen by a hash.
    Give either this or validation files."""
    text_field: str = Field(default="text", min_length=1)
    """Name of the JSON field or Parquet column that holds the text. Not needed for text files."""
    prompt_field: str | None = Field(default=None, min_length=1)
    """Name of the field that holds the prompt, for instruction data. The prompt's tokens come before those of
    `text_field` and carry no loss. Every record must have the field; if its value is null or empty, the record has no
    prompt. Both fields are tokenised as they are: apply a chat template to them beforehand, and set
    `special_tokens: control` so that the template's control tokens are recognised. Not for text files."""
    special_tokens: Literal["text", "control"] = "text"
    """How to read a control token that is spelled out in a text (`<s>`, `<|im_end|>`): 'text' reads its letters, as in
    HTML or a manual; 'control' reads the token itself, as in chats to which a template has been applied."""
    path_field: str | None = Field(default=None, min_length=1)
    """Name of the field that holds a record's path below its domain. In domain `math`, a record whose field holds
    `algebra/linear` belongs to `math/algebra/linear`, which has a gap and a probability of its own, like a domain.
    Every record must have the field. Not for text files."""
    path_depth: int | None = Field(default=None, ge=1, le=100)
    """Number of parts of the records' paths to keep: with 1, `algebra/linear` and `algebra/rings` both become
    `algebra`. If empty, all parts are kept."""
    max_train_blocks: int | None = Field(default=None, ge=1, le=10**12)
    """Largest number of train blocks (of each leaf, if there is a path_field). If empty, all are used."""
    max_validation_blocks: int | None = Field(default=None, ge=1, le=10**12)
    """Largest number of validation blocks (of each leaf, if there is a path_field). If empty, all are used."""
    select: Select | None = None
    """Which of the domain's train data to use. `{by: difference, keep: 0.5}` and `{by: trajectory, keep: 0.1, run:
    NAME}` keep the best blocks (`ddk select`); `{by: field, field: quality, at_least: 0.6}` keeps the records whose
    field is large enough. By default, all are used. See docs/selecting.md."""
    targets: Literal["teacher", "topk", "distillkit"] = "teacher"
    """Where the teacher's predictions come from. 'teacher' captures them. With the other values, the files (.parquet or
    .jsonl) already hold rows of tokens with a teacher's predictions: lists of the top k ('topk'), or DistillKit's
    format ('distillkit')."""
    shift: Literal[0, 1] = 1
    """For files that hold predictions: list i of a row predicts its token i + shift."""
    compression_config: str | None = Field(default=None, min_length=1)
    """With 'distillkit': the file that describes how its columns are compressed. If empty, compression_config.yaml
    beside each file."""

    @model_validator(mode="after")
    def _one_source_of_validation(self) -> DomainConfig:
        if bool(self.validation) == (self.validation_fraction > 0):
            found = "both are given" if self.validation else "neither is given"
            raise ValueError(
                f"a domain needs either `validation` (files) or `validation_fraction` above 0, and {found}: "
                "name validation files, or set for example validation_fraction: 0.01"
            )
        return self

    @model_validator(mode="after")
    def _import_settings_have_their_use(self) -> DomainConfig:
        if self.compression_config is not None and self.targets != "distillkit":
            raise ValueError(f"compression_config needs targets: distillkit, but targets is '{self.targets}'")
        if self.shift != 1 and not self.imported:
            raise ValueError("shift applies only to files that hold predictions; set targets: topk, or leave shift out")
        return self

    @model_validator(mode="after")
    def _a_prompt_is_a_field_of_documents(self) -> DomainConfig:
        if self.prompt_field is not None and self.imported:
            raise ValueError(
                f"prompt_field applies only to documents, and targets: {self.targets} takes rows of tokens, which do "
                f"not mark the prompt; leave prompt_field out, or capture the domain (targets: teacher)"
            )
        if self.prompt_field == self.text_field:
            raise ValueError(
                f"prompt_field and text_field are both '{self.text_field}'; text_field names what follows the prompt"
            )
        return self

    @model_validator(mode="after")
    def _a_path_is_a_field_of_documents(self) -> DomainConfig:
        if self.path_depth is not None and self.path_field is None:
            raise ValueError("path_depth needs path_field, which is not set; name the field of the records' paths")
        if self.path_field is not None and self.imported:
            raise ValueError(
                f"path_field applies only to documents, and targets: {self.targets} takes rows of tokens; make the "
                f"files of each leaf a separate domain, named by its path (such as math/algebra)"
            )
        others = {"text_field": self.text_field, "prompt_field": self.prompt_field}
        if twice := [name for name, value in others.items() if value is not None and value == self.path_field]:
            raise ValueError(f"path_field and {twice[0]} are both '{self.path_field}'; each is a field of its own")
        return self

    @model_validator(mode="after")
    def _a_value_is_a_field_of_documents(self) -> DomainConfig:
        if self.value_field is None:
            return self
        if self.imported:
            raise ValueError(
                f"select.by: field applies only to documents, and targets: {self.targets} takes rows of tokens; choose "
                f"among the rows beforehand"
            )
        if self.value_field in (self.text_field, self.prompt_field, self.path_field):
            raise ValueError(
                f"select.field is '{self.value_field}', which holds text; name a field that holds a number"
            )
        return self

    @property
    def value_field(self) -> str | None:
        """Name of the field that decides which records are packed."""
        return self.select.field if isinstance(self.select, ByField) else None

    @property
    def block_select(self) -> BlockSelect | None:
        """How blocks are chosen; None where all that are packed are used."""
        return None if isinstance(self.select, ByField) else self.select

    def keeps(self, value: float | None) -> bool:
        """Whether a record for training is packed.

        Args:
            value: of its `value_field`.
        """
        return not isinstance(self.select, ByField) or value is None or value >= self.select.at_least

    @property
    def imported(self) -> bool:
        """Whether the files hold a teacher's predictions already."""
        return self.targets != "teacher"


def selects_blocks(domains: Mapping[str, DomainConfig]) -> bool:
    """Whether any domain's blocks are chosen, so that there is a stage for it."""
    return any(corpus.block_select is not None for corpus in domains.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFile:
    """One file of a domain."""

    url: str
    name: str
    """Base name: what stays the same when a corpus moves."""
    size: int
    """Bytes as stored (compressed); 0 where the server does not tell."""


def resolve_files(
    patterns: Sequence[str],
    domain: str,
    prompt_field: str | None = None,
    path_field: str | None = None,
    value_field: str | None = None,
) -> list[CorpusFile]:
    """The files that the patterns match: sorted by URL, each once, local ones as absolute paths.

    Raises:
        UserError: a pattern matches no file, names a folder or cannot be listed, a file's suffix is unknown, or it is
            a text file and there is to be a prompt or a path.
    """
    found = {file.url: file for pattern in patterns for file in _expand(pattern, domain)}
    for file in found.values():
        check_fields(file, prompt_field, f"domain '{domain}': ", path_field, value_field)
    return [found[url] for url in sorted(found)]


def _expand(pattern: str, domain: str) -> list[CorpusFile]:
    place = f"domain '{domain}', pattern '{pattern}'"
    try:
        fs, path = uri.open_fs(pattern)
        fs.invalidate_cache()
        entries: dict[str, Any] = fs.glob(path, detail=True) if glob.has_magic(path) else {}
        if not entries and (info := _info(fs, path, place)):  # plain, or a name that holds a bracket
            entries = {path: info}
        # A listing does not follow links.
        entries = {path: fs.info(path) if info.get("islink") else info for path, info in entries.items()}
    except StoreError as error:  # of the address itself
        raise UserError(f"{place} cannot be listed: {error}") from error
    except UserError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{place} cannot be listed ({error}); check the URL and the credentials") from error
    except Exception as error:
        if (known := explained(error, place)) is None:
            raise
        raise known from error
    files = {path: info for path, info in entries.items() if info["type"] == "file"}
    for found, info in entries.items():
        if info["type"] == "other":
            raise UserError(f"{place}: {found} is {_special(info)}, which cannot be read twice; store it as a file")
    if entries and not files:
        raise UserError(f"{place} names a folder; name the files in it, for example '{pattern.rstrip('/')}/*.jsonl'")
    if not files:
        raise UserError(f"{place} matches no file; check the path (relative ones start at the working folder)")
    if "::" in pattern and glob.has_magic(path):
        raise UserError(f"{place}: a chained URL ('::') cannot be a glob; name its files one by one")
    return [
        CorpusFile(
            url=pattern if "::" in pattern else path if uri.is_local(pattern) else fs.unstrip_protocol(path),
            name=path.rsplit("/", 1)[-1],
            size=int(info.get("size") or 0),
        )
        for path, info in files.items()
    ]


def _info(fs: Any, path: str, place: str) -> dict[str, Any] | None:
    """Of what lies there; None where nothing does.

    Raises:
        UserError: nobody can tell: a server does not answer, or refuses. fsspec takes that for a missing file.
    """
    try:
        if "http" not in fs.protocol:
            return dict(fs.info(path)) if fs.exists(path) else None
        return dict(fs.info(path))
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            return None
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(
            f"{place}: its server does not answer, or refuses ({said}); check the URL, the network and HTTP_PROXY"
        ) from error


def _special(info: dict[str, Any]) -> str:
    """A local entry that is neither file nor folder."""
    kinds = {
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(info.get("mode", 0)), "neither file nor folder")


def file_format(file: CorpusFile, place: str = "") -> tuple[str, str]:
    """`('json', '.gz')` for `a.jsonl.gz`.

    Raises:
        UserError: the suffix is unknown; the message begins with `place`.
    """
    stem, suffix = os.path.splitext(file.name.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    kind = _SUFFIXES.get(os.path.splitext(stem)[1] if compression else suffix)
    if kind is None or (kind == "parquet" and compression):
        raise UserError(f"{place}{file.url} has an unknown suffix; accepted are {_ACCEPTED}")
    return kind, compression


def check_fields(
    file: CorpusFile,
    prompt_field: str | None,
    place: str = "",
    path_field: str | None = None,
    value_field: str | None = None,
) -> None:
    """That the file's kind is known, and has fields where one is to hold the prompt, the path or a number.

    Raises:
        UserError: it is not so; the message begins with `place`.
    """
    plain = file_format(file, place)[0] == "text"
    for what, field in (("prompt", prompt_field), ("path", path_field)):
        if plain and field is not None:
            raise UserError(
                f"{place}{file.url} holds plain text, which has no field '{field}'; {what}_field goes with .jsonl and "
                f".parquet files: leave it out, or put {what} and text into fields"
            )
    if plain and value_field is not None:
        raise UserError(
            f"{place}{file.url} holds plain text, which has no field '{value_field}'; select.by: field goes with "
            f".jsonl and .parquet files"
        )


def domain_seed(domain: str) -> int:
    """A number for each domain's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest())


def in_validation(domain_seed: int, file_name: str, record: int, fraction: float) -> bool:
    """Whether a document is held out: a hash of its place, so that each split can be read without the other.

    A larger fraction holds out all that a smaller one does. Moving a file changes nothing; renaming it does.
    """
    key = f"{domain_seed}\0{file_name}\0{record}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < fraction * 2**64
