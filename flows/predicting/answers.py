"""What a law says before a run: each answer as a sentence or two, a table, a picture and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from ddk.errors import UserError
from ddk.laws.answers import Objective, best_mixture, sizes_at, tokens_until
from flows.config import Config, changed
from flows.predicting.mixtures import given_mixture, mixture_after_tokens, train_blocks
from storage.runs.reports import LawFolder
from tasks.predicting.plots import shares_figure, sizes_figure, tokens_figure
from tasks.predicting.points import student_size
from tasks.predicting.record import LawRecord, Predicted
from tasks.reporting.plots import as_png
from tasks.showing.formats import percent, ppl, ratio

EPOCHS = 4.0
"""Passes over one domain's blocks up to which repeated tokens are worth about as much as new ones (Muennighoff et al.
2023, 'Scaling Data-Constrained Language Models')."""
_DRAWN = 25
"""Places of a curve against tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer."""

    name: str
    """Of its files."""
    sentences: Sequence[str]
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Mapping[str, Any]
    figure: Figure
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the configuration, that `--write` sets."""


def write_answer(root: str, record: LawRecord, answer: Answer) -> dict[str, str]:
    """Its picture and its JSON beside the law. Returns their URLs by name."""
    content = json.dumps(dict(answer.data), indent=1, ensure_ascii=False).encode()
    return LawFolder(root, record.name).add(
        {f"{answer.name}.json": content, f"{answer.name}.png": as_png(answer.figure)}
    )


def write_config(config: Config, answer: Answer, path: str) -> None:
    """The configuration with the answer in it, as a new file.

    Raises:
        UserError: there is such a file already, or the answer sets nothing.
    """
    if not answer.fields:
        raise UserError("this answer sets no field of a configuration, so that --write has nothing to write")
    new = changed(config, answer.fields, ".", "--write")
    text = f"# Written by `ddk law`: {', '.join(answer.fields)} as law answers.\n" + yaml.safe_dump(
        new.model_dump(mode="json", exclude_defaults=True), allow_unicode=True, sort_keys=False
    )
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--write {path}: there is such a file; give another name, nothing was written") from None
    except OSError as error:
        raise UserError(f"--write {path}: {error.strerror}; nothing was written") from None


def size_of(config: Config) -> float:
    """N of the configuration's student."""
    return student_size(config.student.model, config.student.revision)


def tokens_of(config: Config) -> float:
    """D of the configuration's run."""
    return float(config.train.steps * config.train.batch_size * config.packing.seq_len)


def mixture_answer(
    config: Config,
    record: LawRecord,
    *,
    objective: str,
    tokens: float | None = None,
    tolerance: float | None = None,
    epochs: float = EPOCHS,
    anywhere: bool = False,
) -> Answer:
    """The fixed mixture whose run ends best by an objective.

    Args:
        tolerance: percent by which the losses of the other domains may exceed those before the run.
        epochs: most passes over a domain's blocks.

    Raises:
        UserError: the objective is none, or no mixture keeps to the limits.
    """
    parameters, count = size_of(config), tokens or tokens_of(config)
    goal = Objective.parse(objective, record.domains, None if tolerance is None else tolerance / 100)
    blocks = train_blocks(config.root, record)
    most = {domain: epochs * number * config.packing.seq_len for domain, number in blocks.items()}
    best = best_mixture(
        record.fitted,
        record.teacher,
        parameters,
        count,
        goal,
        start=record.start(parameters) if goal.tolerance is not None else None,
        most=most,
        anywhere=anywhere,
    )
    equal = dict.fromkeys(record.domains, 1 / len(record.domains))
    there, beside = (record.outcome(parameters, count, one) for one in (best, equal))
    passes = {domain: best[domain] * count / (blocks[domain] * config.packing.seq_len) for domain in best}
    return Answer(
        name=f"mixture-{objective}".replace("/", "~"),
        sentences=[
            f"Best mixture for '{objective}' after {count:,.0f} tokens: largest ratio "
            f"{_with(there.outcome.worst, there.worst)}, perplexity (geometric mean) "
            f"{_with(math.exp(there.outcome.mean), there.mean)}; equal sampling {ratio(beside.outcome.worst)} and "
            f"{ppl(math.exp(beside.outcome.mean))}.",
            *_outside(there),
        ],
        headings=("Domain", "Share", "Epochs", "Loss", "Ratio", "95%", "Ratio, equal"),
        rows=[
            (
                domain,
                percent(best[domain]),
                f"{passes[domain]:.2f}",
                f"{there.outcome.losses[domain]:.4f}",
                ratio(there.outcome.ratios[domain]),
                _interval(there.ratios[domain]),
                ratio(beside.outcome.ratios[domain]),
            )
            for domain in record.domains
        ],
        data={
            "objective": objective,
            "tokens": count,
            "parameters": parameters,
            "mixture": best,
            "epochs": passes,
            **_as_data(there),
            "equal": _as_data(beside),
        },
        figure=shares_figure(
            {"best": best, "equal": equal}, {"best": there.outcome.ratios, "equal": beside.outcome.ratios}
        ),
        fields={"mixture.weights": {domain: round(share, 4) for domain, share in best.items()}}
        | ({} if config.method in ("kd", "ddk_equal", "cpt", "minillm", "ted") else {"method": "ddk_equal"}),
    )


