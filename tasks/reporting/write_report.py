"""The report of a run as files below one folder.

It may be written again while a run continues; each file is replaced as a whole. `tasks.reporting.run_artifacts` has the
artifacts of the same run in Prefect's UI.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

from storage.files import uri
from storage.runs.listing import Listing, records_of_contents
from tasks.reporting.page import render_page
from tasks.reporting.plots import mixture_plot, ratio_plot
from tasks.reporting.records import IntervalRecord, RunSummary, gap_table, plain, render_csv, render_rows
from tasks.reporting.tree import overview, rollup_rows, weakest

REPORT_FORMAT = 1
"""Version of report.json; raised when a name in it changes its meaning."""


def write_report(
    summary: RunSummary,
    records: Sequence[IntervalRecord],
    folder_url: str,
    evaluation: Markup | None = None,
    listing: Listing | None = None,
) -> dict[str, str]:
    """Write `index.html`, `ratio.png`, `mixture.png`, `gap.csv` and `report.json` below `folder_url`.

    Where domains have paths also `rollup.csv`, with a row for each domain above the leaves; and where there are more
    leaves than a plot has room for, `ratio-weakest.png`.

    Each file is written in one atomic step. Returns the URL of each by its name.

    Args:
        evaluation: `evaluation_section` of the run, which the page shows too.
        listing: where it is kept what was written.

    Raises:
        ValueError: as `tasks.reporting.records.domains_of`; nothing is written then.
        OSError: the folder cannot be written to.
    """
    rows, above, shown = render_rows(records), rollup_rows(records), overview(records)
    contents = {
        "index.html": render_page(summary, records, evaluation).encode(),
        "ratio.png": ratio_plot(shown),
        "mixture.png": mixture_plot(shown),
        "gap.csv": render_csv(rows).encode(),
    }
    if above:
        contents["rollup.csv"] = render_csv(above).encode()
    if few := weakest(records):
        contents["ratio-weakest.png"] = ratio_plot(records, domains=few)
    contents["report.json"] = uri.canonical(
        {
            "format": REPORT_FORMAT,
            "summary": plain({field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}),
            "gap": plain(gap_table(records)),
            "rows": plain(rows),
            **({"rollup": plain(above)} if above else {}),
        }
    )
    for name, content in contents.items():
        uri.write_bytes(uri.join(folder_url, name), content)
    if listing is not None:
        listing.write(records_of_contents(contents))
    return {name: uri.join(folder_url, name) for name in contents}
