"""How far sparse targets lead the student's gradient away from that of the teacher's whole distribution.

Read from the very stores that a comparison's runs trained on: for some validation blocks of each domain, the
divergence's gradient in the student's logits (the student as it is before training) from a variant's targets and loss,
beside that from the dense targets:

    deviation = ‖g − g_dense‖ / ‖g_dense‖       over all positions together
    loss      = mean divergence, in nats

Random draws deviate on every single batch and by nothing on average; what the deviation shows of them is their noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from ddk.fused import dense_loss
from ddk.loss import teacher_of
from ddk.student import load_student
from ddk.train_config import LossConfig, StudentConfig
from ddk.values import SparseTargets
from storage.blocks import open_blocks
from storage.targets import open_targets
from tasks.comparing.data import Comparison

BLOCKS = 4
"""Of each domain."""
Deviation = dict[str, dict[str, list[float]]]
"""`{"gradient"|"loss"}` by variant: a value for each domain."""


def deviations(root: str, comparison: Comparison, dense: str, student: str) -> Deviation:
    """Of every variant with stored targets from the variant `dense`, whose stores hold all tokens."""
    model = None
    found: Deviation = {}
    places = {variant.name: _stores(root, comparison, variant.name) for variant in comparison.variants}
    for number, url in enumerate(places[dense]):
        targets = open_targets(url, "validation")
        if model is None:
            model = load_student(StudentConfig(model=student), targets.vocab_size)
        blocks = open_blocks(_blocks_url(root, targets.manifest.inputs["blocks"], url), "validation")
        tokens = torch.from_numpy(blocks.read(range(BLOCKS))).long()
        with torch.no_grad():
            logits_TV = model(tokens[:, :-1]).logits[..., : targets.vocab_size].flatten(0, 1)
        labels_T = tokens[:, 1:].flatten()
        truth, _ = gradient(logits_TV, labels_T, targets.read(range(BLOCKS)), LossConfig(gamma=1.0))
        for variant in comparison.variants:
            loss = _loss(comparison, variant.name)
            if loss.gamma == 0.0 or not places[variant.name]:
                continue
            stored = open_targets(places[variant.name][number], "validation").read(range(BLOCKS))
            one, divergence = gradient(logits_TV, labels_T, stored, loss)
            values = found.setdefault(variant.name, {"gradient": [], "loss": []})
            values["gradient"].append(float((one - truth).norm() / truth.norm()))
            values["loss"].append(divergence)
    return found


def gradient(
    logits_TV: torch.Tensor, labels_T: torch.Tensor, targets: SparseTargets, loss: LossConfig
) -> tuple[torch.Tensor, float]:
    """The divergence's gradient in the logits, and its mean; the cross-entropy's is taken off."""
    both = []
    for config in (loss.model_copy(update={"gamma": 1.0}), LossConfig(gamma=0.0)):
        wanted_TV = logits_TV.clone().requires_grad_()
        teacher = teacher_of(targets, config) if config.gamma else None
        sums = dense_loss(wanted_TV, labels_T, teacher, config)
        sums.total.backward()
        both.append((wanted_TV.grad, float(sums.kl) / len(labels_T)))
    (total_TV, divergence), (cross_entropy_TV, _) = both
    return total_TV - cross_entropy_TV, divergence


def _stores(root: str, comparison: Comparison, variant: str) -> Sequence[str]:
    return [os.path.join(root, place) for run in comparison.of(variant)[:1] for place in run.stores]


def _blocks_url(root: str, fingerprint: str, targets_url: str) -> str:
    return os.path.join(root, "blocks", fingerprint, os.path.basename(targets_url))


def _loss(comparison: Comparison, variant: str) -> LossConfig:
    """As the variant trained: what all share, and what is its own."""
    own = next(one.settings for one in comparison.variants if one.name == variant)
    return LossConfig(**dict(_fields({**comparison.settings, **own})))


def _fields(settings: dict[str, str]) -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        if name.startswith("loss."):
            yield name.removeprefix("loss."), {"true": True, "false": False}.get(value, value)
