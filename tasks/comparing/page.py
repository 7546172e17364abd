"""A comparison on one self-contained HTML page. The template is `templates/comparison.html.j2`.

`tasks.comparing.data` calculates every number; this module only formats them. jinja2 escapes every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from ddk.values import worst_gap
from tasks.comparing.data import (
    ComparedRun,
    ComparedVariant,
    Comparison,
    Measure,
    difference_of,
    regressed_domains,
    saved_flops,
    spread_of,
    teacher_ppl,
)
from tasks.comparing.paper import PaperTable, RowBeside, paper, tables_beside
from tasks.comparing.spreads import Difference, Spread, spread
from tasks.reporting.page import data_uri, environment
from tasks.showing.formats import UNKNOWN, duration, escape, ppl, ratio

MEAN, WORST, PERPLEXITY = Measure(name="ratio"), Measure(name="worst_ratio"), Measure(name="perplexity")
_PLOTS = {
    "time.png": (
        "Over time",
        "The largest student over teacher perplexity of all domains, and the mean over the domains, at the end of each "
        "run, against the day on which it ended. At 1 (dotted, where the curves come near it) the student has caught "
        "up.",
    ),
    "frontier.png": (
        "Largest gap against perplexity",
        "A point for each variant: the largest student over teacher perplexity of all domains, and the geometric mean "
        "of the perplexities. Further down and further left is better. Bars are 95% intervals of the paired "
        "differences from the baseline. A ring marks a variant under which the student ends more than 1% worse on some "
        "domain than before training.",
    ),
    "ratio.png": (
        "Ratio against tokens seen",
        "Student over teacher perplexity; at 1 (dotted, where the curves come near it) the student has caught up. "
        "A line is the mean over the seeds, its band goes from the smallest to the largest. The axes are cut to "
        "the curves.",
    ),
    "domains.png": (
        "The same, variant by variant",
        "As above, with a panel for each variant and a line for each domain.",
    ),
    "mixture.png": (
        "Mixture against tokens seen",
        "Probability that a block is drawn from a domain, from one measurement to the next.",
    ),
}


def render_comparison(comparison: Comparison, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        light, dark: the plots by their files' names, in both themes (`compare_plots.plots`).
    """
    return (
        environment("tasks.comparing")
        .get_template("comparison.html.j2")
        .render(
            comparison=comparison,
            finished=sum(run.counts for run in comparison.runs),
            facts=_facts(comparison),
            warnings=list(_warnings(comparison)),
            in_words=in_words(comparison),
            results=[_result(comparison, variant) for variant in comparison.variants],
            domains=[_domain_rows(comparison, name) for name in ("ratio", "perplexity", "share")],
            differences=_domain_differences(comparison),
            costs=[_cost(comparison, variant) for variant in comparison.variants],
            plots=[
                {"title": title, "caption": caption, "light": data_uri(light[name]), "dark": data_uri(dark[name])}
                for name, (title, caption) in _PLOTS.items()
                if name in light
            ],
            paper=paper(),
            beside=[_beside(comparison, table, rows) for table, rows in tables_beside(comparison)],
        )
    )


def in_words(comparison: Comparison) -> list[str]:
    """What the intervals say of the ratios and of the perplexity, a sentence each; none without a pair.

    The three need not agree: who trains on the domain that lags most lowers the largest ratio, and through it the mean
    of the ratios, sooner than the geometric mean, in which every domain's percents weigh the same.
    """
    sentences = []
    named = (("mean ratio", MEAN), ("largest ratio", WORST), ("perplexity (geometric mean)", PERPLEXITY))
    for what, measure in named:
        found = {
            variant.name: difference.verdict
            for variant in comparison.variants
            if (difference := difference_of(comparison, variant.name, measure)) is not None
        }
        parts = [
            f"{verdict}: {', '.join(names)}"
            for verdict in dict.fromkeys(("better", "worse", "no difference shown", "one seed, no interval"))
            if (names := [name for name, said in found.items() if said == verdict])
        ]
        if parts:
            sentences.append(f"By the {what}, against {comparison.baseline}: {'; '.join(parts)}.")
    return sentences


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    runs = [run for run in comparison.runs if run.counts]
    tokens = sorted({run.tokens for run in runs})
    seconds = [run.training_seconds for run in runs if run.training_seconds is not None]
    saved = saved_flops(comparison)
    return [
        ("Variants", str(len(comparison.variants))),
        ("Seeds", ", ".join(map(str, comparison.seeds))),
        ("Runs complete", f"{len(runs)} of {len(comparison.runs)}"),
        ("Tokens a run", " to ".join(f"{count:,}" for count in dict.fromkeys([*tokens[:1], *tokens[-1:]])) or UNKNOWN),
        ("Training time, all runs", duration(math.fsum(seconds)) if seconds else UNKNOWN),
        ("Teacher's work saved by the cache", flops(saved["saved"])),
    ]


