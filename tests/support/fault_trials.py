"""Faults in a root, one at a time: does `ddk verify` find it, does the reader stop, or does a number change silently?

A trial changes one file (or exchanges two, or two folders) the way a disk, a copy or a hand does, looks what
`ddk verify` says and what reading everything gives, and puts all back. What a reader gets is compared with what it got
before the fault: `same` (the fault touches nothing that is read, or what was lost is made again), `stopped` (one
line that names a place below the root), or another content, which is `silent`: never to be.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddk.errors import UserError
from ddk.values import SPLITS
from flows.stores.verify import verify_all
from storage.blocks import open_blocks
from storage.files.digests import DigestCache
from storage.runs.checkpoints import CheckpointFolder
from storage.runs.evaluations import EvaluationFolder
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from storage.runs.reports import ComparisonFolder
from storage.targets import open_targets, teacher_perplexity

Fault = Callable[[random.Random, Path, list[Path]], str | None]
"""Changes a file, and says how; None where this cannot be done to it. The list has all files of its kind."""
KINDS: tuple[tuple[str, str], ...] = (
    ("manifest", "*/*.zarr/manifest.json"),
    ("copy of a manifest", "*/*.zarr/copy/manifest.json"),
    ("Zarr's metadata", "**/zarr.json"),
    ("shard of blocks", "blocks/**/c/**"),
    ("shard of targets", "targets/**/c/**"),
    ("identity", "runs/*/identity.json"),
    ("configuration", "runs/*/config.json"),
    ("mixture", "runs/*/mixtures/*.json"),
    ("checkpoint's state", "runs/*/checkpoints/*/state.json"),
    ("checkpoint's tensors", "runs/*/checkpoints/*/*.safetensors"),
    ("metrics", "runs/*/metrics/*.json"),
    ("TensorBoard's curves", "runs/*/tensorboard/*"),
    ("student", "runs/*/student/**"),
    ("report", "runs/*/report/*"),
    ("list of files", "runs/*/*.json"),
    ("summary", "runs/*/summary.json"),
    ("evaluation", "runs/*/evaluations/**"),
    ("comparison", "comparisons/**"),
    ("memory of digests", "digests.json"),
)


def kind_of(path: Path, root: Path) -> str | None:
    """What a file is; None of what belongs to nobody's numbers (claims)."""
    below = path.relative_to(root)
    if below.parts[0] in ("blocks", "targets") and below.name == "manifest.json":
        return "copy of a manifest" if below.parent.name == "copy" else "manifest"
    if below.parts[0] == "runs" and len(below.parts) == 3:
        names = {"identity.json": "identity", "config.json": "configuration", "summary.json": "summary"}
        return names.get(below.name, "list of files")
    for kind, pattern in KINDS:
        if kind not in ("manifest", "copy of a manifest", "list of files") and _matches(below, pattern):
            return kind
    return None


def _matches(path: Path, pattern: str) -> bool:
    parts, wanted = list(path.parts), pattern.split("/")
    if "**" not in wanted:
        return len(parts) == len(wanted) and all(map(_part_matches, parts, wanted))
    before, after = wanted[: wanted.index("**")], wanted[wanted.index("**") + 1 :]
    if not all(map(_part_matches, parts, before)):
        return False
    rest = parts[len(before) :]
    if "c" in after:
        return "c" in rest and rest[-1] != "zarr.json"
    return not after or after == ["**"] or _part_matches(rest[-1], after[-1])


def _part_matches(part: str, wanted: str) -> bool:
    return Path(part).match(wanted)


# Faults


def _put(path: Path, content: bytes | bytearray) -> None:
    """As another file of this name: what was there may be linked from the copy that is kept."""
    path.unlink()
    path.write_bytes(content)


def flip(rng: random.Random, path: Path, _: list[Path]) -> str | None:
    """One bit."""
    content = bytearray(path.read_bytes())
    if not content:
        return None
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    _put(path, content)
    return f"bit flipped at {place}"


def digit(rng: random.Random, path: Path, _: list[Path]) -> str | None:
    """One digit becomes another, in text."""
    content = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
    if not places or path.suffix not in (".json", ".csv", ".jsonl", ".md", ".html"):
        return None
    place = rng.choice(places)
    content[place] = rng.choice([byte for byte in range(48, 58) if byte != content[place]])
    _put(path, content)
    return f"digit at {place}"


def cut(rng: random.Random, path: Path, _: list[Path]) -> str | None:
    """The end is gone."""
    content = path.read_bytes()
    if not content:
        return None
    _put(path, content[: rng.randrange(len(content))])
    return "cut"


