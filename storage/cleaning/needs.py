"""What of a root is needed, and by whom: a pure decision from what its manifests and identities say.

    a run            is kept, unless it is to be removed; and even then where a configuration, a comparison, a law,
                     another run or a store of scores needs it
    a store          is needed by a run that is kept or a configuration, or by a store that is needed: targets need
                     their blocks, a selection its scores, scores their blocks
    a checkpoint     of a finished run is needed if it is the last one; if a run that is not finished began from it; or
                     if scores were measured with it

A store is named by the folder in which it lies, generation included (`3f2a.2`). Where one store needs another, only the
inputs are known, `3f2a`: then the first generation and the newest complete one are meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from storage.files.names import matches
from storage.stores.layout import Kind


@dataclass(frozen=True, slots=True, order=True)
class StoreKey:
    """Where a store lies below its root."""

    kind: Kind
    folder: str
    """Fingerprint, and from the second generation on its number: '3f2a.2'."""
    name: str
    """'math.zarr'."""

    @property
    def path(self) -> str:
        return f"{self.kind}/{self.folder}/{self.name}"

    @property
    def first(self) -> StoreKey:
        """Of the first generation."""
        return StoreKey(self.kind, self.folder.partition(".")[0], self.name)

    @property
    def number(self) -> int:
        """Of its generation, from 1."""
        return int(self.folder.partition(".")[2] or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreFacts:
    """What one store's manifest says."""

    complete: bool = True
    needs: tuple[StoreKey, ...] = ()
    """Those that it was made of, by their first generation."""
    scored_by: str | None = None
    """Fingerprint of the identity of the run with whose checkpoints it was measured."""
    unreadable: str | None = None
    """Why its manifest cannot be read; what it needs is then not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What one run's identity, configuration and folder say."""

    finished: bool = True
    identity: str | None = None
    """Fingerprint of its identity."""
    stores: tuple[StoreKey, ...] = ()
    runs: tuple[str, ...] = ()
    """Other runs that its configuration names."""
    began_from: tuple[str, int | None] | None = None
    checkpoints: tuple[int, ...] = ()
    """Steps of those that count, ascending."""
    unreadable: str | None = None
    """Why it cannot be read; what it needs is then not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is in a root."""

    stores: Mapping[StoreKey, StoreFacts] = field(default_factory=dict)
    runs: Mapping[str, RunFacts] = field(default_factory=dict)
    reports: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The runs of each comparison and law, by the report's place."""
    unreadable: tuple[str, ...] = ()
    """Why other things cannot be read that would say what they need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the person who cleans says."""

    stores: frozenset[StoreKey] = frozenset()
    """Of configurations."""
    runs: frozenset[str] = frozenset()
    """Likewise: their own, and those that they name."""
    keep_runs: tuple[str, ...] = ()
    """Patterns of runs that stay as they are, with all of their checkpoints."""
    remove_runs: tuple[str, ...] = ()
    """Patterns of runs that go where nothing else needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is not needed."""

    stores: frozenset[StoreKey]
    runs: frozenset[str]
    checkpoints: Mapping[str, tuple[int, ...]]
    """Steps by run; of runs that are kept."""
    held: Mapping[str, str]
    """Runs that were to be removed and stay, and what needs each."""
    blocked: tuple[str, ...]
    """Why what is needed cannot be known; nothing but the runs that were asked for is given up then."""


def decide(contents: Contents, asked: Asked) -> Decision:
    """What nothing needs any more."""
    going = {run for run in contents.runs if matches(run, asked.remove_runs) and not matches(run, asked.keep_runs)}
    closure = _Closure(contents, asked, going)
    closure.run()
    removed = frozenset(going - closure.runs.keys())
    blocked = [*contents.unreadable, *_unreadable(contents, closure)]
    return Decision(
        stores=frozenset() if blocked else frozenset(_unneeded_stores(contents, closure)),
        runs=removed,
        checkpoints={} if blocked else dict(_unneeded_checkpoints(contents, asked, closure)),
        held={run: closure.runs[run] for run in sorted(going & closure.runs.keys())},
        blocked=tuple(blocked),
    )


class _Closure:
    """Everything that is needed, from what is needed in the first place."""

    def __init__(self, contents: Contents, asked: Asked, going: set[str]) -> None:
        self._contents = contents
        self.runs: dict[str, str] = {run: "it is kept" for run in contents.runs if run not in going}
        """With what needs it."""
        self.runs |= dict.fromkeys(asked.runs, "a configuration names it")
        for report, names in contents.reports.items():
            self.runs |= {run: f"{report} shows it" for run in names if run not in self.runs}
        self.stores: set[StoreKey] = set()
        self.whole: set[str] = set()
        """Runs all of whose checkpoints are needed."""
        self._wanted = list(asked.stores)

    def run(self) -> None:
        seen: set[str] = set()
        while (runs := [run for run in self.runs if run not in seen]) or self._wanted:
            for run in runs:
                seen.add(run)
                self._of_run(run)
            while self._wanted:
                self._of_store(self._wanted.pop())

    def _of_run(self, name: str) -> None:
        facts = self._contents.runs.get(name)
        if facts is None:
            return
        self._wanted += facts.stores
        named = [*facts.runs, *([facts.began_from[0]] if facts.began_from and not facts.finished else [])]
        for other in named:
            self.runs.setdefault(other, f"run '{name}' needs it")

    def _of_store(self, key: StoreKey) -> None:
        facts = self._contents.stores.get(key)
        if facts is None or key in self.stores:
            return
        self.stores.add(key)
        for needed in facts.needs:
            self._wanted += generations_meant(needed, self._contents.stores)
        for name, run in self._contents.runs.items():
            if facts.scored_by is not None and run.identity == facts.scored_by:
                self.whole.add(name)
                self.runs.setdefault(name, f"{key.path} was measured with its checkpoints")


def generations_meant(first: StoreKey, stores: Mapping[StoreKey, StoreFacts]) -> Sequence[StoreKey]:
    """The stores that a name by inputs alone may mean: the first generation, and the newest complete one."""
    own = sorted((key for key in stores if key.first == first), key=lambda key: key.number)
    complete = [key for key in own if stores[key].complete]
    return [*(key for key in own[:1] if key.number == 1), *complete[-1:]]


def _unreadable(contents: Contents, closure: _Closure) -> Iterator[str]:
    for name in closure.runs:
        if (facts := contents.runs.get(name)) is not None and facts.unreadable is not None:
            yield facts.unreadable
    for key in sorted(closure.stores):
        if (why := contents.stores[key].unreadable) is not None:
            yield why


def _unneeded_stores(contents: Contents, closure: _Closure) -> Iterator[StoreKey]:
    # Of one that cannot be read nobody can say what it is: `ddk verify` names it.
    return (key for key, of in contents.stores.items() if key not in closure.stores and of.unreadable is None)


def _unneeded_checkpoints(contents: Contents, asked: Asked, closure: _Closure) -> Iterator[tuple[str, tuple[int, ...]]]:
    origins = {facts.began_from for facts in contents.runs.values() if facts.began_from and not facts.finished}
    for name in closure.runs:
        facts = contents.runs.get(name)
        if facts is None or not facts.finished or name in closure.whole or matches(name, asked.keep_runs):
            continue
        if (name, None) in origins:
            continue
        steps = tuple(step for step in facts.checkpoints[:-1] if (name, step) not in origins)
        if steps:
            yield name, steps