def _warnings(comparison: Comparison) -> list[str]:
    """What a reader must know before any number."""
    runs = [run for run in comparison.runs if run.counts]
    lines = []
    if comparison.failed:
        lines.append(
            f"{len(comparison.failed)} of {len(comparison.runs)} runs failed and are excluded from all means. See Runs."
        )
    if waiting := [run for run in comparison.runs if run.status in ("unfinished", "missing")]:
        lines.append(f"{len(waiting)} of {len(comparison.runs)} runs are not finished and are excluded from all means.")
    if len(comparison.seeds) == 1:
        lines.append("With one seed there is no spread and no interval: a difference may be due to the seed.")
    if len({run.tokens for run in runs}) > 1:
        lines.append("The runs saw different numbers of tokens; see Cost before comparing.")
    if early := [run.run for run in runs if run.stopped_early is not None]:
        lines.append(f"Stopped before their last step: {', '.join(early)}.")
    return lines


def _result(comparison: Comparison, variant: ComparedVariant) -> dict[str, Any]:
    runs = comparison.of(variant.name)
    worst = dict.fromkeys(worst_gap(run.last.gaps).domain for run in runs)
    return {
        "variant": variant,
        "baseline": variant.name == comparison.baseline,
        "regressed": regressed(comparison, variant.name),
        "seeds": len(runs),
        "worst_domain": ", ".join(worst),
        **{measure.name: _shown(spread_of(comparison, variant.name, measure), measure.name) for measure in _RESULTS},
        "differences": [_difference(difference_of(comparison, variant.name, measure)) for measure in (MEAN, WORST)],
    }


_RESULTS = (PERPLEXITY, MEAN, WORST)


def regressed(comparison: Comparison, variant: str) -> str:
    """'books +6.2%, web +8.7%': the domains on which the student ends worse than it began."""
    found = regressed_domains(comparison, variant)
    return ", ".join(f"{domain} +{100 * (factor - 1):.1f}%" for domain, factor in found.items())


def _domain_rows(comparison: Comparison, name: Literal["ratio", "perplexity", "share"]) -> dict[str, Any]:
    """A table with a column for each domain, shaped as the paper's: teacher, student before, then the variants."""
    measures = [Measure(name=name, domain=domain) for domain in comparison.domains]
    overall = {"ratio": [MEAN, WORST], "perplexity": [PERPLEXITY], "share": [Measure(name="tokens")]}[name]
    rows: list[dict[str, Any]] = []
    baseline = next(iter(comparison.of(comparison.baseline)), None)
    if baseline is not None and name == "perplexity":
        cells = [ppl(teacher_ppl(baseline.last, domain) or math.nan) for domain in (*comparison.domains, None)]
        rows.append({"name": "teacher", "cells": cells, "apart": True})
    if baseline is not None and name != "share":
        first = baseline.records[0]
        cells = [_number(measure.at(first, 1), name) for measure in (*measures, *overall)]
        rows.append({"name": "student before", "cells": cells, "apart": True})
    for variant in comparison.variants:
        cells = [
            _shown(spread_of(comparison, variant.name, measure), measure.name) for measure in (*measures, *overall)
        ]
        rows.append({"name": variant.name, "cells": cells, "apart": False})
    return {"name": name, "rows": rows}


def _domain_differences(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "name": variant.name,
            "cells": [
                _difference(difference_of(comparison, variant.name, Measure(name="ratio", domain=domain)))
                for domain in comparison.domains
            ],
        }
        for variant in comparison.variants
        if variant.name != comparison.baseline
    ]


def _cost(comparison: Comparison, variant: ComparedVariant) -> dict[str, Any]:
    runs = comparison.of(variant.name)
    seconds = [run.training_seconds for run in runs if run.training_seconds is not None]
    tokens = spread_of(comparison, variant.name, Measure(name="tokens"))
    training = _mean_flops([run.training_flops for run in runs])
    evaluation = _mean_flops([run.evaluation_flops for run in runs])
    live = _mean_flops([run.teacher_forwards("live") for run in runs])
    stored = _mean_flops([run.teacher_forwards("stored") for run in runs])
    return {
        "name": variant.name,
        "tokens": _shown(tokens, "tokens"),
        "training": flops(training),
        "evaluation": flops(evaluation),
        "live": flops(live),
        "stored": flops(stored),
        "seconds": _shown_seconds(spread(seconds) if seconds else None),
    }


