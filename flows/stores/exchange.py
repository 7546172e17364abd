"""Exporting and importing caches: `ddk export` and `ddk import`.

An export is a folder of Parquet files with a card, as the Hugging Face hub shows it. An import is an ordinary domain
of a configuration whose `targets` are 'topk' or 'distillkit': `pack` and `cache` for these domains alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import yaml
from prefect import flow

from ddk.errors import UserError
from ddk.packing import PackingConfig
from ddk.values import SPLITS, Split
from flows.config import Config
from flows.stages import cache_teacher, pack_corpus
from storage.blocks import open_blocks
from storage.corpus.domain import DomainConfig
from storage.corpus.record_paths import domain_of
from storage.exchange.distillkit import CompressionConfig, documented
from storage.exchange.export import export_split
from storage.exchange.foreign import COMPRESSION_FILE, read_compression
from storage.files import uri
from storage.files.names import plain_name
from storage.stores.generations import newest_complete
from storage.stores.schema import Manifest
from storage.targets import open_targets
from tasks.showing.formats import escape
from tasks.showing.progress import meter
from tasks.teachers.config import TeacherConfig

Format = Literal["topk", "distillkit"]


@flow(name="import-targets", persist_result=False)
def import_caches(
    root: str,
    domains: dict[str, DomainConfig],
    teacher: TeacherConfig,
    packing: PackingConfig,
    storage_block: str | None = None,
) -> list[dict[str, Any]]:
    """Rows with a teacher's predictions → token blocks and targets; no engine is started.

    Args:
        domains: imported ones alone; see `imported_only`.

    Returns:
        What `tasks.capture.import_targets.import_targets` says of each domain.
    """
    pack_corpus(root, domains, teacher, packing, storage_block)
    done: list[dict[str, Any]] = cache_teacher(root, domains, teacher, packing, storage_block)
    return done


def imported_only(config: Config, names: Sequence[str] = ()) -> Config:
    """The configuration with only its imported domains or, if names are given, only the named ones of these.

    Raises:
        UserError: there is none, or a name is of another domain.
    """
    imported = {name: domain for name, domain in config.domains.items() if domain.imported}
    if unknown := [name for name in names if name not in imported]:
        raise UserError(
            f"'{unknown[0]}' is not a domain with targets: topk or distillkit; those are "
            f"{', '.join(imported) or '(none)'}"
        )
    chosen = {name: domain for name, domain in imported.items() if name in (names or imported)}
    if not chosen:
        raise UserError(
            "no domain's files hold a teacher's predictions; set domains.<domain>.targets: topk (or distillkit), or "
            "capture a teacher's with `ddk cache`"
        )
    return config.model_copy(update={"domains": chosen})


def export_targets(
    url: str, folder: str, *, row_format: str, config: str, split: str, say: Callable[[str], None]
) -> None:
    """Write one split of a targets store as Parquet files, with a card; an interrupted export is resumed.

    Args:
        url: of the targets store; the blocks store is found from its manifest.
        folder: any URL; created where it is not there.
        config: with 'distillkit', `k50`, `k128` or the URL of a compression_config.yaml.

    Raises:
        UserError: no such store, the configuration does not fit it, or the folder holds something else.
    """
    for option, value, allowed in (("format", row_format, _COLUMNS), ("split", split, SPLITS)):
        if value not in allowed:
            raise UserError(f"--{option} takes {' or '.join(allowed)}, not '{value}'")
    row_format, split = cast(Format, row_format), cast(Split, split)
    targets = open_targets(url, split)
    manifest = targets.manifest
    blocks = open_blocks(_blocks_url(url, manifest), split)
    compression = _compression(config, manifest) if row_format == "distillkit" else None
    described = compression.model_dump(mode="json") if compression is not None else None
    source = {"targets": manifest.fingerprint, "format": row_format, "compression": described}
    with meter("export", len(targets), "rows") as progress:
        files = export_split(
            targets, blocks, folder, split, compression=compression, source=source, on_rows=progress.advance
        )
    if described is not None:
        uri.write_bytes(uri.join(folder, COMPRESSION_FILE), yaml.safe_dump(described, sort_keys=False).encode())
    card = _card(url, folder, row_format, manifest, compression)
    uri.write_bytes(uri.join(folder, "README.md"), card.encode())
    say(f"{split}: {len(targets):,} rows of {targets.seq_len + 1} tokens in {files} files  {folder}")


def _blocks_url(url: str, manifest: Manifest) -> str:
    root, found, name = url.rstrip("/").rpartition("/targets/")
    if not found or "blocks" not in manifest.inputs:
        raise UserError(f"{url} is not <root>/targets/<fingerprint>/<domain>.zarr; its blocks cannot be found from it")
    folder = plain_name(manifest.inputs["blocks"], uri.join(url, "manifest.json"))
    return newest_complete(uri.join(root, "blocks", folder, name.rpartition("/")[2]))


def _compression(config: str, manifest: Manifest) -> CompressionConfig:
    vocab_size, k = manifest.dims["vocab_size"], manifest.dims["k"]
    described = None if config in _DOCUMENTED else read_compression(config)
    wanted = _DOCUMENTED.get(config) or (described.k if described is not None else None)
    if wanted is None:
        raise UserError(f"there is no {config}; --config takes k50, k128 or a {COMPRESSION_FILE}")
    if wanted > k:
        raise UserError(
            f"--config {config} has k {wanted}, and the store keeps {k} entries a position; give a {COMPRESSION_FILE} "
            f"with k up to {k}, or capture with teacher.k: {wanted}"
        )
    found = described or documented(cast(Literal["k50", "k128"], config), vocab_size)
    if found.d < vocab_size:
        raise UserError(f"--config {config} has d {found.d}, and the store a vocabulary of {vocab_size}; set d to that")
    return found


_DOCUMENTED = {"k50": 50, "k128": 128}

_COLUMNS: Mapping[Format, str] = {
    "topk": """| column | |
