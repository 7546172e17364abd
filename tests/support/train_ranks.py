"""A rank of trainings on fake data, one after the other: `torchrun … train_ranks.py FILE`, where the file lists them;
rank 0 writes what came out of each as JSON.

Without torchrun, `train` is the training in one process that the others are compared with.
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
from ddk.context import ContextPlan
from ddk.parallel import World, join_world, leave_world, whole
from ddk.sampler import SamplerState
from ddk.train_config import LossConfig, TrainConfig
from ddk.trainer import Trainer, TrainerState


def masked(data: Any) -> Any:
    """Every block keeps another number of positions, so that ranks and micro-batches count different ones."""
    for reader in data.blocks.values():
        mask = np.random.default_rng(3).random((len(reader), L)) < np.linspace(0.1, 1.0, len(reader))[:, None]
        reader.loss_mask = lambda indices, mask=mask: mask[np.asarray(indices)]
    return data


def train(job: dict[str, Any], world: World) -> None:
    """One training.

    Args:
        job: "out", the file for what came out; "steps"; "train", settings of `TrainConfig`; "masked"; "context", those
            of a `ContextPlan`; "save", a folder for a checkpoint of the end; "load", one to begin at, and "state_of",
            what came out of its training.
    """
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
        context=ContextPlan(**job["context"]) if "context" in job else None,
    )
    if "load" in job:
        with open(job["state_of"], encoding="utf-8") as file:
            stored = json.load(file)["state"]
        state = TrainerState(sampler=SamplerState(**stored["sampler"]), mixture_versions=())
        saving.load(trainer, state, job["load"])
    reports: list[Any] = []
    trainer.train_interval(MIXTURE, 0, job["steps"], reports.append)
    read_by_ranks = world.gather(reads)  # before the evaluation reads others
    if "save" in job:
        saving.save(trainer, job["save"])
        world.wait_for_all()
    fresh = train_data()
    held_out = trainer.held_out(fresh.blocks["web"], (fresh.targets or {})["web"])
    weights = {name: whole(p.detach()).double().sum().item() for name, p in trainer.parameters.items()}
    if world.is_first:
        result = {
            "reports": [dataclasses.asdict(report) for report in reports],
            "perplexity": held_out.ppl,
            "kl": held_out.kl,
            "weights": weights,
            "reads": read_by_ranks,
            "state": {"sampler": dataclasses.asdict(trainer.state.sampler)},
        }
        with open(job["out"], "w", encoding="utf-8") as file:
            json.dump(result, file)
    world.wait_for_all()


if __name__ == "__main__":
    torch.set_num_threads(1)
    all_ranks = join_world("cpu")
    with open(sys.argv[1], encoding="utf-8") as jobs:
        for one in json.load(jobs):
            train(one, all_ranks)
    leave_world(all_ranks)
    os._exit(0)  # see leave_world
