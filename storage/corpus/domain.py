"""A domain's corpus: which files it is made of, and which of their documents are held out for validation.

`in_validation` splits the documents where a domain has no validation files of its own. Which files the patterns of a
`DomainConfig` match is found by `storage.corpus.files`, what lies in them is read by `storage.corpus.documents`;
`storage.files.digests` gives the content hashes that a store's fingerprint covers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ddk.section import Section
from storage.corpus.files import Fields
from storage.corpus.selecting import BlockSelect, ByField, Select

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
    format: Literal["text", "messages"] = "text"
    """What a document is. 'text': a string. 'messages': a conversation, as a list of turns with role and content (or
    ShareGPT's from and value), rendered by the teacher's own chat template; only the assistant's turns carry loss, and
    no conversation is cut that fits a block. See docs/training.md."""
    text_field: str = Field(default="text", min_length=1)
    """Name of the JSON field or Parquet column that holds the text. Not needed for text files."""
    messages_field: str | None = Field(default=None, min_length=1)
    """Name of the field that holds the conversation, with format: messages. If empty, `messages`, or `conversations`
    where there is no `messages`."""
    template_args: dict[str, bool | int | float | str | None] = Field(default={})
    """What the chat template is given besides the conversation, such as `{enable_thinking: false}`."""
    prompt_field: str | None = Field(default=None, min_length=1)
    """Name of the field that holds the prompt, for instruction data. The prompt's tokens come before those of
    `text_field` and carry no loss. Every record must have the field; if its value is null or empty, the record has no
    prompt. Both fields are tokenised as they are: apply a chat template to them beforehand, and set
    `special_tokens: control` so that the template's control tokens are recognised. Not for text files."""
    special_tokens: Literal["text", "control"] = "text"
    """How to read a control token that is spelled out in a text (`<s>`, `<|im_end|>`): 'text' reads its letters, as in
    HTML or a manual; 'control' reads the token itself, as in chats to which a template has been applied. With format:
    messages this is about what is said in the turns; the template's own tokens are always tokens."""
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
    def _conversations_have_settings_of_their_own(self) -> DomainConfig:
        if self.format == "text":
            for name in ("messages_field", "template_args"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with format: messages; set that, or leave {name} out")
            return self
        if self.imported:
            raise ValueError(
                f"format: messages applies only to documents, and targets: {self.targets} takes rows of tokens; leave "
                f"format out"
            )
        if self.prompt_field is not None:
            raise ValueError(
                "format: messages marks the assistant's turns itself; leave prompt_field out, or leave format out"
            )
        if self.text_field != "text":
            raise ValueError(
                f"with format: messages the field is named by messages_field; write messages_field: {self.text_field} "
                f"instead of text_field"
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
        others = {
            "text_field": self.text_field,
            "prompt_field": self.prompt_field,
            "messages_field": self.messages_field,
        }
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
        if self.value_field in (self.text_field, self.prompt_field, self.path_field, self.messages_field):
            raise ValueError(
                f"select.field is '{self.value_field}', which holds text; name a field that holds a number"
            )
        return self

    @property
    def messages(self) -> bool:
        """Whether its documents are conversations."""
        return self.format == "messages"

    @property
    def fields(self) -> Fields:
        """What is read of each record for training."""
        return Fields(
            text=self.messages_field if self.messages else self.text_field,
            prompt=self.prompt_field,
            path=self.path_field,
            value=self.value_field,
            messages=self.messages,
        )

    @property
    def validation_fields(self) -> Fields:
        """The same of a record that is held out: all are kept, whatever their numbers."""
        return self.fields._replace(value=None)

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


def domain_seed(domain: str) -> int:
    """A number for each domain's name, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(domain.encode(), digest_size=8).digest())


def in_validation(domain_seed: int, file_name: str, record: int, fraction: float) -> bool:
    """Whether a document is held out: a hash of its place, so that each split can be read without the other.

    A larger fraction holds out all that a smaller one does. Moving a file changes nothing; renaming it does.
    """
    key = f"{domain_seed}\0{file_name}\0{record}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) < fraction * 2**64