|---|---|
| `input_ids` | the block's tokens |
| `topk_ids`, `topk_logprobs` | for each position, the most probable tokens and their log-probabilities (natural log, \
temperature 1, full distribution), in descending order |
| `tail_mass` | the probability outside them |
| `true_logprobs` | the log-probability of the token that comes next; NaN where it is not known |
""",
    "distillkit": """| column | |
|---|---|
| `input_ids` | the block's tokens |
| `compressed_logprobs`, `bytepacked_indices` | for each position, DistillKit's bytes, as `compression_config.yaml` \
says; the fit makes them approximate |
| `true_logprobs` | the exact log-probability of the token that comes next; NaN where it is not known (DistillKit \
does not read it) |

A position whose cache keeps fewer tokens than k is filled up with others, each with an equal share of the mass outside.
""",
}


def _card(url: str, folder: str, row_format: Format, manifest: Manifest, compression: CompressionConfig | None) -> str:
    names = uri.list_names(folder)
    splits = [split for split in SPLITS if any(n.startswith(f"{split}-") and n.endswith(".parquet") for n in names)]
    front = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.parquet"} for split in splits],
            }
        ],
        "tags": ["knowledge-distillation"],
    }
    teacher = manifest.inputs.get("teacher", {})
    facts = {
        "domain": domain_of(url.rstrip("/").rpartition("/")[2]),
        "tokens in a row": manifest.dims["seq_len"] + 1,
        "entries a position": compression.k if compression is not None else f"up to {manifest.dims['k']}",
        "vocabulary": manifest.dims["vocab_size"],
        "targets": manifest.fingerprint,
        **{f"teacher's {name}": value for name, value in teacher.items() if isinstance(value, str | int)},
        **{f"sha256 of {name}": value for name, value in teacher.get("weights", {}).items()},
    }
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
            "# A teacher's predictions, cached\n",
            f"Exported by `ddk export`, format '{row_format}'. List j of a row predicts its token j + 1.\n",
            _COLUMNS[row_format],
            "| | |\n|---|---|",
            *(f"| {escape(str(name))} | {escape(str(value))} |" for name, value in facts.items()),
            "\nTo train from it with `ddk`, name these files as a domain's `train` (and `validation`) and set "
            f"`targets: {row_format}`.\n",
        ]
    )
