"""The artifacts of a run and its stores in Prefect's UI; `tasks.showing.artifacts` describes how they get there.

    ddk-<root>-<run>-gap     table: the gap and the mixture after each measurement, a version each
    ddk-<root>-<run>-epochs  table: epochs, held-out cross-entropy and KL by domain, and which were seen too often
    ddk-<root>-<run>-report  page: before and after, both plots, where everything lies; replaced at each measurement
    ddk-<root>-targets       table: what was kept of the teacher, a row for each domain
    ddk-<root>-<run>-now     where the run stands: `tasks.reporting.now`

All of it is made from what is stored, by the same functions as the report's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ddk.values import worst_first, worst_gap
from storage.corpus.record_paths import store_name
from storage.files.uri import join, name_of
from storage.runs.folder import RunFolder
from storage.stores.schema import Manifest
from tasks.reporting.costs import cost_lines
from tasks.reporting.now import key_of, show_training
from tasks.reporting.overtraining import all_alarms, overtraining_rows, said, too_often
from tasks.reporting.page import data_uri
from tasks.reporting.plots import mixture_plot, ratio_plot
from tasks.reporting.records import IntervalRecord, RunSummary, gap_table, regressions
from tasks.reporting.run_summary import interval_records, summarise
from tasks.reporting.tree import overview
from tasks.showing.artifacts import Board, add_version, artifact_key, current_place, showing, table
from tasks.showing.formats import change, count, escape, gap_cells, link, markdown_table, percent, ppl, ratio


def publish_measurement(folder: RunFolder) -> None:
    """Show the newest record of a run's mixture history; to be called in a task, once for each record."""
    if current_place() is None:
        return
    with showing(f"the gap of run '{folder.name}'"):
        records = interval_records(folder)
        add_version(key_of(folder, "gap"), "table", table(measurement_rows(records)), measurement_line(records))
        if records[-1].train_blocks:
            key, seen = key_of(folder, "epochs"), escape(too_often(records)) or "No domain seen too often."
            add_version(key, "table", table(overtraining_rows(records)), f"step {count(records[-1].step)}: {seen}")
        summary = summarise(folder, records)
        publish_report(folder, summary, records, {})
        train = cast("Mapping[str, int]", summary.settings["train"])
        show_training(folder, records, train["steps"], measurement_line(records))


def publish_report(
    folder: RunFolder, summary: RunSummary, records: Sequence[IntervalRecord], urls: Mapping[str, str]
) -> None:
    """Show a run as it is now.

    Args:
        urls: of the report's files, by name; none where it is not written yet.
    """
    if current_place() is None:
        return
    with showing(f"the report of run '{folder.name}'"):
        board = Board(key_of(folder, "report"), "markdown")
        board.show(report_markdown(summary, records, {**urls, **places(folder)}), measurement_line(records))


def publish_targets(domain: str, url: str, manifest: Manifest, teacher_ppl: float, retained: float) -> None:
    """Add a domain's complete store of targets to the flow run's table of them."""
    row = targets_row(domain, url, manifest, teacher_ppl, retained)

    def with_row(shown: Any) -> str:
        rows = json.loads(shown) if shown else []
        return table(
            sorted([*(old for old in rows if old["domain"] != row["domain"]), row], key=lambda one: one["domain"])
        )

    root = url.rpartition("/targets/")[0]
    key = artifact_key(name_of(root), "targets")
    kept = f"what is kept of the teacher in the {manifest.dims['k']} stored tokens of a position"
    with showing(f"the targets of '{domain}'"):
        Board(key, "table").change(with_row, f"{kept}; stores below {link(root)}")