def _mean_flops(values: list[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def _beside(comparison: Comparison, table: PaperTable, rows: list[RowBeside]) -> dict[str, Any]:
    ours = ["Training FLOPs", "with a live teacher"] if table.title == "Training cost" else ["Mean ratio", "Largest"]
    return {
        "table": table,
        "ours": ours,
        "rows": [
            {
                "label": row.label,
                "ours": _ours(comparison, table, row),
                "theirs": [_their(value) for value in row.theirs or [None] * len(table.columns)],
            }
            for row in rows
        ],
    }


def _ours(comparison: Comparison, table: PaperTable, row: RowBeside) -> list[str]:
    baseline = next(iter(comparison.of(comparison.baseline)), None)
    if row.variant is None and row.label == "student before" and baseline is not None:
        return [_number(measure.at(baseline.records[0], 1), "ratio") for measure in (MEAN, WORST)]
    if row.variant is None:
        return [ratio(1.0)] * 2 if row.label == "teacher" else [UNKNOWN] * 2
    if table.title == "Training cost":
        runs = comparison.of(row.variant)
        own = [_with(run, run.teacher_forwards("live")) for run in runs]
        live = [_with(run, run.teacher_forwards("live"), run.teacher_forwards("stored")) for run in runs]
        return [flops(_mean_flops(own)), flops(_mean_flops(live))]
    return [_shown(spread_of(comparison, row.variant, measure), measure.name) for measure in (MEAN, WORST)]


def _with(run: ComparedRun, *more: int | None) -> int | None:
    parts = [run.training_flops, run.evaluation_flops, *more]
    return None if None in parts else sum(filter(None, parts))


def _their(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.3e}" if value >= 1e5 else f"{value:.2f}"


def _difference(found: Difference | None) -> dict[str, str]:
    if found is None:
        return {"text": UNKNOWN, "interval": "", "verdict": ""}
    interval = "" if found.low is None or found.high is None else f"[{signed(found.low)}, {signed(found.high)}]"
    return {"text": signed(found.mean), "interval": interval, "verdict": found.verdict}


def signed(value: float) -> str:
    """0.1234 → '+0.123'; −0.1 → '−0.100'."""
    text = f"{abs(value):.3f}"
    return text if float(text) == 0.0 else ("−" if value < 0 else "+") + text


def _shown(found: Spread | None, name: str) -> str:
    """'1.234 ± 0.012', in the measure's own format; without the spread where there is none."""
    if found is None:
        return UNKNOWN
    mean = _number(found.mean, name)
    return mean if found.sd is None or (name == "tokens" and found.sd == 0) else f"{mean} ± {_number(found.sd, name)}"


def _shown_seconds(found: Spread | None) -> str:
    if found is None:
        return UNKNOWN
    return duration(found.mean) if found.sd is None else f"{duration(found.mean)} ± {found.sd:.1f} s"


def _number(value: float | None, name: str) -> str:
    if value is None:
        return UNKNOWN
    if name == "perplexity":
        return ppl(value)
    if name == "tokens":
        return f"{value:,.0f}"
    return f"{100 * value:.1f}" if name == "share" else ratio(value)


def flops(value: float | None) -> str:
    """1.234e15 → '1.23 PFLOP'; None → '–'."""
    if value is None:
        return UNKNOWN
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}FLOP".replace("-", "−")
    return f"{value:.0f} FLOP".replace("-", "−")


def render_markdown(comparison: Comparison) -> str:
    """The result as two tables, for a README or an artifact: overall, and the ratio by domain."""
    base = escape(comparison.baseline)
    lines = [
        f"| variant | seeds | perplexity | mean ratio | largest ratio | mean − {base} | | largest − {base} | | "
        f"worse than before |",
        "|---|---:|---:|---:|---:|---:|---|---:|---|---|",
    ]
    for variant in comparison.variants:
        row = _result(comparison, variant)
        found = [f"{one['text']} {one['interval']} | {one['verdict']}" for one in row["differences"]]
        lines.append(
            f"| {escape(variant.name)} | {row['seeds']} | {row['perplexity']} | {row['ratio']} | "
            f"{row['worst_ratio']} | {' | '.join(found)} | {escape(row['regressed'])} |"
        )
    domains = [escape(domain) for domain in comparison.domains]
    lines += ["", f"| ratio | {' | '.join(domains)} |", "|---|" + "---:|" * len(domains)]
    for one in _domain_rows(comparison, "ratio")["rows"]:
        lines.append(f"| {escape(one['name'])} | {' | '.join(one['cells'][: len(domains)])} |")
    return "\n".join(lines)


def terminal_comparison(comparison: Comparison) -> Table:
    """The result, a row for each variant; the baseline is bold."""
    title = Text(f"{comparison.name}: student / teacher perplexity at the end")
    table = Table(title=title, title_justify="left")
    table.add_column("variant", no_wrap=True)
    base = comparison.baseline
    for heading in ("seeds", "mean ratio", "largest", f"mean − {base}", "largest − its", "worse than before"):
        table.add_column(Text(heading), justify="right")
    for variant in comparison.variants:
        row = _result(comparison, variant)
        differences = [" ".join(filter(None, one.values())) for one in row["differences"]]
        cells = (str(row["seeds"]), row["ratio"], row["worst_ratio"], *differences, row["regressed"])
        # Text, not str: '[0.1, 0.2]' is no markup.
        table.add_row(*map(Text, (variant.name, *cells)), style="bold" if row["baseline"] else None)
    return table
