"""A rank of a training on fake data: `torchrun … train_ranks.py JSON`; rank 0 writes what came out as JSON.

Alone (without torchrun) it is the training in one process that the others are compared with.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import numpy as np
import torch
from fake_data import MIXTURE, L, V, tiny_model, train_data

from ddk import saving
from ddk.parallel import join_world, leave_world, whole
from ddk.sampler import SamplerState
from ddk.train_config import LossConfig, TrainConfig
from ddk.trainer import Trainer, TrainerState


def masked(data: Any) -> Any:
    """Every block keeps another number of positions, so that ranks and micro-batches count different ones."""
    for reader in data.blocks.values():
        mask = np.random.default_rng(3).random((len(reader), L)) < np.linspace(0.1, 1.0, len(reader))[:, None]
        reader.loss_mask = lambda indices, mask=mask: mask[np.asarray(indices)]
    return data


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    world = join_world("cpu")
    data = masked(train_data()) if job.get("masked") else train_data()
    reads: list[tuple[str, int]] = []
    for domain, reader in data.blocks.items():
        read = reader.read
        reader.read = lambda indices, domain=domain, read=read: (
            reads.extend((domain, int(index)) for index in indices) or read(indices)
        )
    settings = {"steps": 20, "batch_size": 4, "learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 3}
    trainer = Trainer(
        tiny_model(tied=True),
        data,
        config=TrainConfig(**settings | {"device": "cpu", "precision": "fp32"} | job["train"]),
        loss=LossConfig(gamma=0.5),
        vocab_size=V,
        seed=1,
        world=world,
    )
    if "load" in job:
        stored = job["state"]
        state = TrainerState(sampler=SamplerState(**stored["sampler"]), mixture_versions=())
        saving.load(trainer, state, job["load"])
    reports: list[Any] = []
    trainer.train_interval(MIXTURE, 0, job["steps"], reports.append)
    read_by_ranks = world.gather(reads)  # before the evaluation reads others
    if "save" in job:
        saving.save(trainer, job["save"])
        world.wait_for_all()
    perplexity = trainer.perplexity(train_data().blocks["web"])
    weights = {name: whole(p.detach()).double().sum().item() for name, p in trainer.parameters.items()}
    if world.is_first:
        result = {
            "reports": [dataclasses.asdict(report) for report in reports],
            "perplexity": perplexity,
            "weights": weights,
            "reads": read_by_ranks,
            "state": {"sampler": dataclasses.asdict(trainer.state.sampler)},
        }
        with open(job["out"], "w", encoding="utf-8") as file:
            json.dump(result, file)
    leave_world(world)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # see leave_world
