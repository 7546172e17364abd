"""Reads the results of a comparison's runs from their folders, whether the runs are finished or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import transformers

from ddk.cost.shape import ModelShape, shape_of
from ddk.errors import UserError, first_line
from ddk.methods.registry import METHODS
from ddk.values import SPLITS
from storage.corpus.record_paths import store_name
from storage.files import uri
from storage.files.names import plain_name
from storage.runs.folder import RunFolder
from storage.runs.mixtures import MixtureHistory
from storage.stores.manifest import read_manifest
from storage.stores.schema import Manifest
from tasks.comparing.data import CapturedStore, ComparedRun, ComparedVariant, Comparison, Status
from tasks.planning.models import local_folder
from tasks.reporting.records import flat_settings
from tasks.reporting.run_summary import effective_settings
from tasks.showing.progress import logger

# What names a run or says how it goes, and not what it is.
_NOT_COMPARED = ("run", "root", "seed", "method", "storage_block", "train.keep_checkpoints", "train.log_every")


class Collector:
    """Reads the runs of one comparison.

    Args:
        root: where the runs and stores lie.
        failures: why a run failed, by its name.
    """

    def __init__(self, root: str, failures: Mapping[str, str]) -> None:
        self._root = root
        self._failures = failures
        self._shapes = cache(_shape)
        self.stores: dict[str, CapturedStore] = {}
        self.configs: dict[str, dict[str, str]] = {}
        """The flat settings of every run that has begun, by its name."""

    def run(self, variant: str, seed: int, name: str) -> ComparedRun:
        """One run, as its folder holds it."""
        common: dict[str, Any] = {"variant": variant, "seed": seed, "run": name}
        if (reason := self._failures.get(name)) is not None:
            return ComparedRun(status="failed", reason=reason, **common)
        folder = RunFolder(self._root, name)
        config, identity, summary = folder.config(), folder.identity(), folder.summary()
        if config is None or identity is None:
            return ComparedRun(status="missing", **common)
        self.configs[name] = dict(flat_settings(effective_settings(config)))
        status: Status = "unfinished" if summary is None else "complete"
        teacher, student = (
            self._shapes(config[section]["model"], config[section]["revision"]) for section in ("teacher", "student")
        )
        seq_len = config["packing"]["seq_len"]
        teacher_flops = None if teacher is None else teacher.forward_flops(seq_len)
        done = summary or {}
        return ComparedRun(
            status=status,
            stopped_early=done.get("stopped_early"),
            training_seconds=done.get("training_seconds"),
            seq_len=seq_len,
            records=tuple(MixtureHistory(folder.url).whole(summary)),
            student_flops=None if student is None else student.forward_flops(seq_len),
            teacher_flops=teacher_flops,
            teacher=_teacher_of(config),
            validation_positions=self._validation_positions(identity),
            stores=tuple(self._targets(identity, teacher_flops)),
            **common,
        )

    def _validation_positions(self, identity: Mapping[str, Any]) -> int | None:
        manifests = [self._manifest("blocks", domain, of["blocks"]) for domain, of in identity["stores"].items()]
        if None in manifests:
            return None
        return sum(one.positions("validation") for one in manifests if one is not None)

    def _targets(self, identity: Mapping[str, Any], teacher_flops: int | None) -> Iterable[str]:
        for domain, of in identity["stores"].items():
            place = uri.join("targets", of["targets"], store_name(domain))
            manifest = self._manifest("targets", domain, of["targets"])
            if manifest is None:
                continue
            self.stores[place] = CapturedStore(
                positions=sum(manifest.splits[split].blocks for split in SPLITS) * manifest.dims["seq_len"],
                captured="imported" not in manifest.inputs.get("teacher", {}),
                teacher_flops=teacher_flops,
            )
            yield place

    def _manifest(self, kind: str, domain: str, fingerprint: str) -> Manifest | None:
        folder = plain_name(fingerprint, f"identity.json of a run in {uri.join(self._root, 'runs')}")
        found = read_manifest(uri.join(self._root, kind, folder, store_name(domain)))
        return found if found is not None and found.complete else None


def collect(
    root: str,
    name: str,
    *,
    variants: Sequence[ComparedVariant],
    runs: Sequence[tuple[str, int, str]],
    baseline: str,
    failures: Mapping[str, str],
    left_out: Mapping[str, str],
    ended: Mapping[str, float] | None = None,
) -> Comparison:
    """A comparison as its runs' folders hold it now.

    Args:
        variants: their settings stand where no run of theirs has begun; else the runs' own do.
        runs: (variant, seed, name of the run) each, in the order of the report.
        failures: why a run failed, by its name; such a run's folder is not looked at.
        ended: Unix time at which each run ended, by its name, for a comparison over time.
    """
    collector = Collector(root, failures)
    found = [collector.run(variant, seed, run) for variant, seed, run in runs]
    found = [one.model_copy(update={"ended": (ended or {}).get(one.run)}) for one in found]
    common, own = _settings({run.run: collector.configs[run.run] for run in found if run.run in collector.configs})
    domains = dict.fromkeys(domain for run in found for record in run.records[:1] for domain in record.perplexities)
    return Comparison(
        name=name,
        baseline=baseline,
        seeds=tuple(dict.fromkeys(seed for _, seed, _ in runs)),
        domains=tuple(domains),
        variants=tuple(
            variant.model_copy(update={"settings": begun[0]})
            if (begun := [own[run.run] for run in found if run.variant == variant.name and run.run in own])
            else variant
            for variant in variants
        ),
        runs=tuple(found),
        stores=collector.stores,
        settings=common,
        left_out=dict(left_out),
        over_time=ended is not None,
    )


def _shape(model: str, revision: str | None) -> ModelShape | None:
    """None where it cannot be had from the config (a server's model without a config here, a model with code of its
    own): a report then says that the cost is not known."""
    try:
        folder = local_folder(model, revision, "model", weights=False)
        return shape_of(transformers.AutoConfig.from_pretrained(folder))
    except (UserError, OSError, ValueError, KeyError, AttributeError) as error:
        logger.info("the cost of %s is not known: %s", model, first_line(error))
        return None


def _teacher_of(config: Mapping[str, Any]) -> Literal["stored", "live", "unused"]:
    settings = effective_settings(config)
    if METHODS[config["method"]].needs_teacher:
        return "live"
    return "stored" if settings["loss"]["gamma"] > 0.0 else "unused"


def _settings(configs: Mapping[str, Mapping[str, str]]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """What all runs share, and for each what it does not share with all; by `section.field`."""
    fields = dict.fromkeys(field for config in configs.values() for field in config if field not in _NOT_COMPARED)
    values = {field: {config.get(field) for config in configs.values()} for field in fields}
    common = {
        field: value for field, found in values.items() if len(found) == 1 for value in found if value is not None
    }
    own = {
        run: {field: config[field] for field in fields if field in config and field not in common}
        for run, config in configs.items()
    }
    return common, own
