"""`ddk push`: puts a finished run's student, with its card, on the Hugging Face hub.

Only the files that the run wrote go, after their digests have been checked. The card gets the licence that is named: it
must be one that the licences of the student before training, the teacher and the data allow, which nobody but the
person who publishes can say. The token is read from HF_TOKEN alone, and neither stored nor logged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from ddk.errors import UserError
from ddk.redaction import redacted
from storage.errors import StoreDamagedError
from storage.files import uri
from storage.files.yaml_text import parse_yaml
from storage.runs.folder import RunFolder, run_at
from storage.runs.listing import records_of
from tasks.showing.progress import logger

CARD = "README.md"
TOKEN = "HF_TOKEN"  # noqa: S105 (the variable's name)
_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub"}
"""Packages whose errors say that the hub does not answer; by name: which of them the hub's client uses is its own."""
_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """What would go where."""

    run: str
    repo: str
    endpoint: str
    private: bool
    folder: str
    """Local folder with the student's files, checked."""
    files: Mapping[str, int]
    """Bytes by name; of the card, as it would go."""
    card: bytes
    front_matter: Mapping[str, Any]


@contextmanager
def prepared(
    url: str, repo: str, *, license_: str | None, languages: Sequence[str] = (), private: bool = True
) -> Iterator[Push]:
    """Check the run, the names and every byte that would go; nothing is sent.

    Args:
        url: of the run, <root>/runs/<name>.
        repo: 'owner/name'.
        license_: for the card, as the hub names it: 'apache-2.0'. None: as the card has it.
        languages: likewise: 'en'.

    Raises:
        UserError: there is no such finished run, no licence is named, or the name is none of a repository.
        StoreDamagedError: the student's files are not those that the run wrote.
    """
    folder = _finished(url)
    _check_repo(repo)
    with uri.local_folder_copy(folder.student_url) as local:
        listed, there = folder.student_listing.read(), records_of(local)
        if not listed:
            raise StoreDamagedError(f"{folder.student_listing.url} is missing; run the same `ddk train` again")
        for name, record in sorted(listed.items()):
            if there.get(name) != record:
                what = "missing" if name not in there else "not what was written (its digest differs)"
                raise StoreDamagedError(
                    f"{uri.join(folder.student_url, name)} is {what}, and nothing was sent; run the same `ddk train` "
                    f"again, which saves the student from the last checkpoint"
                )
        with open(os.path.join(local, CARD), encoding="utf-8") as file:
            card, matter = with_fields(file.read(), license_=license_, languages=languages)
        sizes = {name: record.bytes for name, record in sorted(listed.items())}
        yield Push(
            run=folder.name,
            repo=repo,
            endpoint=os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT,
            private=private,
            folder=local,
            files={**sizes, CARD: len(card)},
            card=card,
            front_matter=matter,
        )


def _finished(url: str) -> RunFolder:
    run = run_at(url)
    folder = RunFolder(*run) if run is not None else None
    if folder is None or folder.identity() is None:
        raise UserError(f"{url} is no run; give its folder or URL, <root>/runs/<name>")
    if folder.summary() is None:
        raise UserError(f"run '{folder.name}' is not finished; run the same `ddk train` again, then push it")
    return folder


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo[:120]}' is no name of a repository on the hub ({error}); write OWNER/NAME") from None
    if "/" not in repo:
        raise UserError(f"'{repo[:120]}' names no owner; write OWNER/{repo[:96]}")


def with_fields(card: str, *, license_: str | None, languages: Sequence[str]) -> tuple[bytes, dict[str, Any]]:
    """A model card with further fields in its front matter, and that front matter.

    Raises:
        UserError: the card has no licence, and none is named.
    """
    match = _FRONT_MATTER.match(card)
    found = parse_yaml(match[1], CARD) if match else {}
    matter: dict[str, Any] = dict(found) if isinstance(found, dict) else {}
    if license_ is not None:
        matter["license"] = license_
    if languages:
        matter["language"] = list(languages)
    if not matter.get("license"):
        raise UserError(
            "the card names no licence; give one with --license that the licences of the student, the teacher and the "
            "data allow (e.g. apache-2.0, or other)"
        )
    text = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n{card[match.end() :] if match else card}".encode(), matter


def push(asked: Push) -> str:
    """Create the repository where there is none, and put all files there in one commit.

    Returns:
        The URL of the commit.

    Raises:
        UserError: there is no token, or the hub refuses or does not answer.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise UserError(f"{TOKEN} is not set; set it to a token of the hub with the right to write")
    api = huggingface_hub.HfApi(endpoint=asked.endpoint, token=token)
    operations = [
        huggingface_hub.CommitOperationAdd(
            path_in_repo=name, path_or_fileobj=asked.card if name == CARD else os.path.join(asked.folder, name)
        )
        for name in asked.files
    ]
    try:
        api.create_repo(asked.repo, private=asked.private, exist_ok=True)
        done = api.create_commit(asked.repo, operations, commit_message=f"Student of the ddk run {asked.run}")
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, and a push needs the hub; unset it") from None
    except Exception as error:
        if not isinstance(error, HfHubHTTPError | OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        raise UserError(_refusal(asked, error, token)) from None
    logger.info("push %s: %s", asked.run, redacted(str(done.commit_url)))
    return redacted(str(done.commit_url))


def _refusal(asked: Push, error: Exception, token: str) -> str:
    place = f"the hub at {redacted(asked.endpoint)}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return f"{place} refuses ({status}): {TOKEN} must be a token with the right to write to {asked.repo}"
    said = redacted(" ".join(str(error).replace(token, "…").split()))[:300]
    return f"{place} did not take the push ({said}); run the same command again, or correct HF_ENDPOINT"
