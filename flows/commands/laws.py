"""`ddk law`: fits scaling laws to finished runs, and answers from them what a run will bring."""

from __future__ import annotations

import json
import math
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flows.commands.app import (
    ConfigPath,
    Overrides,
    Root,
    app,
    load,
    loading_libraries,
    run_comparison,
    say,
    show,
    use_block,
)

_IMPLIED = {"--design": "design", "--teachers": "teachers", "--new-domain": "new-domain"}
"""Subcommands that an option names as well: `ddk law CONFIG --teachers A,B`."""


class _FitByDefault(TyperGroup):
    """`ddk law CONFIG` is `ddk law fit CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            implied = next((name for option, name in _IMPLIED.items() if option in args), "fit")
            args = [implied, *(word for word in args if word != "--design")]
        return super().parse_args(ctx, args)


law = typer.Typer(
    cls=_FitByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fit scaling laws to finished runs, and predict runs from them. `ddk law CONFIG` is `ddk law fit CONFIG`.",
)
app.add_typer(law, name="law", short_help="Fit scaling laws to finished runs, and predict runs from them.")

Name = Annotated[str, typer.Option("--name", help="Name of the law, below <root>/laws.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Write = Annotated[
    str | None,
    typer.Option("--write", metavar="FILE", help="Write a new configuration file with the answer in it."),
]
Mixture = Annotated[
    str | None,
    typer.Option("--mixture", metavar="equal | DOMAIN=WEIGHT,…", help="Mixture of the run; by default the method's."),
]
ObjectiveText = Annotated[
    str,
    typer.Option(
        "--objective", help="What to make small: 'worst' (largest gap), 'mean' (mean loss), or a domain (its loss)."
    ),
]
Gpu = Annotated[str, typer.Option("--gpu", help="Kind of GPU for the estimate of the cost: a100, h100 or h200.")]
Mfu = Annotated[float, typer.Option("--mfu", help="Share of the GPU's peak speed that is reached, for the estimate.")]


@law.command(short_help="Fit a law to finished or running runs.")
def fit(
    config: ConfigPath,
    runs: Annotated[
        list[str] | None,
        typer.Option("--runs", metavar="PATTERN", help="Runs to fit to, e.g. 'law-*'; may be repeated. Default: all."),
    ] = None,
    name: Name = "law",
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="dcpt, own_tokens, forgetting, exponential, power, or auto (the one that predicts unseen runs best).",
        ),
    ] = "dcpt",
    all_points: Annotated[
        bool,
        typer.Option("--all-points", help="Use measurements in the middle of runs whose learning rate falls, too."),
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Fit a law to the losses that runs of the configuration's root have measured, and write it with its page."""
    loaded = _loaded(config, overrides, root)
    _fit(loaded, name, runs or ["*"], form, all_points=all_points, as_json=as_json)


