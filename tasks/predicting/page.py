"""A law on one self-contained HTML page, and its table for a terminal. The template: `templates/law.html.j2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from tasks.predicting.record import LawRecord, StoredErrors, StoredLaw
from tasks.reporting.page import data_uri, environment
from tasks.showing.formats import UNKNOWN, percent

FORMULAS = {
    "dcpt": "L = E + A/N^α + B·r^η/D^β + C/(r + ε)^γ (D-CPT Law, arXiv 2406.01375)",
    "own_tokens": "L = E + A/N^α + B/(n₀ + (r + t)·D)^β (a power law in the domain's own tokens)",
    "forgetting": "L = E + A/N^α + B/(n₀ + (r + t)·D)^β + F·(1 − r)^φ·(1 − exp(−D/τ)) (own tokens, and forgetting)",
    "exponential": "L = E + A/N^α + k·exp(Σ t_j·(r_j − 1/m))/D^β (after Data Mixing Laws, arXiv 2403.16952)",
    "power": "L = E + A/N^α + B/D^β (without the mixture)",
}
HEADINGS = ("Domain", "Points", "R²", "Huber × 10⁶", "unseen mixture", "unseen length", "unseen size")


def render_law(record: LawRecord, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        light, dark: `fit.png` in both themes.
    """
    return (
        environment("tasks.predicting")
        .get_template("law.html.j2")
        .render(
            law=record,
            formula=FORMULAS[record.form],
            headings=HEADINGS,
            rows=rows(record),
            facts=_facts(record),
            warnings=warnings(record),
            constants=[(domain, _constants(law)) for domain, law in record.laws.items()],
            plot={"light": data_uri(light["fit.png"]), "dark": data_uri(dark["fit.png"])},
        )
    )


def rows(record: LawRecord) -> list[tuple[str, ...]]:
    """A row for each domain, as `HEADINGS`."""
    count = len(record.points)
    return [
        (
            domain,
            str(count),
            f"{law.r2:.4f}",
            f"{1e6 * law.huber:.2f}",
            *(_error(one) for one in (law.ratio, law.length, law.size)),
        )
        for domain, law in record.laws.items()
    ]


def terminal_law(record: LawRecord) -> Table:
    """The same for a terminal."""
    table = Table(title=f"law '{record.name}': {FORMULAS[record.form]}", title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows(record):
        table.add_row(*map(Text, row))
    return table


def warnings(record: LawRecord) -> list[str]:
    """What a reader must know before using it."""
    said = list(record.notes)
    if not record.sized:
        said.append(
            f"All runs have one student size ({record.sizes[0]:,.0f} parameters without embeddings), so that the law "
            f"has no term in N and holds for this size alone."
        )
    elif len(record.sizes) == 2:
        said.append("Two sizes do not determine α: Chinchilla's 0.34 is taken.")
    if any(not law.resampled for law in record.laws.values()):
        said.append("There is one run, so that there is nothing to resample and no interval.")
    return said


def _facts(record: LawRecord) -> list[tuple[str, str]]:
    tokens = [point.tokens for point in record.points]
    return [
        ("Runs", str(len({point.run for point in record.points}))),
        ("Points", str(len(record.points))),
        ("Student sizes", ", ".join(f"{size:,.0f}" for size in record.sizes)),
        ("Tokens", f"{min(tokens):,.0f} to {max(tokens):,.0f}"),
    ]


def _constants(law: StoredLaw) -> list[tuple[str, str]]:
    return [(name, f"{value:.4g}") for name, value in law.constants.items()]


def _error(errors: StoredErrors | None) -> str:
    return UNKNOWN if errors is None else f"{percent(errors.median, 2)} (most {percent(errors.largest, 1)})"


def as_json(record: LawRecord) -> dict[str, Any]:
    """What `ddk law --json` prints: the law without its points and resamplings."""
    return record.model_dump(mode="json", exclude={"points": True, "laws": {"__all__": {"resampled"}}})
