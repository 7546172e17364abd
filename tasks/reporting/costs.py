"""What a run really cost: the time of its steps and of its training as a whole, the capture of its targets, and bytes.

The capture's time is the engine's own, shard by shard, whoever captured them and in however many sessions; the start of
an engine is not in it. Other runs may have read the same targets: their capture is paid once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from storage.corpus.record_paths import store_name
from storage.errors import StoreError
from storage.files import uri
from storage.files.names import plain_name
from storage.runs.folder import RunFolder
from storage.runs.overview import RunTimes, came_from, run_times
from storage.stores.manifest import read_manifest
from storage.stores.schema import Manifest
from tasks.showing.formats import UNKNOWN, count, duration, size, speed

Costs = Mapping[str, Any]
"""As `costs_of` returns them."""


def costs_of(folder: RunFolder, finished: Mapping[str, Any] | None = None) -> Costs:
    """What one run cost so far, as plain data. What is not recorded (by older versions) is None.

    `training_seconds`, `training_tokens`, `tokens_per_second` are of the optimizer steps alone, `wall_seconds` of
    training as a whole, on `device`; `planned_tokens` is what the configuration asks for. `capture` has `seconds`,
    `positions`, `tokens_per_second`, `bytes` and `device` of all targets that the run reads.

    Args:
        finished: the run's summary where it is not stored yet.

    Raises:
        StoreDamagedError, FormatVersionError: identity, configuration or summary are not what was written.
    """
    summary = finished if finished is not None else folder.summary()
    try:
        times = run_times(folder, summary)
    except StoreError:  # a report is made all the same; `ddk verify` says which measurements are damaged
        times = RunTimes()
    return {
        "training_seconds": times.training_seconds,
        "training_tokens": times.training_tokens,
        "tokens_per_second": times.tokens_per_second,
        "wall_seconds": times.wall_seconds,
        "device": times.device,
        "planned_tokens": _planned(folder.config() or {}, came_from(folder.identity())),
        "capture": _capture(list(_targets(folder))),
    }


def _planned(config: Mapping[str, Any], origin: tuple[str, int | None] | None) -> int | None:
    done = 0 if origin is None else origin[1] or 0
    try:
        return int((config["train"]["steps"] - done) * config["train"]["batch_size"] * config["packing"]["seq_len"])
    except (KeyError, TypeError):
        return None


def _targets(folder: RunFolder) -> Iterator[Manifest]:
    """Of the run's complete stores; one that is gone or damaged is left out."""
    root, stores = folder.url.rpartition("/runs/")[0], (folder.identity() or {}).get("stores", {})
    for domain, of in stores.items():
        if not isinstance(of, Mapping) or "targets" not in of:
            continue
        name = plain_name(of["targets"], f"identity.json of run '{folder.name}'")
        try:
            manifest = read_manifest(uri.join(root, "targets", name, store_name(domain)))
        except StoreError:  # `ddk verify` says what is wrong with it
            continue
        if manifest is not None and manifest.complete:
            yield manifest


def _capture(manifests: list[Manifest]) -> dict[str, Any] | None:
    if not manifests:
        return None
    shards = [shard for one in manifests for part in one.splits.values() for shard in part.shards]
    seconds = [shard.facts.get("seconds") for shard in shards]
    known = [float(one) for one in seconds if isinstance(one, int | float)]
    took = sum(known) if len(known) == len(seconds) else None
    positions = sum(part.blocks * one.dims["seq_len"] for one in manifests for part in one.splits.values())
    devices = dict.fromkeys(str(one.facts["device"]) for one in manifests if "device" in one.facts)
    return {
        "seconds": None if took is None else round(took, 3),
        "positions": positions,
        "tokens_per_second": positions / took if took else None,
        "bytes": sum(stored.bytes for shard in shards for stored in shard.objects.values()),
        "device": "; ".join(devices) or None,
    }


def cost_lines(costs: Costs) -> list[tuple[str, str]]:
    """What and how much, for a reader; what is not known is left out.

    ('Optimizer steps took', '1 min 55 s at 8,574 tokens/s'), ('Training in all', '4 min 10 s on CPU, 2 cores'), …
    """
    lines: list[tuple[str, str]] = []
    if costs.get("training_seconds"):
        lines.append(
            ("Optimizer steps took", f"{duration(costs['training_seconds'])}, {_speed(costs['tokens_per_second'])}")
        )
    if costs.get("wall_seconds") is not None:
        on = f" on {costs['device']}" if costs.get("device") else ""
        lines.append(("Training in all", f"{duration(costs['wall_seconds'])}{on}"))
    if costs.get("training_tokens") is not None and costs.get("planned_tokens"):
        lines.append(
            ("Tokens trained on", f"{count(costs['training_tokens'])} of {count(costs['planned_tokens'])} planned")
        )
    capture = costs.get("capture")
    if capture is not None:
        if capture["seconds"] is not None:
            on = f" on {capture['device']}" if capture["device"] else ""
            took = f"{duration(capture['seconds'])}, {_speed(capture['tokens_per_second'])}{on}"
            lines.append(("Capture took", took))
        lines.append(("Targets", f"{size(capture['bytes'])}, {count(capture['positions'])} positions"))
    return lines


def _speed(tokens_per_second: float | None) -> str:
    return UNKNOWN if tokens_per_second is None else f"{speed(tokens_per_second)} tokens/s"