@law.command(short_help="Find the best fixed mixture for an objective.")
def mixture(
    config: ConfigPath,
    objective: ObjectiveText = "worst",
    tokens: Annotated[
        float | None, typer.Option("--tokens", min=1.0, help="Tokens of the run; by default the configuration's.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            metavar="PERCENT",
            help="With a domain as the objective: how far the losses of the others may rise above their start.",
        ),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", min=0.01, help="Most passes over one domain's blocks: its data are limited.")
    ] = 4.0,
    anywhere: Annotated[
        bool, typer.Option("--anywhere", help="Allow shares outside the range of the runs; less certain.")
    ] = False,
    name: Name = "law",
    write: Write = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Find the fixed mixture whose run ends best: smallest largest gap, smallest mean loss, or smallest loss of one
    domain while the others stay within --tolerance of their start."""
    loaded = _loaded(config, overrides, root)
    from flows.predicting.answers import mixture_answer

    _answer(
        loaded,
        name,
        lambda record: mixture_answer(
            loaded,
            record,
            objective=objective,
            tokens=tokens,
            tolerance=tolerance,
            epochs=epochs,
            anywhere=anywhere,
        ),
        write=write,
        as_json=as_json,
    )


@law.command(short_help="Tokens until a ratio is reached, or the ratio that remains at a budget.")
def tokens(
    config: ConfigPath,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", min=0.01, help="Largest ratio to come down to; by default mixture.stop_ratio."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", min=1.0, metavar="TOKENS", help="Ask instead for the ratio after so many tokens."),
    ] = None,
    mixture_text: Mixture = None,
    name: Name = "law",
    write: Write = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Predict how many tokens it takes until the largest ratio is reached, or which ratio remains at a budget.

    Without either, predict the end of the configuration's own run.
    """
    loaded = _loaded(config, overrides, root)
    from flows.predicting.answers import tokens_answer

    target = ratio if ratio is not None else loaded.mixture.stop_ratio if budget is None else None
    _answer(
        loaded,
        name,
        lambda record: tokens_answer(loaded, record, target=target, budget=budget, mixture=mixture_text),
        write=write,
        as_json=as_json,
    )


@law.command(short_help="The best student size at a fixed number of operations.")
def size(
    config: ConfigPath,
    flops: Annotated[
        float | None,
        typer.Option("--flops", min=1.0, help="6 × parameters × tokens to spend; by default the configuration's."),
    ] = None,
    objective: ObjectiveText = "worst",
    mixture_text: Mixture = None,
    name: Name = "law",
    as_json: AsJson = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Weigh the student's size against its tokens at a fixed number of operations. Needs runs of several sizes."""
    loaded = _loaded(config, overrides, root)
    from flows.predicting.answers import size_answer

    _answer(
        loaded,
        name,
        lambda record: size_answer(loaded, record, flops=flops, objective=objective, mixture=mixture_text),
        write=None,
        as_json=as_json,
    )


@law.command(short_help="Run the smallest set of runs that determines a law.")
def design(
    config: ConfigPath,
    name: Name = "law",
    students: Annotated[
        str | None,
        typer.Option("--students", metavar="A,B", help="Further students, so that the law knows the size too."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the runs and their cost only.")] = False,
    gpu: Gpu = "h100",
    mfu: Mfu = 0.4,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Show the cost of the smallest set of runs that determines a law, then run them and fit it; the same call resumes.

    Six mixtures for each student, on one teacher cache, with the learning rate held after the warm-up.
    """
    loaded = _loaded(config, overrides, root)
    with loading_libraries():
        from flows.costing.run_size import Assumptions
        from flows.costing.table import hours_shown
        from flows.predicting import design as designing
    folder = os.path.dirname(os.path.abspath(config))
    asked = designing.design(loaded, folder, name=name, students=_words(students), seed=loaded.seed)
    found = designing.cost(loaded, asked, Assumptions(gpu=gpu, mfu=mfu))
    training, capture = hours_shown(found.gpu_hours, "GPU "), hours_shown(found.capture_hours, "GPU ")
    for variant in asked.variants:
        say(f"run       {name}-{variant.key}-s{asked.seeds[0]}   {json.dumps(variant.fields['mixture.weights'])}")
    say(
        f"cost      {found.runs} runs, {found.tokens:,} positions; about {training} to train, and {capture} to "
        f"capture the cache if it is not there (estimated for {gpu}, not measured)"
    )
    if dry_run:
        return
    run_comparison(loaded, asked)
    _fit(loaded, name, [f"{name}-*"], "dcpt", all_points=False, as_json=False)


@law.command("new-domain", short_help="Predict a domain that the law has not seen, from a short run.")
def new_domain(
    config: ConfigPath,
    domain: Annotated[str, typer.Option("--new-domain", metavar="NAME", help="The domain to predict.")],
    run: Annotated[
        str | None,
        typer.Option("--run", help="Run that has it, and was measured twice; by default the configuration's."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option("--tokens", min=1.0, help="Tokens to predict for; by default the configuration's.")
    ] = None,
    name: Name = "law",
    as_json: AsJson = False,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Predict the losses of a domain that the law's runs did not have, from the beginning of one run that has it."""
    loaded = _loaded(config, overrides, root)
    from flows.predicting.answers import tokens_of
    from flows.predicting.new_domain import predict_new
    from tasks.predicting.record import read_law

    record = read_law(loaded.root, name)
    found = predict_new(loaded.root, record, domain, run or loaded.run, tokens or tokens_of(loaded))
    if as_json:
        keys = ("tokens", "share", "loss")
        places = [dict(zip(keys, place, strict=True)) for place in found.places]
        say(
            json.dumps(
                {"domain": domain, "start": found.start, "teacher": found.teacher, "predicted": places}, indent=1
            )
        )
        return
    say(
        f"{domain}: loss before training {found.start:.4f}, teacher {found.teacher:.4f}; measured to "
        f"{found.tokens:,.0f} tokens"
    )
    for count, share, loss in found.places:
        say(f"  {100 * share:5.1f}% of {count:,.0f} tokens: loss {loss:.4f}, ratio {_ratio(loss, found.teacher)}")


@law.command(short_help="Rank several teachers for this student by short runs.")
def teachers(
    config: ConfigPath,
    models: Annotated[str, typer.Option("--teachers", metavar="A,B,…", help="Models to compare, with one tokenizer.")],
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Train blocks of each domain to capture.")] = 256,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each short run.")] = 200,
    seeds: Annotated[str, typer.Option("--seeds", metavar="N,N,…", help="Seeds of each short run.")] = "0,1,2",
    name: Annotated[str, typer.Option("--name", help="Name of the comparison that is made.")] = "teachers",
    gpu: Gpu = "h100",
    mfu: Mfu = 0.4,
    overrides: Overrides = None,
    root: Root = None,
) -> None:
    """Capture a small sample with each teacher, train the student on each for a few steps, and rank the teachers.

    The price of the full capture stands beside. The same call resumes.
    """
    loaded = _loaded(config, overrides, root)
    with loading_libraries():
        from flows.comparing.compare import earlier_failures, found
        from flows.comparing.variants import whole_numbers
        from flows.costing.run_size import Assumptions
        from flows.costing.table import hours_shown
        from flows.predicting import teachers as choosing

    asked = choosing.teachers_request(
        loaded,
        os.path.dirname(os.path.abspath(config)),
        name=name,
        teachers=_words(models),
        seeds=whole_numbers(seeds, "--seeds"),
        blocks=blocks,
        steps=steps,
    )
    for label, reason in choosing.refused(loaded, asked).items():
        say(f"refused   {label}: {reason}")
    run_comparison(loaded, asked)
    comparison = found(loaded, asked, earlier_failures(loaded, asked))
    for run in comparison.failed:
        say(f"failed    {run.run}: {run.reason}")
    ranked = choosing.rank(loaded, asked, comparison, Assumptions(gpu=gpu, mfu=mfu))
    rows = [
        (one.model, f"{one.perplexity:.3f}", one.difference, hours_shown(one.capture_hours, "GPU "), f"{one.times:.1f}")
        for one in ranked
    ]
    _table(
        f"teachers for {loaded.student.model}, after {steps} steps on {blocks} blocks of each domain",
        ("Teacher", "Student's perplexity", "Against the best", "Full capture (estimate)", "× student"),
        rows,
    )
    say(choosing.hint(ranked))


def _loaded(config: str, overrides: list[str] | None, root: str | None) -> Any:
    loaded = load(config, overrides, root, None)
    use_block(loaded.storage_block)
    return loaded


def _fit(config: Any, name: str, patterns: list[str], form: str, *, all_points: bool, as_json: bool) -> None:
    from tasks.showing.waiting import said_if_slow

    with said_if_slow("law: loading scipy and transformers"):
        from flows.predicting.fit import fit_law
        from tasks.predicting.page import as_json as law_as_json
        from tasks.predicting.page import terminal_law, warnings
    with said_if_slow("law: fitting, predicting what was held out, resampling the runs"):
        record, urls = fit_law(config.root, name, patterns, form=form, all_points=all_points)
    if as_json:
        say(json.dumps(law_as_json(record), indent=1, ensure_ascii=False))
        return
    show(terminal_law(record))
    for line in warnings(record):
        say(line)
    say(f"law       {urls['index.html']}")


def _answer(config: Any, name: str, ask: Any, *, write: str | None, as_json: bool) -> None:
    from flows.predicting.answers import write_answer, write_config
    from tasks.predicting.record import read_law

    record = read_law(config.root, name)
    answer = ask(record)
    urls = write_answer(config.root, record, answer)
    if write is not None:
        write_config(config, answer, write)
    if as_json:
        say(json.dumps(dict(answer.data), indent=1, ensure_ascii=False))
        return
    _table(f"law '{record.name}'", answer.headings, answer.rows)
    for sentence in answer.sentences:
        say(sentence)
    for url in urls.values():
        say(f"written   {url}")
    if write is not None:
        say(f"written   {write}   ({', '.join(answer.fields)})")


def _table(title: str, headings: Any, rows: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    show(table)


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _ratio(loss: float, teacher: float) -> str:
    return f"{math.exp(loss - teacher):.3f}"
