"""`ddk plan --predict`: what a law of the root expects of the configuration's run, before it starts."""

from __future__ import annotations

from collections.abc import Iterator

from ddk.errors import UserError
from flows.config import Config
from flows.predicting.answers import size_of, tokens_of
from flows.predicting.mixtures import mixture_after_tokens
from flows.stages import plan_of
from tasks.planning.selection_plan import plan_selections, store_fingerprints
from tasks.predicting.record import LawRecord, read_law
from tasks.showing.formats import ppl


def expected(config: Config, name: str) -> Iterator[str]:
    """Lines: the largest ratio and the perplexity at the end, then each domain's ratio.

    Raises:
        UserError: there is no such law, or it was fitted to runs on other stores than the configuration's.
    """
    record = read_law(config.root, name)
    _check_stores(config, record)
    parameters, tokens = size_of(config), tokens_of(config)
    shares = mixture_after_tokens(config, record, parameters)(tokens)
    there = record.outcome(parameters, tokens, shares)
    worst = max(there.outcome.ratios, key=lambda domain: there.outcome.ratios[domain])
    yield (
        f"expected  largest ratio {_between(there.outcome.worst, there.worst)} on {worst} after {tokens:,.0f} "
        f"tokens, by law '{name}' ({record.form}, {len({point.run for point in record.points})} runs)"
    )
    for domain in record.domains:
        value = there.outcome.ratios[domain]
        yield f"          {domain}: ratio {_between(value, there.ratios[domain])}, share {100 * shares[domain]:.1f}%"
    if there.mean is not None:
        yield f"          perplexity (geometric mean) {ppl(there.mean[0])} to {ppl(there.mean[1])}"
    if there.outside:
        yield f"          outside what the law was fitted to: {'; '.join(there.outside)}"


def _check_stores(config: Config, record: LawRecord) -> None:
    plan = plan_of(config)
    here = store_fingerprints(plan, plan_selections(config.root, plan, config.student))
    if set(here) != set(record.stores):
        raise UserError(
            f"law '{record.name}' is of the domains {', '.join(sorted(record.stores))}, the configuration of "
            f"{', '.join(sorted(here))}; name another with --law"
        )
    for domain, stored in record.stores.items():
        if here[domain] != stored:
            raise UserError(
                f"law '{record.name}' was fitted to runs on other stores of '{domain}' than the configuration's, so "
                f"that it says nothing of this run; fit one to runs on these stores, or name another with --law"
            )


def _between(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
