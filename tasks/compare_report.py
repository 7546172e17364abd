"""The report of a comparison as files below <root>/comparisons/<name>, and as an artifact in Prefect's UI.

comparison.json    every run's numbers; all else is made from it
index.html         the page; ratio.png, domains.png, mixture.png, which it also holds
runs.csv           a row for every run and domain
summary.csv        means, spreads and differences
"""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import ValidationError

from ddk.errors import UserError
from storage import uri
from storage.errors import FormatVersionError, StoreDamagedError
from tasks.artifacts import add_version, artifact_key
from tasks.compare_data import FORMAT, Comparison, run_rows, summary_rows
from tasks.compare_page import render_comparison, render_markdown
from tasks.compare_plots import plots
from tasks.model_card import escape
from tasks.progress import logger
from tasks.report_data import render_csv
from tasks.report_page import data_uri
from tasks.report_plots import DARK, LIGHT

DATA = "comparison.json"


def comparison_url(root: str, name: str) -> str:
    return uri.join(root, "comparisons", name)


@task(task_run_name="report {comparison.name}", cache_policy=NO_CACHE, persist_result=False)
def report_comparison(root: str, comparison: Comparison) -> dict[str, str]:
    """Write the report, and publish it as an artifact `ddk-<name>-comparison`.

    Returns:
        The URL of each file by its name.
    """
    urls = write_comparison(root, comparison)
    picture = uri.read_bytes(urls["ratio.png"]) if "ratio.png" in urls else None
    pictures = [] if picture is None else [f"![Ratio against tokens]({data_uri(picture)})"]
    add_version(
        artifact_key(comparison.name, "comparison"),
        "markdown",
        "\n\n".join([render_markdown(comparison), *pictures, f"Files: `{urls['index.html']}`"]),
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
        DATA: comparison.model_dump_json(indent=1).encode(),
        "runs.csv": render_csv(list(run_rows(comparison))).encode(),
        "summary.csv": render_csv(list(summary_rows(comparison))).encode(),
        **light,
        "index.html": render_comparison(comparison, light, dark).encode(),
    }
    folder = comparison_url(root, comparison.name)
    for name, content in contents.items():
        uri.write_bytes(uri.join(folder, name), content)
    return {name: uri.join(folder, name) for name in contents}


def earlier_failures(root: str, name: str) -> dict[str, str]:
    """Why runs had failed when the comparison was last written, by the run's name; none where it never was."""
    url = uri.join(comparison_url(root, name), DATA)
    if not uri.exists(url):
        return {}
    return {run.run: run.reason or "" for run in read_comparison(url).failed}


def read_comparison(url: str) -> Comparison:
    """The content of a `comparison.json`.

    Raises:
        UserError: there is none.
        StoreDamagedError, FormatVersionError: it cannot be read.
    """
    content = uri.read_json(url)
    if content is None:
        raise UserError(f"there is no {url}; run `ddk compare` first")
    if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise FormatVersionError(f"{url} has format {content['format']}, and this version reads {FORMAT}; update ddk")
    try:
        return Comparison.model_validate(content)
    except ValidationError as error:
        raise StoreDamagedError(f"{url} is no comparison ({error.errors()[0]['msg']}); write it again") from None
