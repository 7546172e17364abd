"""Which mixture a configuration's run would have after so many tokens, as far as a law can tell.

A method with a fixed mixture has it from the start. One that follows the gap is played through: at each interval its
pure function is given the perplexities that the law predicts for the shares so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ddk.errors import UserError
from ddk.laws.answers import outcome
from ddk.methods.base import Interval
from ddk.methods.registry import METHODS, mixture_after
from ddk.mixture import equal_mixture
from ddk.values import DomainGap
from flows.config import Config
from storage.corpus.record_paths import store_name
from storage.files import uri
from storage.files.names import plain_name
from storage.stores.manifest import read_manifest
from tasks.predicting.record import LawRecord

_MOST_INTERVALS = 2000


def mixture_after_tokens(config: Config, record: LawRecord, parameters: float) -> Callable[[float], dict[str, float]]:
    """Shares of all tokens that a run of the configuration would have drawn, by the run's length in tokens.

    Raises:
        UserError: the method compares with a further run, whose losses the law does not know.
    """
    method = METHODS[config.method]
    if method.reads_reference and config.mixture.reference_run is not None:
        raise UserError(
            f"method {config.method} follows a reference run, which a law cannot play through; give --mixture"
        )
    if config.mixture.follow != "gap":
        raise UserError(
            f"mixture.follow is '{config.mixture.follow}', and a law does not know accuracies; give --mixture, or set "
            f"mixture.follow: gap"
        )
    sizes = train_blocks(config.root, record)
    if not method.follows_gap:
        fixed = mixture_after(config.method, [], _gaps(record, record.start(parameters)), config.mixture, sizes)
        return lambda tokens: dict(fixed.probabilities)
    return lambda tokens: _played(config, record, parameters, tokens, sizes)


def train_blocks(root: str, record: LawRecord) -> dict[str, int]:
    """Blocks of each domain's store that a run may draw.

    Raises:
        UserError: a store that the law's runs read is gone.
    """
    found: dict[str, int] = {}
    for domain, stores in record.stores.items():
        folder = plain_name(stores["blocks"], f"law '{record.name}'")
        url = uri.join(root, "blocks", folder, store_name(domain))
        manifest = read_manifest(url)
        if manifest is None:
            raise UserError(f"{url}, which the runs of law '{record.name}' read, is gone; `ddk pack` makes it again")
        found[domain] = manifest.splits["train"].blocks
    return found


def _played(
    config: Config, record: LawRecord, parameters: float, tokens: float, sizes: Mapping[str, int]
) -> dict[str, float]:
    each = config.mixture.interval * record.tokens_per_step
    each = max(each, math.ceil(tokens / _MOST_INTERVALS))
    count = max(1, math.ceil(tokens / each))
    drawn = dict.fromkeys(record.domains, 0.0)
    losses = record.start(parameters)
    past: list[Interval] = []
    for number in range(count):
        gaps = _gaps(record, losses)
        mixture = mixture_after(config.method, past, gaps, config.mixture, sizes, progress=number / count)
        past.append(Interval(step=number, gaps=gaps, mixture=mixture))
        taken = min(each, tokens - number * each)
        drawn = {domain: drawn[domain] + taken * mixture.probabilities[domain] for domain in drawn}
        seen = math.fsum(drawn.values())
        shares = {domain: value / seen for domain, value in drawn.items()}
        losses = dict(outcome(record.fitted, record.teacher, parameters, seen, shares).losses)
    return shares


def _gaps(record: LawRecord, losses: Mapping[str, float]) -> list[DomainGap]:
    return [
        DomainGap(domain=domain, student_ppl=math.exp(loss), teacher_ppl=math.exp(record.teacher[domain]))
        for domain, loss in losses.items()
    ]


def given_mixture(text: str, record: LawRecord) -> dict[str, float]:
    """'equal', or weights by hand: 'math=3,code=1'.

    Raises:
        UserError: it is neither, or of other domains.
    """
    if text == "equal":
        return dict(equal_mixture(record.domains).probabilities)
    weights: dict[str, float] = {}
    for part in text.split(","):
        domain, equals, value = part.partition("=")
        try:
            weights[domain.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not 0.0 <= weights.get(domain.strip(), -1.0) < math.inf:
            raise UserError(f"--mixture takes 'equal' or DOMAIN=WEIGHT,…, not '{part}'")
    if set(weights) != set(record.domains) or not any(weights.values()):
        raise UserError(f"--mixture needs a weight for each of {', '.join(record.domains)}, not all 0")
    total = math.fsum(weights.values())
    return {domain: weights[domain] / total for domain in record.domains}
