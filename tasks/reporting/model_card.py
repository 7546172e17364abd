"""The README.md beside the final student's weights: what it was made from, how, and what was measured.

States what this run was given and what it measured; nothing is estimated and nothing is taken from the paper.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from tasks.reporting.records import IntervalRecord, RunSummary, domains_of, flat_settings, gap_table, regressions
from tasks.reporting.tree import tree_table
from tasks.showing.formats import count, escape, gap_cells, markdown_table, percent

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)

RECIPE: Mapping[str, str] = {
    "gamma": "weight of the divergence (γ)",
    "gamma_until": "steps with the divergence",
    "min_entropy": "no divergence where the teacher's entropy is below (nats)",
    "divergence": "divergence from the teacher",
    "temperature": "temperature",
    "tail": "treatment of the tail",
    "follow": "what the mixture follows",
    "accuracy_run": "run whose accuracies it follows",
    "alpha": "smoothing of the mixture (α)",
    "retain_alpha": "share of the mixture that follows the gap (α)",
    "retain_temperature": "temperature of the gap in the mixture (τ)",
    "retain_weight": "weight of what was lost in the mixture (κ)",
    "retain_tolerance": "loss that has the whole weight (f₀, nats)",
    "interval": "steps in an interval",
    "learning_rate": "learning rate",
    "min_learning_rate": "learning rate at the end",
    "warmup_steps": "warm-up steps",
    "steps": "planned steps",
    "batch_size": "blocks in a batch",
    "weight_decay": "weight decay",
    "gradient_clip": "gradient clipping",
    "seed": "seed",
}
"""A setting's name, in whichever section it stands → what the card calls it."""


def render_model_card(summary: RunSummary, records: Sequence[IntervalRecord]) -> str:
    """README.md of the student's Hugging Face folder: YAML front matter, then Markdown.

    Raises:
        ValueError: as `tasks.reporting.records.domains_of`.
    """
    gaps, leaves = tree_table(records), set(domains_of(records))
    rolled_up = " A domain in italics is rolled up from its leaves, which follow it." if len(gaps) > len(leaves) else ""
    origin = "distilled domain by domain from" if distils(summary.method) else "trained without targets, compared with"
    parts = [
        f"---\n{yaml.safe_dump(front_matter(summary), sort_keys=False, allow_unicode=True)}---",
        f"# {escape(summary.name)}",
        f"{escape(summary.student)}, {origin} {escape(summary.teacher)}, by method “{escape(summary.method)}” of the "
        "ddk project, after “DDK: Distilling Domain Knowledge for Efficient Large "
        "Language Models” (arXiv 2407.16154).",
        "## Data",
        f"The student read {count(summary.tokens_seen)} tokens in {count(summary.steps)} optimizer steps, as blocks of "
        f"{count(summary.seq_len)} predictions. Blocks repeat where a domain's data ran out."
        f"{rolled_up}",
        markdown_table(
            ("domain", "blocks read", "tokens read", "share of tokens"),
            [
                (
                    _name(row["domain"], leaves),
                    count(row["blocks_drawn"]),
                    count(row["blocks_drawn"] * summary.seq_len),
                    percent(row["token_share"]),
                )
                for row in gaps
            ],
        ),
        "## Recipe",
        markdown_table(("setting", "value"), [("method", escape(summary.method)), *_recipe(summary)], left=2),
    ]
    if summary.gone_on_from:
        parts.append(f"This run {escape(summary.gone_on_from)}.")
    if summary.context is not None:
        parts += ["## Context", _context(summary.context)]
    if summary.stopped_early is not None:
        parts.append(f"Training ended before its budget was used up: {escape(summary.stopped_early)}")
    parts += [
        "## Results",
        "Perplexity on each domain's validation blocks; ratio = student ÷ teacher, and 1 means that the student has "
        "caught up. The domain that lagged most comes first.",
        markdown_table(
            ("domain", "teacher", "student before", "student after", "ratio before", "ratio after"),
            [
                (
                    _name(row["domain"], leaves),
                    *gap_cells(row),
                )
                for row in gaps
            ],
        ),
        *([f"**{escape(worse)}**"] if (worse := regressions(gap_table(records))) else []),
        "## Limits",
        "- The numbers are perplexities on the validation blocks of the domains listed above, measured by the run that "
        "trained this model. No benchmark or task was run.\n"
        "- They say nothing about other domains, about instructions or chat, or about safety.\n"
        "- What the teacher or the training data get wrong, the student may have learnt.\n"
        "- The licences of the teacher, of the original student and of the data apply; see where they come from.",
    ]
    return "\n\n".join(parts) + "\n"


