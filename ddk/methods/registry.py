"""The methods that a run can be trained by, and what the trainer and the flows ask of them.

docs/methods.md compares them. Adding one: a small file beside this one with a `Method`, its name and its line below.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import ValidationError

from ddk.concepts import Accuracies, concept_mixture, weaknesses
from ddk.domain_tree import (
    cut,
    lineage,
    rolled_up_counts,
    rolled_up_gaps,
    rolled_up_mixture,
    rolled_up_ppl,
    spread_mixture,
)
from ddk.methods.base import Interval, Method, measured
from ddk.methods.doremi import CPT_DOREMI
from ddk.methods.fixed import CPT, DDK_EQUAL, KD
from ddk.methods.follow_gap import DDK, DDK_NO_SMOOTHING
from ddk.methods.minillm import MINILLM
from ddk.methods.retain import DDK_RETAIN
from ddk.methods.ted import TED
from ddk.mixture import MixtureConfig, capped_mixture, equal_mixture, fixed_mixture, proportional_mixture
from ddk.train_config import LossConfig
from ddk.values import DomainGap, Mixture

MethodName = Literal["ddk", "ddk_retain", "ddk_no_smoothing", "ddk_equal", "kd", "cpt", "minillm", "cpt_doremi", "ted"]

METHODS: Mapping[MethodName, Method] = {
    "ddk": DDK,
    "ddk_retain": DDK_RETAIN,
    "ddk_no_smoothing": DDK_NO_SMOOTHING,
    "ddk_equal": DDK_EQUAL,
    "kd": KD,
    "cpt": CPT,
    "minillm": MINILLM,
    "cpt_doremi": CPT_DOREMI,
    "ted": TED,
}


def effective_loss(method: MethodName, loss: LossConfig) -> LossConfig:
    """The loss that a method trains with: the configuration's, with what the method fixes.

    Raises:
        ValueError: the two do not go together; `check_method` says so in words.
    """
    fixed = METHODS[method].loss
    return LossConfig.model_validate(loss.model_dump() | dict(fixed)) if fixed else loss


def mixture_after(
    method: MethodName,
    past: Sequence[Interval],
    gaps: Sequence[DomainGap],
    config: MixtureConfig,
    sizes: Mapping[str, int],
    reference: Mapping[str, float] | None = None,
    positions: Mapping[str, int] | None = None,
    progress: float = 0.0,
    accuracies: Accuracies | None = None,
) -> Mixture:
    """The mixture of the next interval, over the leaves.

    With `config.level`, the method sees the domains cut to that level, and its mixture is spread over their leaves.

    Args:
        past: the intervals so far, oldest first; none before the first.
        gaps: measured now, one a domain.
        sizes: train blocks by domain.
        reference: perplexities by domain of the model that `cpt_doremi` compares with; None: the teacher's.
        positions: validation positions that carry loss, by domain; only `config.level` asks for them.
        progress: share of the run's optimizer steps that are done, in [0, 1].
        accuracies: by the questions' paths; only `config.follow` asks for them.

    Raises:
        ValueError: gaps, mixture, sizes or reference are of different domains, or no question belongs to any of them.
    """
    found = _over_leaves(method, past, gaps, config, sizes, reference, positions, progress, accuracies)
    if config.domain_stop_ratio is None:
        return found
    floor = smallest_mixture(method, config, sizes)
    done = [gap.domain for gap in gaps if gap.ratio <= config.domain_stop_ratio]
    return capped_mixture(found, {domain: floor[domain] for domain in done})


def _over_leaves(
    method: MethodName,
    past: Sequence[Interval],
    gaps: Sequence[DomainGap],
    config: MixtureConfig,
    sizes: Mapping[str, int],
    reference: Mapping[str, float] | None,
    positions: Mapping[str, int] | None,
    progress: float,
    accuracies: Accuracies | None,
) -> Mixture:
    level = config.level
    if level is None:
        return _mixture_after(method, past, gaps, config, sizes, reference, progress, accuracies)
    positions = positions or {}
    found = _mixture_after(
        method,
        [
            replace(
                interval,
                gaps=rolled_up_gaps(interval.gaps, positions, level),
                mixture=rolled_up_mixture(interval.mixture, level),
            )
            for interval in past
        ],
        rolled_up_gaps(gaps, positions, level),
        config,
        rolled_up_counts(sizes, level),
        reference and rolled_up_ppl(reference, positions, level),
        progress,
        accuracies,
    )
    return spread_mixture(found, sizes, level)


def _mixture_after(
    method: MethodName,
    past: Sequence[Interval],
    gaps: Sequence[DomainGap],
    config: MixtureConfig,
    sizes: Mapping[str, int],
    reference: Mapping[str, float] | None,
    progress: float,
    accuracies: Accuracies | None,
) -> Mixture:
    chosen = METHODS[method]
    if not past and chosen.follows_gap and config.initial == "proportional":
        return proportional_mixture(sizes)
    if config.follow == "gap":
        return chosen.next_mixture(measured(past, gaps, sizes, reference, progress), config)
    if chosen.smoothing is None or accuracies is None:
        raise ValueError(f"method {method} follows no accuracies, or there are none")
    return concept_mixture(
        list(sizes),
        weaknesses(accuracies, list(sizes)),
        alpha=getattr(config, chosen.smoothing),
        temperature=config.accuracy_temperature,
        base=_of_the_gap(method, past, gaps, config, sizes, progress) if config.follow == "both" else None,
    )


def _of_the_gap(
    method: MethodName,
    past: Sequence[Interval],
    gaps: Sequence[DomainGap],
    config: MixtureConfig,
    sizes: Mapping[str, int],
    progress: float,
) -> Mixture:
    """What the method would have drawn by alone, after the same measurements.

    Played through from the first: the mixtures of the run are tilted towards weak concepts, and a rule that starts from
    the last of them would count the weakness once more at every interval. Only the last progress counts, as no method
    that comes here reads both it and the mixtures before.
    """
    alone = config.model_copy(update={"follow": "gap"})
    played: list[Interval] = []
    for interval in past:
        mixture = _mixture_after(method, played, interval.gaps, alone, sizes, None, progress, None)
        played.append(replace(interval, mixture=mixture))
    return _mixture_after(method, played, gaps, alone, sizes, None, progress, None)


def smallest_mixture(method: MethodName, config: MixtureConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """The floor of the mixture, by leaf: (1 − α)/N, and with `config.level` its share of that of its domain.

    Below this, neither Eq. 2 nor ddk_retain draws a domain; other methods have floors of their own, or none.

    Args:
        sizes: train blocks by domain.
    """
    alpha = float(getattr(config, METHODS[method].smoothing or "alpha"))
    equal = equal_mixture(sizes if config.level is None else rolled_up_counts(sizes, config.level))
    spread = equal if config.level is None else spread_mixture(equal, sizes, config.level)
    return {domain: (1.0 - alpha) * p for domain, p in spread.probabilities.items()}


def check_method(method: MethodName, mixture: MixtureConfig, loss: LossConfig, domains: Collection[str]) -> None:
    """Check that the method, the mixture and the loss of a configuration are compatible.

    Args:
        domains: all leaves.

    Raises:
        ValueError: they are not; the fields and the remedy are named.
    """
    chosen = METHODS[method]
    if mixture.weights is not None and chosen.follows_gap:
        others = ", ".join(name for name, known in METHODS.items() if not known.follows_gap)
        raise ValueError(
            f"mixture.weights is set, and method {method} determines its mixture itself; leave it out, or set method "
            f"to one "
            f"with a fixed mixture ({others})"
        )
    if mixture.weights is not None:
        try:
            level = mixture.level
            fixed_mixture(mixture.weights, {cut(one, level) if level else one: 1 for one in domains})
        except ValueError as error:
            raise ValueError(f"mixture.weights: {error}") from None
    known = {above for one in domains for above in lineage(one)}
    # 'math/…' stands for the leaves of a domain whose records say what they are.
    later = tuple(one.removesuffix("…") for one in domains if one.endswith("/…"))
    if unknown := sorted(name for name in set(loss.gamma_of) - known if not name.startswith(later)):
        raise ValueError(
            f"loss.gamma_of: there is no domain '{unknown[0]}'; the domains are {', '.join(sorted(domains))}"
        )
    if mixture.reference_run is not None and not chosen.reads_reference:
        others = ", ".join(name for name, known in METHODS.items() if known.reads_reference)
        raise ValueError(
            f"mixture.reference_run is set, and method {method} uses no reference; leave it out, or set "
            f"method: {others}"
        )
    if mixture.domain_stop_ratio is not None and not chosen.follows_gap:
        others = ", ".join(name for name, known in METHODS.items() if known.follows_gap)
        raise ValueError(
            f"mixture.domain_stop_ratio is set, and method {method} does not follow the gap; leave it out, or set "
            f"method to one that does ({others})"
        )
    _check_followed(method, mixture)
    try:
        effective_loss(method, loss)
    except ValidationError as error:
        fixed = ", ".join(f"loss.{field}: {value}" for field, value in chosen.loss.items())
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"method {method} means {fixed}, which conflicts with the rest of loss: {reason}") from None


def _check_followed(method: MethodName, mixture: MixtureConfig) -> None:
    if mixture.follow == "gap":
        if mixture.accuracy_run is not None:
            raise ValueError(
                "mixture.accuracy_run is set, and mixture.follow is 'gap', which reads no accuracies; leave it out, or "
                "set mixture.follow: accuracy, or both"
            )
        return
    if METHODS[method].smoothing is None:
        others = " or ".join(name for name, known in METHODS.items() if known.smoothing is not None)
        raise ValueError(
            f"mixture.follow is '{mixture.follow}', and method {method} has a mixture of its own kind; set method: "
            f"{others}, or mixture.follow: gap"
        )
    if mixture.accuracy_run is None:
        raise ValueError(
            f"mixture.follow is '{mixture.follow}', which needs accuracies by concept; set mixture.accuracy_run to a "
            f"run that `ddk eval` has asked questions with a path (docs/training.md), or set mixture.follow: gap"
        )
