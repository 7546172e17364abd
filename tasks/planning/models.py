"""Models as folders of files: finds the folders, and computes what goes into a fingerprint."""

from __future__ import annotations

import filecmp
import os
from typing import Any

import huggingface_hub

from ddk.errors import UserError, first_line
from storage.files.digests import DigestCache
from storage.files.names import plain_name
from storage.files.uri import read_json
from tasks.planning.tokenizer_files import FETCHED, has_tokenizer, tokenizer_files

_PROBE = (
    "  Hello, World!\n\tdef f(x): return x**2 + 3.14159  # naïve café\r\n你好，世界。 １２３ 😀 don't can't 10,000.50"
)
"""Text on which tokenizers part: spaces, line ends, digits, accents, full-width forms, contractions."""


def local_folder(model: str, revision: str | None, field: str, *, weights: bool = True) -> str:
    """The local folder of a model; one on the hub is fetched first (or found in the hub's cache).

    Args:
        field: of the configuration, for the error.
        weights: whether a model on the hub is fetched with its weights.

    Raises:
        UserError: no such folder, and no such model on the hub or no way to reach it.
    """
    if os.path.isdir(model):
        return model
    if os.path.isabs(model) or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"{field} is '{model}', and there is no such folder; correct the path")
    try:
        patterns = ["*.json", *FETCHED, *(["*.safetensors"] if weights else [])]
        return str(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:
        first = first_line(error)
        raise UserError(
            f"{field} is '{model}': no such folder, and it cannot be fetched from the hub ({first})"
        ) from error


def weight_digests(folder: str, digests: DigestCache, field: str) -> dict[str, str]:
    """sha256 of the model's config and of every weight file, by name.

    Raises:
        UserError: there are no safetensors weights, or their index names a file that is not in the folder's own.
    """
    names = sorted(name for name in os.listdir(folder) if name == "config.json" or name.endswith(".safetensors"))
    if "config.json" not in names or len(names) < 2:
        raise UserError(
            f"{field} is '{folder}', which lacks config.json or *.safetensors; other formats (pickles) are not read: "
            f"convert the model with save_pretrained"
        )
    _check_index(folder)
    return _digests(folder, names, digests)


def _check_index(folder: str) -> None:
    """That the files which an index of weights names lie in the folder: what is loaded is what was hashed."""
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".safetensors.index.json"):
            continue
        place = os.path.join(folder, name)
        content = read_json(place)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict):
            raise UserError(f"{place} is no index of weights (it has no weight_map); fetch the model again")
        for file in {repr(file): file for file in files.values()}.values():  # many tensors lie in one file
            plain_name(file, place)


def same_weights(one: str, other: str) -> bool:
    """Whether two folders hold the same weight files, whatever is in their configs."""
    found = [
        {name: os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors")}
        for folder in (one, other)
    ]
    if not found[0] or found[0].keys() != found[1].keys():
        return False
    pairs = [(path, found[1][name]) for name, path in found[0].items()]
    return all(os.path.getsize(a) == os.path.getsize(b) for a, b in pairs) and all(
        filecmp.cmp(a, b, shallow=False) for a, b in pairs
    )


def tokenizer_digests(folder: str, digests: DigestCache) -> dict[str, str]:
    """sha256 of the tokenizer's files, by name."""
    return _digests(folder, tokenizer_files(folder), digests)


def check_same_tokenizer(
    teacher_folder: str, student_folder: str, *, trust_teacher: bool = False, trust_student: bool = False
) -> None:
    """That both models read the same token ids.

    A student's folder without a tokenizer passes: the teacher's is used for it. So does one that adds tokens of its
    own to the teacher's: no target and no block holds them.

    Args:
        trust_teacher, trust_student: whether the folder may run code of its own.

    Raises:
        UserError: the vocabularies differ; an example is given.
    """
    if not has_tokenizer(student_folder):
        return
    from ddk.student import load_tokenizer  # transformers takes seconds, and a folder alone needs none of it

    tokenizers = [
        load_tokenizer(folder, trust_remote_code=trust)
        for folder, trust in ((teacher_folder, trust_teacher), (student_folder, trust_student))
    ]
    teacher, student = (dict(tokenizer.get_vocab()) for tokenizer in tokenizers)
    more = set(tokenizers[1].get_added_vocab()) - teacher.keys()
    taken = set(teacher.values())
    differing = sorted(
        token
        for token in {token for token, _ in teacher.items() ^ student.items()}
        if token not in more or student[token] in taken
    )
    if differing:
        token = differing[0]
        remedy = "choose models that share one"
        if not set(differing) - (set(tokenizers[0].get_added_vocab()) - student.keys()):
            remedy += (
                ", or remove the tokenizer's files from the student's folder if the student should learn the "
                "teacher's additional tokens (the teacher's tokenizer is then used)"
            )
        raise UserError(
            f"teacher and student have different tokenizers ({len(differing)} tokens differ, e.g. {token!r}: "
            f"{teacher.get(token)} and {student.get(token)}); targets are token ids, so {remedy}"
        )
    # Equal vocabularies may still be applied differently (merges, normalisation, splitting).
    first, second = (tokenizer(_PROBE, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers)
    if first != second:
        raise UserError(
            "teacher and student have the same vocabulary, and split text differently with it; targets are token ids, "
            "so choose models that share one tokenizer"
        )


def _digests(folder: str, names: list[str], digests: DigestCache) -> dict[str, Any]:
    paths = {name: os.path.join(os.path.abspath(folder), name) for name in names}
    found = digests.get_all(list(paths.values()))
    return {name: found[path] for name, path in paths.items()}