def tokens_answer(
    config: Config, record: LawRecord, *, target: float | None, budget: float | None, mixture: str | None
) -> Answer:
    """Tokens until the largest ratio is at most `target`, or the ratio that remains at a budget.

    Raises:
        UserError: the law never comes to the target.
    """
    parameters = size_of(config)
    if mixture is None:
        shares = mixture_after_tokens(config, record, parameters)
    else:
        given = given_mixture(mixture, record)
        shares = lambda _: given  # noqa: E731 (as the other branch's)
    under = config.method if mixture is None else mixture
    if target is not None:
        found = tokens_until(record.fitted, record.teacher, parameters, target, shares)
        if found is None:
            limit = record.outcome(parameters, 1e4 * max(point.tokens for point in record.points), shares(1e9))
            raise UserError(
                f"by law '{record.name}' the largest ratio never falls to {target:g} under {under}: its limit is about "
                f"{limit.outcome.worst:.3f}; take a larger ratio, another mixture or a larger student"
            )
        count = found
    else:
        count = budget or tokens_of(config)
    drawn = shares(count)
    there = record.outcome(parameters, count, drawn)
    steps = math.ceil(count / record.tokens_per_step)
    known = max(point.tokens for point in record.points)
    places = np.geomspace(min(point.tokens for point in record.points), max(known, count) * 1.2, _DRAWN).tolist()
    curve = [record.outcome(parameters, place, shares(place)) for place in places]
    bands = [one.worst for one in curve]
    what = (
        f"The largest ratio comes down to {target:g} after {count:,.0f} tokens ({steps:,} steps)"
        if target is not None
        else f"After {count:,.0f} tokens ({steps:,} steps) the largest ratio is "
        f"{_with(there.outcome.worst, there.worst)}"
    )
    return Answer(
        name="tokens",
        sentences=[f"{what}, under {under}.", *_outside(there)],
        headings=("Domain", "Share", "Loss", "Ratio", "95%"),
        rows=[
            (
                domain,
                percent(drawn[domain]),
                f"{there.outcome.losses[domain]:.4f}",
                ratio(there.outcome.ratios[domain]),
                _interval(there.ratios[domain]),
            )
            for domain in record.domains
        ],
        data={"target": target, "tokens": count, "steps": steps, "parameters": parameters, **_as_data(there)},
        figure=tokens_figure(
            places,
            [one.outcome.worst for one in curve],
            [band for band in bands if band is not None] if None not in bands else None,
            known=known,
            ratio=target,
        ),
        fields={"train.steps": steps},
    )


def size_answer(
    config: Config, record: LawRecord, *, flops: float | None, objective: str, mixture: str | None
) -> Answer:
    """The student's size that is best at fixed C = 6·N·D operations.

    Raises:
        UserError: the law knows one size only.
    """
    parameters = size_of(config)
    budget = flops or 6.0 * parameters * tokens_of(config)
    goal = Objective.parse(objective, record.domains, None)
    shares = given_mixture(mixture or "equal", record)
    along = sizes_at(record.fitted, record.teacher, budget, goal, shares)
    size, count, value = min(along, key=lambda place: place[2])
    known = record.sizes
    ends = size in (along[0][0], along[-1][0])
    there = record.outcome(size, count, shares)
    return Answer(
        name="size",
        sentences=[
            f"At {budget:.3g} FLOP (6·N·D), '{objective}' is best with {size:,.0f} parameters without embeddings and "
            f"{count:,.0f} tokens: {value:.4f}"
            + (" nats." if goal.kind != "worst" else " nats of gap.")
            + (" This is an end of the range that was looked at; the best may lie beyond it." if ends else ""),
            *_outside(there),
        ],
        headings=("Parameters", "Tokens", objective),
        rows=[(f"{one:,.0f}", f"{two:,.0f}", f"{three:.4f}") for one, two, three in along[:: max(1, len(along) // 10)]],
        data={"flops": budget, "parameters": size, "tokens": count, "objective": objective, "value": value}
        | {"along": [{"parameters": one, "tokens": two, "value": three} for one, two, three in along]},
        figure=sizes_figure(along, f"{objective} at {budget:.3g} FLOP, in nats", known),
    )


def _as_data(there: Predicted) -> dict[str, Any]:
    return {
        "worst": there.outcome.worst,
        "worst_interval": there.worst,
        "perplexity": math.exp(there.outcome.mean),
        "perplexity_interval": there.mean,
        "losses": dict(there.outcome.losses),
        "ratios": dict(there.outcome.ratios),
        "outside": there.outside,
    }


def _outside(there: Predicted) -> list[str]:
    if not there.outside:
        return []
    return [
        f"Outside what the law was fitted to, and so less certain than the intervals say: {'; '.join(there.outside)}."
    ]


def _with(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.4g}" if interval is None else f"{value:.4g} ({interval[0]:.4g} to {interval[1]:.4g})"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
