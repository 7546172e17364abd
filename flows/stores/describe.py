"""Describes a store or a run for `ddk inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ddk.errors import UserError
from ddk.values import SPLITS, worst_gap
from storage.runs.folder import RunFolder, run_at
from storage.runs.mixtures import MixtureHistory, MixtureRecord
from storage.stores.codec import PLAIN
from storage.stores.manifest import StoreWriter, read_manifest
from storage.stores.schema import Manifest
from storage.targets import distortion, teacher_perplexity
from tasks.reporting.ancestry import gone_on_from
from tasks.reporting.costs import cost_lines, costs_of
from tasks.reporting.overtraining import alarms_of, epoch_limit_of, said


def describe(url: str) -> Iterator[str]:
    """Lines about what lies at `url`.

    Raises:
        UserError: neither a store nor a run.
    """
    url = url.rstrip("/")
    manifest = read_manifest(url)
    if manifest is not None:
        yield from _store(url, manifest)
        return
    run = run_at(url)
    folder = RunFolder(*run) if run is not None else None
    config = folder.config() if folder is not None else None
    if folder is None or config is None:
        raise UserError(f"{url} is neither a store (<root>/blocks|targets/<fingerprint>/<domain>.zarr) nor a run")
    yield from _run(folder, config)


def _store(url: str, manifest: Manifest) -> Iterator[str]:
    yield f"{manifest.kind} {manifest.fingerprint}, format {manifest.format_version}, " + (
        "complete" if manifest.complete else "not finished"
    )
    yield "dims: " + ", ".join(f"{name} {value}" for name, value in manifest.dims.items())
    if not manifest.complete:
        writer = StoreWriter(url, manifest.kind, manifest.inputs, manifest.dims, manifest.targets)
        for split in SPLITS:
            yield f"{split}: {len(writer.committed(split))} shards committed"
        return
    for split in SPLITS:
        shards = manifest.splits[split].shards
        blocks = manifest.splits[split].blocks
        positions = blocks * manifest.dims["seq_len"]
        yield f"{split}: {blocks:,} blocks, {positions:,} positions, {len(shards)} shards"
        sizes = {
            name: sum(shard.objects[name].bytes for shard in shards) for name in (shards[0].objects if shards else ())
        }
        for name, size in sizes.items():
            yield f"  {name}: {size:,} bytes, {size / positions:.1f} a position"
        if len(sizes) > 1:
            yield f"  together: {sum(sizes.values()):,} bytes, {sum(sizes.values()) / positions:.1f} a position"
    if manifest.kind == "targets":
        yield from _targets(url, manifest)
    yield from _nested("inputs", manifest.inputs)


def _targets(url: str, manifest: Manifest) -> Iterator[str]:
    form = manifest.form or PLAIN
    yield f"codec {form.codec.name}" + (f", {form.codec.levels} levels" if form.codec.name == "compact" else "")
    for split in SPLITS:
        lost = distortion(manifest, split)
        if lost is not None:
            yield (
                f"  distortion of {split}: KL(captured ‖ stored) {lost.mean:.2e} nat on average, 99th percentile "
                f"{lost.percentile(99):.2e}, largest {lost.largest:.2e} ({lost.count:,} positions measured)"
            )
        elif form.codec.name == "exact":
            yield f"  distortion of {split}: none, float32 as captured"
    positions = sum(part.blocks for part in manifest.splits.values()) * manifest.dims["seq_len"]
    yield f"probability in the stored tokens: {1 - manifest.total('tail_mass_sum') / positions:.4%}"
    yield f"teacher perplexity on the validation blocks, all positions: {teacher_perplexity(url):.4f}"


def _run(folder: RunFolder, config: dict[str, Any]) -> Iterator[str]:
    summary = folder.summary()
    yield f"run {folder.name}, method {config['method']}, " + ("complete" if summary else "not finished")
    if source := gone_on_from(folder):
        yield source
    yield from (f"{what.lower()}: {much}" for what, much in cost_lines(costs_of(folder)))
    records = MixtureHistory(folder.url).records()
    raised = alarms_of(records, epoch_limit_of(config))
    for record in records:
        worst = worst_gap(record.gaps)
        mixture = ", ".join(f"{domain} {probability:.3f}" for domain, probability in record.probabilities.items())
        measured = f"worst ratio {worst.ratio:.3f} ({worst.domain})"
        yield f"version {record.version} at step {record.step}: {measured}; {mixture}"
        if record.train_blocks:
            yield "  " + "; ".join(_seen(record, domain, blocks) for domain, blocks in record.train_blocks.items())
        yield from (f"  seen too often: {said(alarm)}" for alarm in raised if alarm.step == record.step)
    yield from _nested("config", config)


def _seen(record: MixtureRecord, domain: str, blocks: int) -> str:
    """'math 4.8 epochs, held-out CE 5.1942, KL 1.1381'."""
    found = f"{domain} {record.blocks_drawn.get(domain, 0) / blocks:.1f} epochs"
    found += f", held-out CE {math.log(record.perplexities[domain].student):.4f}"
    kl = (record.kl or {}).get(domain)
    return found if kl is None else f"{found}, KL {kl:.4f}"


def _nested(name: str, value: Any, indent: int = 0) -> Iterator[str]:
    pad = "  " * indent
    if isinstance(value, dict):
        yield f"{pad}{name}:"
        for key, inner in value.items():
            yield from _nested(key, inner, indent + 1)
    else:
        yield f"{pad}{name}: {value}"