def measurement_rows(records: Sequence[IntervalRecord]) -> list[dict[str, str]]:
    """The newest measurement, a row a domain; the one that lags most comes first. Changes are from the one before."""
    now, before = records[-1], records[-2] if len(records) > 1 else None
    rows = []
    for gap in sorted(now.gaps, key=lambda gap: worst_first(gap.ratio)):
        probability = now.mixture.probabilities[gap.domain]
        old_ratio = before.gap(gap.domain).ratio if before else None
        old_probability = before.mixture.probabilities[gap.domain] if before else None
        rows.append(
            {
                "domain": escape(gap.domain),
                "student ppl": ppl(gap.student_ppl),
                "teacher ppl": ppl(gap.teacher_ppl),
                "ratio": ratio(gap.ratio),
                "ratio change": change(gap.ratio - old_ratio if old_ratio is not None else None, 3),
                "next probability": f"{probability:.4f}",
                "probability change": change(probability - old_probability if old_probability is not None else None),
            }
        )
    return rows


def measurement_line(records: Sequence[IntervalRecord]) -> str:
    """'step 6, 4,608 tokens: largest ratio 4.540 (math)'."""
    now = records[-1]
    worst = worst_gap(now.gaps)
    so_far = f"step {count(now.step)}, {count(now.tokens_seen)} tokens"
    return f"{so_far}: largest ratio {ratio(worst.ratio)} ({escape(worst.domain)})"


def targets_row(domain: str, url: str, manifest: Manifest, teacher_ppl: float, retained: float) -> dict[str, str]:
    parts = manifest.splits.values()
    positions = sum(part.blocks for part in parts) * manifest.dims["seq_len"]
    size = sum(stored.bytes for part in parts for shard in part.shards for stored in shard.objects.values())
    return {
        "domain": escape(domain),
        "retained mass": percent(retained, 2),
        "teacher ppl": ppl(teacher_ppl),
        "positions": count(positions),
        "shards": count(sum(len(part.shards) for part in parts)),
        "bytes a position": f"{size / positions:.1f}",
        "store": link(url, url[url.rfind("targets/") :]),
    }


def report_markdown(summary: RunSummary, records: Sequence[IntervalRecord], urls: Mapping[str, str]) -> str:
    """A page for Prefect's UI: the table, both plots as data URIs, and where the files lie."""
    gaps, drawn = gap_table(records), overview(records)
    return "\n\n".join(
        [
            f"# {escape(summary.name)}",
            f"Method “{escape(summary.method)}”, {summary.steps:,} steps, {summary.tokens_seen:,} tokens. Ratio = "
            "student’s ÷ teacher’s perplexity; 1 means caught up.",
            *([f"**{escape(worse)}**"] if (worse := regressions(gaps)) else []),
            *([f"**{escape(seen)}**"] if (seen := too_often(records)) else []),
            *(f"- {escape(said(alarm))}" for alarm in all_alarms(records)),
            markdown_table(
                ("domain", "teacher ppl", "student ppl", "→ now", "ratio", "→ now", "share of tokens", "next interval"),
                [
                    (
                        escape(row["domain"]),
                        *gap_cells(row),
                        percent(row["token_share"]),
                        percent(row["final_probability"]),
                    )
                    for row in gaps
                ],
            ),
            "## Gap against tokens seen",
            f"![Student over teacher perplexity by domain against tokens seen]({data_uri(ratio_plot(drawn))})",
            "## Mixture against tokens seen",
            f"![Sampling probability by domain against tokens seen]({data_uri(mixture_plot(drawn))})",
            *(
                ["## What it took", markdown_table(("", ""), [(what, escape(much)) for what, much in took], left=2)]
                if (took := cost_lines(summary.costs))
                else []
            ),
            "## Where it lies",
            markdown_table(("", ""), [(escape(name), link(url)) for name, url in urls.items()], left=2),
        ]
    )


def places(folder: RunFolder) -> dict[str, str]:
    """URLs of the run's folder and of the stores that it reads, by what they are."""
    root = folder.url.rpartition("/runs/")[0]
    stores = (folder.identity() or {}).get("stores", {})
    return {"run": folder.url} | {
        f"{kind} of {domain}": join(root, kind, fingerprints[kind], store_name(domain))
        for kind in ("targets", "blocks")
        for domain, fingerprints in sorted(stores.items())
    }