def _context(context: Mapping[str, Any]) -> str:
    """How a student was prepared for longer contexts, and what its config.json says of it."""
    target, trained, block = (int(context[name]) for name in ("target", "trained", "block"))
    divergence = (
        "The teacher’s targets are of ordinary positions."
        if context["distil"]
        else "Blocks at other than ordinary positions were trained on cross-entropy alone."
    )
    share, factor = float(context["saved_share"]), f"{target / trained:g}"
    drawn = f"a random number up to {context['max_scale']}"
    if share:
        others = f" in {share:.0%} of the blocks and by {drawn} in the others" if share < 1 else ""
        drawn = factor + others
    measured = f"divided by {block / trained:g}" if block > trained else "as they are, without that scaling"
    return (
        f"For {count(target)} positions, trained on blocks of {count(block)}, after E²-LLM (arXiv 2401.06951): the "
        f"positions of each block were divided by {drawn}, and those behind the "
        f"first {context['offset_after']} moved by a random offset. {divergence} config.json declares {count(target)} "
        f"positions and divides them by {factor} (linear scaling of the rotary embedding, from the "
        f"{count(trained)} that the student knew before). The perplexities below were measured at positions {measured}."
    )


def _name(domain: str, leaves: Collection[str]) -> str:
    return escape(domain) if domain in leaves else f"*{escape(domain)}*"


def front_matter(summary: RunSummary) -> dict[str, Any]:
    """What the Hugging Face hub reads. `base_model` is the student before training, if that is on the hub."""
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if is_hub_id(summary.student):
        matter["base_model"] = summary.student
    return matter | {"tags": ["distillation", "ddk"] if distils(summary.method) else ["ddk"]}


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as `owner/model` and is no path on this machine."""
    return HUB_ID.fullmatch(name) is not None and not os.path.exists(name)


def distils(method: str) -> bool:
    """Whether the method trains on the teacher's targets; a method that this version does not know is taken to."""
    from ddk.methods.registry import METHODS  # brings torch, which nothing else here needs

    return all(known.reads_targets for name, known in METHODS.items() if name == method)


_OF_THE_DIVERGENCE = {"gamma", "gamma_until", "min_entropy", "divergence", "temperature", "tail"}
_GAMMA_OF = "loss.gamma_of."
_NOT_USED = {("gamma_until", "null"), ("min_entropy", "0.0"), ("follow", "gap"), ("accuracy_run", "null")}
"""Settings that are off have no row."""


def _recipe(summary: RunSummary) -> list[tuple[str, str]]:
    """What `RECIPE` names of this run's settings; where two sections have one name, with the sections' names."""
    # What the configuration holds but the method does not use would be a false statement here.
    unused = set() if distils(summary.method) else set(_OF_THE_DIVERGENCE)
    unused |= set() if summary.method == "ddk" else {"alpha"}
    unused |= set() if summary.method == "ddk_retain" else {name for name in RECIPE if name.startswith("retain_")}
    given = list(flat_settings(summary.settings))
    settings = [(key, key.rsplit(".", 1)[-1], value) for key, value in given if not key.startswith(_GAMMA_OF)]
    names = [name for _, name, _ in settings]
    of_domains = [
        (f"γ of domain {escape(key.removeprefix(_GAMMA_OF))}", escape(value))
        for key, value in given
        if key.startswith(_GAMMA_OF) and "gamma" not in unused
    ]
    return of_domains + [
        (RECIPE[wanted] + (f" ({escape(key)})" if names.count(name) > 1 else ""), escape(value))
        for wanted in RECIPE
        for key, name, value in settings
        if name == wanted and name not in unused and (wanted, value) not in _NOT_USED
    ]
