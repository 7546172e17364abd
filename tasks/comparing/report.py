"""The report of a comparison as files below <root>/comparisons/<name>, and as an artifact in Prefect's UI.

comparison.json    every run's numbers; all else is made from it
index.html         the page; frontier.png, ratio.png, domains.png, mixture.png, which it also holds
runs.csv           a row for every run and domain
summary.csv        means, spreads and differences
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import ValidationError

from ddk.errors import UserError
from storage.files import uri
from storage.files.fields import first_problem
from storage.runs.reports import ComparisonFolder
from tasks.comparing.data import Comparison, run_rows, summary_rows
from tasks.comparing.page import render_comparison, render_markdown
from tasks.comparing.plots import plots
from tasks.reporting.page import data_uri
from tasks.reporting.plots import DARK, LIGHT
from tasks.reporting.records import render_csv
from tasks.showing.artifacts import add_version, artifact_key
from tasks.showing.formats import escape, link
from tasks.showing.progress import logger


def comparison_url(root: str, name: str) -> str:
    return uri.join(root, "comparisons", name)


@task(task_run_name="report {comparison.name}", cache_policy=NO_CACHE, persist_result=False)
def report_comparison(root: str, comparison: Comparison) -> dict[str, str]:
    """Write the report, and publish it as an artifact `ddk-<root>-<name>-comparison`.

    Returns:
        The URL of each file by its name.
    """
    urls = write_comparison(root, comparison)
    drawn = {"time.png": "Ratio over time", "ratio.png": "Ratio against tokens"}
    shown = {alt: uri.read_bytes(urls[name]) for name, alt in drawn.items() if name in urls}
    pictures = [f"![{alt}]({data_uri(picture)})" for alt, picture in shown.items() if picture is not None]
    add_version(
        artifact_key(uri.name_of(root), comparison.name, "comparison"),
        "markdown",
        "\n\n".join([render_markdown(comparison), *pictures, f"Files: {link(urls['index.html'])}"]),
        f"{escape(comparison.name)}: {len(comparison.variants)} variants, {len(comparison.seeds)} seeds",
    )
    logger.info("compare: %s", urls["index.html"])
    return urls


def write_comparison(root: str, comparison: Comparison) -> dict[str, str]:
    """Write all files of the report; each in one atomic step, the data first.

    Returns:
        The URL of each by its name.
    """
    light, dark = (plots(comparison, theme=theme) for theme in (LIGHT, DARK))
    contents = {
        "runs.csv": render_csv(list(run_rows(comparison))).encode(),
        "summary.csv": render_csv(list(summary_rows(comparison))).encode(),
        **light,
        "index.html": render_comparison(comparison, light, dark).encode(),
    }
    return ComparisonFolder(root, comparison.name).write(comparison.model_dump(mode="json"), contents)


def earlier_failures(root: str, name: str) -> dict[str, str]:
    """Why runs had failed when the comparison was last written, by the run's name; none where it never was."""
    if not uri.exists(ComparisonFolder(root, name).data_url):
        return {}
    return {run.run: run.reason or "" for run in read_comparison(root, name).failed}


def read_comparison(root: str, name: str) -> Comparison:
    """A comparison as it was last written.

    Raises:
        UserError: there is none.
        StoreDamagedError, FormatVersionError: it cannot be read.
    """
    folder = ComparisonFolder(root, name)
    content = folder.data()
    if content is None:
        raise UserError(f"there is no {folder.data_url}; run `ddk compare` first")
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        raise folder.damaged(first_problem(error)) from None