def swap(rng: random.Random, path: Path, _: list[Path]) -> str | None:
    """Two pieces of eight bytes change places."""
    content = bytearray(path.read_bytes())
    if len(content) < 32:
        return None
    first, second = (8 * place for place in rng.sample(range(len(content) // 8), 2))
    one, two = content[first : first + 8], content[second : second + 8]
    if one == two:
        return None
    content[first : first + 8], content[second : second + 8] = two, one
    _put(path, content)
    return f"swapped {first} and {second}"


def delete(_: random.Random, path: Path, __: list[Path]) -> str | None:
    """No such file."""
    path.unlink()
    return "deleted"


def zero(rng: random.Random, path: Path, _: list[Path]) -> str | None:
    """A stretch of zeros, as a file system leaves after a crash."""
    content = bytearray(path.read_bytes())
    if not content:
        return None
    first = rng.randrange(len(content))
    last = min(len(content), first + rng.choice([1, 16, 4096]))
    if not any(content[first:last]):
        return None
    content[first:last] = bytes(last - first)
    _put(path, content)
    return f"zeros from {first} to {last}"


def exchange(rng: random.Random, path: Path, alike: list[Path]) -> str | None:
    """Two intact files of one kind change places."""
    content = path.read_bytes()
    others = [other for other in alike if other != path and other.read_bytes() != content]
    if not others:
        return None
    other = rng.choice(others)
    _put(path, other.read_bytes())
    _put(other, content)
    return f"exchanged with {other}"


def exchange_folders(rng: random.Random, path: Path, alike: list[Path]) -> str | None:
    """Two whole folders change places: stores of two domains, checkpoints, runs."""
    others = [other.parent for other in alike if other.parent.name != path.parent.name or _is_store(other.parent)]
    others = [other for other in others if other != path.parent and path.parent not in other.parents]
    if not others or path.name not in ("manifest.json", "state.json", "identity.json") or path.parent.name == "copy":
        return None
    other, aside = rng.choice(others), path.parent.with_name("aside.tmp")
    path.parent.rename(aside)
    other.rename(path.parent)
    aside.rename(other)
    return f"folder exchanged with {other}"


def _is_store(folder: Path) -> bool:
    return folder.suffix == ".zarr"


FAULTS: tuple[Fault, ...] = (flip, digit, cut, swap, delete, zero, exchange, exchange_folders)


# Reading


def read_all(root: Path, corpus: Path) -> dict[str, Any]:
    """All that the pipeline reads of a root, piece by piece: the piece's name, and what it holds or why not."""
    return {name: _attempt(read) for name, read in _pieces(root, corpus)}


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (UserError, FileNotFoundError) as error:
        return error
    except Exception as error:  # a traceback for the user
        return RuntimeError(f"{type(error).__name__}: {error}")


def _pieces(root: Path, corpus: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    for kind in ("blocks", "targets"):
        for folder in sorted((root / kind).glob("*/*.zarr")):
            name = str(folder.relative_to(root))
            yield name, lambda folder=str(folder), kind=kind: _store(folder, kind)
    for run in sorted(path.name for path in (root / "runs").iterdir()):
        folder = RunFolder(str(root), run)
        yield f"{run} identity", folder.identity
        yield f"{run} configuration", folder.config
        yield f"{run} mixtures", lambda folder=folder: MixtureHistory(folder.url).whole(folder.summary())
        yield f"{run} metrics", folder.metrics
        yield f"{run} summary", folder.summary
        yield f"{run} student", lambda folder=folder: _student(folder)
        yield f"{run} checkpoint", lambda folder=folder: _checkpoints(folder.url)
        yield f"{run} evaluations", EvaluationFolder(str(root), run).records
        yield f"{run} answers", lambda run=run: _answers(EvaluationFolder(str(root), run))
    for comparison in sorted(path.name for path in (root / "comparisons").glob("*")):
        yield f"comparison {comparison}", ComparisonFolder(str(root), comparison).data
    yield "digests", lambda: DigestCache(str(root / "digests.json")).get(str(corpus))


def _store(url: str, kind: str) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        view: Any = open_blocks(url, split) if kind == "blocks" else open_targets(url, split)
        chosen = np.arange(len(view))
        if kind == "blocks":
            digest.update(view.read(chosen).tobytes())
        else:
            targets = view.read(chosen)
            for array in (targets.ids, targets.logprobs, targets.tail_mass, targets.true_logprobs):
                digest.update(np.ascontiguousarray(array).tobytes())
    if kind == "targets":
        digest.update(np.float64(teacher_perplexity(url)).tobytes())
    return digest.hexdigest()


def _student(folder: RunFolder) -> Any:
    """As a run that is complete already looks at it, and then who loads the model."""
    if folder.summary() is None:
        return None
    if faults := folder.student_faults():
        return UserError(faults[0])  # it is saved again from its checkpoint
    return {name: _content(Path(folder.student_url) / name) for name in folder.student_listing.read() or {}}


def _answers(folder: EvaluationFolder) -> Any:
    found = [(record["model"], name) for record in folder.records() for name in [record.get("name", "")] if name]
    return [folder.samples(model, name) for model, name in found]


def _checkpoints(url: str) -> dict[int, Any]:
    checkpoints, found = CheckpointFolder(url), {}
    for step in checkpoints.steps():
        with checkpoints.folder(step) as folder:
            tensors = {path.name: _content(path) for path in sorted(Path(folder).glob("*.safetensors"))}
        found[step] = (checkpoints.state(step), tensors)
    return found


def _content(path: Path) -> int:
    """What tells a fault's content from the one before; megabytes of it, hundreds of times."""
    return zlib.crc32(path.read_bytes())


# Trials


@dataclass
class Tally:
    """What became of the trials of one kind of file."""

    trials: int = 0
    found: int = 0
    """By `ddk verify`."""
    stopped: int = 0
    """By who reads."""
    made_again: int = 0
    """Neither needs to: what was lost is made again, the same."""
    silent: int = 0
    """Another content was read without a word, or nobody noticed a change at all."""
    examples: list[str] = field(default_factory=list)


def run_trials(root: Path, corpus: Path, *, seed: int, trials: int) -> dict[str, Tally]:
    """So many faults, spread evenly over the kinds of files that the root holds.

    Args:
        root: is left as it was.
        corpus: a file whose digest the root remembers.
    """
    rng = random.Random(seed)
    files: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if (kind := kind_of(path, root)) is not None:
            files.setdefault(kind, []).append(path)
    before = read_all(root, corpus)
    wrong = {name: error for name, error in before.items() if isinstance(error, Exception)}
    said: list[str] = []
    if not verify_all(str(root), full=True, repair=False, say=said.append) or wrong:
        raise AssertionError(f"the root is not sound to begin with: {wrong}, {said}")
    tallies = {kind: Tally() for kind in sorted(files)}
    while sum(tally.trials for tally in tallies.values()) < trials:
        kind = min(tallies, key=lambda one: tallies[one].trials)
        _trial(rng, root, corpus, kind, files[kind], before, tallies[kind])
    return tallies


def _trial(
    rng: random.Random,
    root: Path,
    corpus: Path,
    kind: str,
    alike: list[Path],
    before: dict[str, Any],
    tally: Tally,
) -> None:
    path, how = alike[0], None
    kept = root.with_name(f"{root.name}.kept")
    if kept.exists():
        shutil.rmtree(kept)
    shutil.copytree(root, kept, copy_function=_link)
    try:
        while how is None:
            path, fault = rng.choice(alike), rng.choice(FAULTS)
            how = fault(rng, path, alike)
        what = f"{path.relative_to(root)}: {how}"
        _judge(root, corpus, what, before, tally)
    finally:
        shutil.rmtree(root)
        kept.rename(root)


def _judge(root: Path, corpus: Path, what: str, before: dict[str, Any], tally: Tally) -> None:
    tally.trials += 1
    said: list[str] = []
    found = not verify_all(str(root), full=True, repair=False, say=said.append)
    after = read_all(root, corpus)
    changed = {name for name in before.keys() | after.keys() if after.get(name) != before.get(name)}
    stopped = {name for name in changed if isinstance(after.get(name), Exception)}
    crashed = [after[name] for name in stopped if isinstance(after[name], RuntimeError)]
    remade = {name for name in changed - stopped if _is_made_again(name, before.get(name), after.get(name))}
    silent = changed - stopped - remade
    tally.found += found
    tally.stopped += bool(stopped)
    tally.made_again += bool(remade) and not stopped
    if silent or crashed or not (found or stopped or remade or _is_harmless(what)):
        tally.silent += 1
        tally.examples.append(f"{what}: {crashed or sorted(silent) or 'nobody noticed'}")
    lines = [line for line in said if "sound" not in line or "no sound" in line]
    if found and not any(str(root) in line for line in lines):
        tally.silent += 1
        tally.examples.append(f"{what}: verify names no file: {said}")


def _is_made_again(name: str, before: Any, after: Any) -> bool:
    """A checkpoint that no longer counts, a store or a summary that is missing: the stage makes it again, the same."""
    if after is None:
        return True
    if name.endswith(" checkpoint"):
        return all(before.get(step) == state for step, state in after.items())
    if name.endswith((" evaluations", " answers")):
        return all(record in before for record in after)  # `ddk eval` asks again what is not there
    return False


def _is_harmless(what: str) -> bool:
    """The memory of digests is no more than that: without it the files are hashed again."""
    return what == "digests.json: deleted"


def _link(source: str, target: str) -> None:
    os.link(source, target)


def table(tallies: dict[str, Tally]) -> str:
    """The trials by kind of file; the last column must hold nothing but zeros."""
    header = ("kind of file", "trials", "found by verify", "stopped by the reader", "made again", "silently accepted")
    rows = [
        (kind, *map(str, (one.trials, one.found, one.stopped, one.made_again, one.silent)))
        for kind, one in tallies.items()
    ]
    numbers = Counter[str]()
    for one in tallies.values():
        numbers.update(trials=one.trials, found=one.found, stopped=one.stopped, again=one.made_again, silent=one.silent)
    rows.append(("all", *(str(numbers[name]) for name in ("trials", "found", "stopped", "again", "silent"))))
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(lines)
