"""`ddk clean`: removes what of a root no configuration, run, comparison, law or selection needs.

What is needed is read from manifests and identities (`storage.cleaning`), and from the plans of the configurations that
are given: their stores are kept where no run has been trained on them yet.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddk.errors import UserError
from storage.cleaning.inventory import Inventory, named_runs, take_inventory
from storage.cleaning.needs import Asked, Decision, StoreKey, decide
from storage.cleaning.parts import Part, Parts, parts_of
from storage.cleaning.removing import lives_of, remove_part
from storage.files.claims import PATIENCE, Watch
from storage.files.root import check_root
from storage.stores.layout import KINDS
from tasks.showing.formats import count, size
from tasks.showing.progress import logger

if TYPE_CHECKING:
    from flows.config import Config

OLDER = "7d"
"""Age from which on something is removed, where none is given."""
_SHORTEST = 3600.0
"""Seconds: stages that run write more often than this."""
_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What would be removed, and what is said of the rest."""

    root: str
    before: float
    """Unix time; only what is older is removed."""
    older: str
    parts: Parts
    decision: Decision
    watch: Watch

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts.removable)


def age(text: str) -> float:
    """'30d' → 2592000.0 seconds.

    Raises:
        UserError: it is no age, or below an hour.
    """
    match = re.fullmatch(r"(\d{1,6})([mhdw])", text.strip())
    if match is None:
        raise UserError(f"--older takes a number and m, h, d or w (12h, 30d, 4w), not '{text[:40]}'")
    seconds = int(match[1]) * _UNITS[match[2]]
    if seconds < _SHORTEST:
        raise UserError(f"--older is {text}, and what is younger than an hour may still be written; give 1h or more")
    return seconds


def list_unneeded(
    root: str,
    configs: Sequence[Config] = (),
    *,
    older: str = OLDER,
    keep_runs: Sequence[str] = (),
    remove_runs: Sequence[str] = (),
    say: Callable[[str], None] = logger.info,
) -> Listed:
    """Find what could be removed; changes nothing.

    Args:
        configs: whose stores and runs are needed.
        say: hears what takes long.

    Raises:
        UserError: the root is none, or a configuration's stores cannot be planned.
    """
    check_root(root)
    before = time.time() - age(older)
    asked = Asked(
        stores=frozenset(key for config in configs for key in _stores_of(config)),
        runs=frozenset(run for config in configs for run in named_runs(config.model_dump(mode="json"))),
        keep_runs=tuple(keep_runs),
        remove_runs=tuple(remove_runs),
    )
    inventory = take_inventory(root)
    if not (inventory.stores or inventory.runs or inventory.without_manifest):
        raise UserError(f"there is no store and no run below {root}; correct the root")
    decision = decide(inventory.contents, asked)
    watch = Watch()
    lives = lives_of(root, _claimed(inventory), watch)
    if "unknown" in lives.values():
        say(f"claims of other machines: looking for {PATIENCE:.0f} s whether their owners live")
        time.sleep(PATIENCE)
        lives = lives_of(root, list(lives), watch)
    return Listed(
        root=root,
        before=before,
        older=older,
        parts=parts_of(inventory, decision, lives, before),
        decision=decision,
        watch=watch,
    )


def _claimed(inventory: Inventory) -> list[str]:
    """Stores and runs with claims, by their folder below the root."""
    places = {
        key.path: files for found in (inventory.stores, inventory.without_manifest) for key, files in found.items()
    }
    places |= {f"runs/{name}": files for name, files in inventory.runs.items()}
    return [place for place, files in places.items() if any(file.path.startswith(f"{place}/claims/") for file in files)]


def _stores_of(config: Config) -> list[StoreKey]:
    from tasks.planning.selection_plan import plan_selections  # these import transformers
    from tasks.planning.store_plan import plan_stores

    plan = plan_stores(config.root, config.domains, config.packing, config.teacher, student=config.student)
    urls = [url for pair in plan.urls.values() for url in pair]
    for one in plan_selections(config.root, plan, config.student).values():
        urls += [one.scores_url, one.selection_url]
    parts = [url.rsplit("/", 3)[1:] for url in urls]
    return [StoreKey(kind, folder, name) for place, folder, name in parts for kind in KINDS if kind == place]


def remove_listed(listed: Listed, say: Callable[[str], None] = logger.info) -> int:
    """Remove what was listed; what has been written to or claimed since stays, and is named.

    Returns:
        Bytes that were freed.
    """
    freed = 0
    for part in listed.parts.removable:
        found = remove_part(listed.root, part, listed.before, listed.watch)
        if found is None:
            say(f"stays     {part.path}: it was written to, or somebody is at work there")
        freed += found or 0
    return freed


def lines_of(listed: Listed) -> list[str]:
    """What would be removed, a line each, and what is kept although nothing needs it."""
    parts, decision = listed.parts, listed.decision
    lines = [f"{size(part.bytes):>9}  {part.path}: {part.why}" for part in largest_first(parts.removable)]
    lines += [f"     kept  runs/{run}: {why}" for run, why in decision.held.items()]
    lines += [
        f"     kept  all stores and checkpoints, as what is needed is not known: {why}" for why in decision.blocked
    ]
    if parts.at_work:
        lines.append(f"     kept  {_amount(parts.at_work)}: a stage may be at work there; clean again when it is done")
    if parts.young:
        lines.append(f"     kept  {_amount(parts.young)}: younger than {listed.older} (--older)")
    return lines


def largest_first(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: -part.bytes)


def _amount(parts: Sequence[Part]) -> str:
    return f"{count(len(parts))} {'thing' if len(parts) == 1 else 'things'}, {size(sum(one.bytes for one in parts))}"


def total(listed: Listed) -> str:
    """'12 things, 3.4 GB'."""
    return _amount(listed.parts.removable)
