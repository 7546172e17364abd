"""The report of a run as files below one folder, and as artifacts in Prefect's UI.

`write_report` needs no Prefect; `publish_artifacts` is called inside a flow or a task run. Both may be called
again as a run goes on: files are replaced whole, and an artifact's key stays, so that the UI shows its history.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from storage import uri
from tasks.model_card import escape
from tasks.report_data import IntervalRecord, RunSummary, gap_table, plain, render_csv, render_rows
from tasks.report_page import data_uri, render_page
from tasks.report_plots import mixture_plot, ratio_plot

REPORT_FORMAT = 1
"""Version of report.json; raised when a name in it changes its meaning."""


def write_report(summary: RunSummary, records: Sequence[IntervalRecord], folder_url: str) -> dict[str, str]:
    """Write `index.html`, `ratio.png`, `mixture.png`, `gap.csv` and `report.json` below `folder_url`.

    Each file is written in one atomic step. Returns the URL of each by its name.

    Raises:
        ValueError: as `report_data.domains_of`; nothing is written then.
        OSError: the folder cannot be written to.
    """
    rows = render_rows(records)
    contents = {
        "index.html": render_page(summary, records).encode(),
        "ratio.png": ratio_plot(records),
        "mixture.png": mixture_plot(records),
        "gap.csv": render_csv(rows).encode(),
    }
    urls = {name: uri.join(folder_url, name) for name in (*contents, "report.json")}
    for name, content in contents.items():
        uri.write_bytes(urls[name], content)
    uri.write_json(
        urls["report.json"],
        {
            "format": REPORT_FORMAT,
            "summary": plain({field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}),
            "gap": plain(gap_table(records)),
            "rows": plain(rows),
        },
    )
    return urls


def publish_artifacts(summary: RunSummary, records: Sequence[IntervalRecord], urls: Mapping[str, str]) -> None:
    """Show the run in Prefect's UI: a table `ddk-<run>-gap` and a page of plots `ddk-<run>-report`.

    Args:
        urls: what `write_report` returned.

    To be called within a flow or task run, to which the artifacts then belong.
    """
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    # _sync: without it Prefect returns a coroutine that nobody awaits where an async flow calls this.
    create_table_artifact(
        table=[_readable(row) for row in gap_table(records)],
        key=artifact_key(summary.name, "gap"),
        description=f"{escape(summary.name)}: perplexities and their ratio, before and after "
        f"{summary.tokens_seen:,} tokens; the domain that lagged most comes first",
        _sync=True,  # type: ignore[call-arg]
    )
    create_markdown_artifact(
        markdown=artifact_markdown(summary, records, urls),
        key=artifact_key(summary.name, "report"),
        description=f"{escape(summary.name)}: gap and mixture against tokens seen",
        _sync=True,  # type: ignore[call-arg]
    )


def artifact_key(run: str, what: str) -> str:
    """`('My run_2', 'gap')` → `'ddk-my-run-2-gap'`: Prefect takes only lowercase letters, digits and dashes."""
    slug = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    return f"ddk-{slug or 'run'}-{what}"


def artifact_markdown(summary: RunSummary, records: Sequence[IntervalRecord], urls: Mapping[str, str]) -> str:
    """Both plots as data URIs, which Prefect's UI shows, and where the files lie."""
    return "\n\n".join(
        [
            f"# {escape(summary.name)}",
            f"{escape(summary.student)} from {escape(summary.teacher)}, method “{escape(summary.method)}”: "
            f"{summary.steps:,} steps, {summary.tokens_seen:,} tokens.",
            f"![Student over teacher perplexity by domain against tokens seen]({data_uri(ratio_plot(records))})",
            f"![Sampling probability by domain against tokens seen]({data_uri(mixture_plot(records))})",
            "\n".join(f"- {_link(name, url)}" for name, url in urls.items()),
        ]
    )


def _link(name: str, url: str) -> str:
    """A link where a browser can follow it; a path or an s3:// address is shown as text to copy."""
    if url.startswith(("http://", "https://")):
        return f"[{name}](<{url}>)"
    return f"{name}: `{url}`"


def _readable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with numbers that a person reads, and none that JSON has no word for."""
    return {
        key: (round(value, 4) if math.isfinite(value) else str(value)) if isinstance(value, float) else value
        for key, value in row.items()
    }
